"""Looking into heads: one more generation in which every plan's operator gets the inputs of full attention.

Videos tell what a plan does to the result; this tells, head by head, what it does to attention itself, and how long
attention alone takes with and without it. Nothing here runs while an evaluation is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from tqdm.auto import tqdm

from paroattn.block_mask import block_count
from paroattn.calibration.capture import order_of
from paroattn.calibration.run import calibration_kernels
from paroattn.calibration.statistics import block_areas
from paroattn.cli.models import GenerativeModel
from paroattn.integrations.clock import now
from paroattn.integrations.observe import ObservedCall, observe
from paroattn.integrations.schedule import Schedule
from paroattn.ops import cpu
from paroattn.ops.backend import choose_backend
from paroattn.ops.inputs import CallKind
from paroattn.plan import Plan
from paroattn.runner import Runner
from paroattn_lab.quality.pairs import Pair

MAP_SIDE = 64
"""Most rows and columns of a kept attention map: maps of long videos are averaged down to this as they come."""


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Attention maps at block resolution of one plan's heads, at the first step of each step bucket.

    A value is the mean entry of P in a block over 1 / N: 1 where attention is uniform.

    Attributes:
        original: in the model's own order, float32 [buckets, layers, heads, rows, columns]; NaN where not called.
        chosen: the same in each head's order.
        blocks: rows and columns of blocks before they were averaged down to `MAP_SIDE`.
    """

    original: Tensor
    chosen: Tensor
    blocks: int


@dataclass(frozen=True, eq=False)
class PlanStudy:
    """What one plan did to attention.

    Attributes:
        backend: that computed it.
        densities: of its masks, [buckets, layers, heads].
        errors: relative L2 error of each head's output, float64 [buckets, layers, heads]; NaN where not called.
        seconds: of all attention calls.
        full_seconds: of the same calls with the model's own attention.
        prologue_seconds: the part of `seconds` that reorders and quantises, where the backend tells it, else None.
    """

    backend: str
    densities: Tensor
    errors: Tensor
    seconds: float
    full_seconds: float
    prologue_seconds: float | None


@dataclass(frozen=True, eq=False)
class HeadStudy:
    """Results of `study_heads`: by name of variant, and the maps of the plan that is shown."""

    pair: Pair
    plans: Mapping[str, PlanStudy]
    maps: AttentionMaps


def study_heads(
    model: GenerativeModel,
    plans: Mapping[str, Plan],
    pair: Pair,
    *,
    shown: str,
    backend: str = "auto",
    progress: bool = True,
) -> HeadStudy:
    """Generate a pair with full attention, and give every attention call to the operators of all plans, too.

    Args:
        model: what generates.
        plans: to look at, by name of variant.
        pair: prompt and seed.
        shown: name of the plan whose attention maps are kept.
        backend: of the operators.
        progress: show a progress bar on stderr.
    """
    maps = _Maps(plans[shown])
    with tqdm(desc="attention of each head", unit="step", disable=not progress) as bar:
        looks = {name: _Look(plan, backend) for name, plan in plans.items()}

        def follow(schedule: Schedule) -> None:
            bar.total = schedule.num_steps
            bar.update(schedule.step - bar.n)

        def look(call: ObservedCall) -> Tensor:
            reference, seconds = _timed(call.dense, call.query.device)
            for own in looks.values():
                own.compare(call, reference, seconds)
            maps.add(call)
            return reference

        with observe(model.pipe, look, on_step=follow):
            model.generate(*pair)
        bar.update((bar.total or bar.n) - bar.n)
    return HeadStudy(pair, {name: look.result() for name, look in looks.items()}, maps.result())


def study_records(records: Sequence[Mapping[str, Any]], study: HeadStudy) -> list[dict[str, Any]]:
    """The records of an evaluation with what the study found of each variant.

    "attention" holds the seconds of attention calls in one generation, "heads" density and error per step bucket, layer
    and head.
    """
    prompt, seed = study.pair
    completed = []
    for record in records:
        found = study.plans.get(record["variant"])
        if found is None:  # a mask rule without a plan
            completed.append(dict(record))
            continue
        attention = {
            "prompt": prompt,
            "seed": seed,
            "backend": found.backend,
            "seconds": found.seconds,
            "full_seconds": found.full_seconds,
            "prologue_seconds": found.prologue_seconds,
        }
        heads = {"densities": rounded(found.densities), "errors": rounded(found.errors)}
        completed.append({**record, "attention": attention, "heads": heads})
    return completed


def rounded(values: Tensor) -> list[Any]:
    """Nested lists with four significant digits; None for NaN."""
    if values.ndim > 1:
        return [rounded(value) for value in values]
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in values.tolist()]


class _Look:
    """One plan's operators, and what was seen of them."""

    def __init__(self, plan: Plan, backend: str):
        self._plan = plan
        self._backend = backend
        self._used = ""
        self._runner: Runner | None = None
        self._changes = torch.zeros(plan.mask_index.shape, dtype=torch.float64)
        self._norms = torch.zeros_like(self._changes)
        self._seconds = self._full_seconds = 0.0
        self._prologues: list[float] = []

    def compare(self, call: ObservedCall, reference: Tensor, full_seconds: float) -> None:
        """Compute the call as the plan says and add up its time and its difference from the reference."""
        device = call.query.device
        if self._runner is None:
            self._runner = Runner(self._plan, device, backend=self._backend)
            block_shape = (self._plan.block_q, self._plan.block_kv)
            kind = CallKind(self._plan.precisions, device, call.query.dtype, block_shape)
            self._used = choose_backend(self._backend, kind).describe()
        bucket, runner = self._plan.bucket_of(call.level), self._runner
        operator = runner.layers[call.layer].make_ready(call.query.dtype, call.scale)
        settings: dict[str, Any] = {"bucket": runner.bucket(call.level), "key_mask": call.key_mask}
        with cpu.prologue_times() as prologues:
            output, seconds = _timed(lambda: operator(call.query, call.key, call.value, **settings), device)
        self._prologues += prologues
        self._seconds += seconds
        self._full_seconds += full_seconds
        exists = 1.0 if call.key_mask is None else call.key_mask[:, :, None, None]
        change, norm = (
            ((x.float() * exists).square().sum((0, 1, 3), dtype=torch.float64)).cpu()
            for x in (output - reference, reference)
        )
        self._changes[bucket, call.layer] += change
        self._norms[bucket, call.layer] += norm

    def result(self) -> PlanStudy:
        errors = (self._changes / self._norms).sqrt()  # 0 / 0 is NaN: never called
        return PlanStudy(
            backend=self._used,
            densities=self._plan.densities(),
            errors=errors,
            seconds=self._seconds,
            full_seconds=self._full_seconds,
            prologue_seconds=sum(self._prologues) if self._prologues else None,
        )


class _Maps:
    """Adds up the attention maps of one plan's heads, averaged down as they come."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._blocks = block_count(plan.grid.tokens, 64)
        side = min(self._blocks, MAP_SIDE)
        self._sums = torch.zeros(2, *plan.mask_index.shape, side, side)
        self._samples = torch.zeros(plan.mask_index.shape[:2])
        self._step_of: dict[int, int] = {}

    def add(self, call: ObservedCall) -> None:
        plan, bucket = self._plan, self._plan.bucket_of(call.level)
        step = self._step_of.setdefault(bucket, call.step)
        if call.step != step:
            return  # the first step stands for its bucket
        side, block_sums = self._sums.shape[-1], calibration_kernels(call.query.device).block_sums
        for sample in call.samples():
            uniform = block_areas(sample.grid.tokens) / sample.grid.tokens
            for head, index in enumerate(plan.order_index[call.layer].tolist()):
                q, k, _ = sample.head(head)
                orders = [order_of(name, sample.grid) for name in ("FHW", plan.order_names[index])]
                maps = block_sums(q, k, orders, call.scale) / uniform
                self._sums[:, bucket, call.layer, head] += adaptive_avg_pool2d(maps, side)
            self._samples[bucket, call.layer] += 1

    def result(self) -> AttentionMaps:
        original, chosen = self._sums / self._samples.view(*self._samples.shape, 1, 1, 1)
        return AttentionMaps(original, chosen, self._blocks)


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    start = now(device)
    result = call()
    return result, now(device) - start
