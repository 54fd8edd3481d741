"""What an error in one head at one step does to the final result, measured on a calibration run.

Two measurements are multiplied. Backward passes through the transformer give the squared change of its output per
squared error of a head's output: with a random cotangent r and g the gradient of r·output at the head's output,
E |g|² is the squared norm of the Jacobian, so one or two backward passes serve all heads of a model at once. Generating
with a single step bucket approximated then gives what such a change becomes at the end of the schedule.

Errors are taken to have no preferred direction. Gradients times the heads' actual errors need no such assumption, but
they are so noisy that plans made of them were worse (docs/fidelity.md).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from paroattn.block_mask import block_count, pack_bits
from paroattn.calibration.mask_table import nearest_called
from paroattn.calibration.recording import ForwardCall
from paroattn.calibration.run import CalibrationRun, Sampling, spread
from paroattn.errors import InputError
from paroattn.integrations.apply import apply
from paroattn.integrations.observe import ObservedCall, observe
from paroattn.integrations.pipeline import Pipeline
from paroattn.plan import Plan
from paroattn.quantize import Precision
from paroattn.runner import Runner


@dataclass(frozen=True, eq=False)
class Effects:
    """Squared changes of the final latents.

    Attributes:
        weights: per unit of squared error of the head's output in one step, float64 [buckets, layers, heads].
        int4: when a head is computed in INT4 at every step, [layers, heads].
    """

    weights: Tensor
    int4: Tensor


def measure_effects(
    run: CalibrationRun, draft: Plan, errors: Tensor, sampling: Sampling, *, seed: int = 0, int4: bool = False
) -> Effects:
    """Effects of the heads of a pipeline on its first calibration prompt.

    Args:
        run: has generated before, so that its grid is known.
        draft: how steps are approximated to see what it does.
        errors: squared error of the heads' outputs under the draft, [buckets, layers, heads].
        sampling: how much is measured.
        seed: of the random cotangents.
        int4: also measure INT4 (zeros otherwise).

    Raises:
        InputError: gradients or latents that are not finite.
    """
    steps_of: list[list[int]] = [[] for _ in range(draft.buckets)]
    for step in range(run.num_steps):
        steps_of[draft.bucket_of(run.schedule[step])].append(step)
    called = draft.usage > 0
    buckets = _probed_buckets(run.pipeline, called, sampling.sensitivity_steps or draft.buckets)
    steps = {bucket: steps_of[bucket][len(steps_of[bucket]) // 2] for bucket in buckets}
    generator = torch.Generator().manual_seed(seed)
    kept = run.checkpoint.load("effects")
    if kept is None:
        found, rounding = [], []
    else:
        found, rounding = list(kept[0]["found"]), list(kept[0]["rounding"])
        generator.set_state(kept[0]["generator"])
    with run.bar(len(buckets), "calibration 3/4, effect of heads", "step", len(found)) as bar:
        for bucket in buckets[len(found) :]:
            probe = _HeadProbe(run.pipeline, draft, bucket, int4, sampling.cotangents)
            calls = run.recorded().calls_of(steps[bucket])[: sampling.samples]
            measured = [probe.measure(call, generator) for call in calls]
            sensitivity, rounded = (torch.stack(parts).nanmean(0) for parts in zip(*measured, strict=True))
            found.append(sensitivity)
            rounding.append(rounded)
            state = {"found": torch.stack(found), "rounding": torch.stack(rounding)}
            run.checkpoint.save("effects", {**state, "generator": generator.get_state()}, {})
            bar.update()
    sensitive = torch.stack(found)
    known = called[buckets] & sensitive.isfinite().all(-1)
    _tell_of_lost(called[buckets], known, run.pipeline)
    # Layers that a bucket does not call have the sensitivity of the nearest one that does.
    own = nearest_called(known.float()).unsqueeze(-1).expand(len(buckets), -1, draft.model.heads)
    logs = sensitive.clamp(min=1e-30).log().gather(0, own)
    sensitivities = _interpolated(buckets, logs, draft.buckets).exp() * called.unsqueeze(-1)
    gains = _propagation(run, draft, (sensitivities * errors).sum((1, 2)), steps_of, sampling)
    weights = sensitivities * gains.view(-1, 1, 1)
    steps_per_bucket = torch.tensor([len(own) for own in steps_of], dtype=torch.float64).view(-1, 1, 1)
    int4_errors = _interpolated(buckets, torch.stack(rounding), draft.buckets)
    return Effects(weights, int4=(int4_errors * weights * steps_per_bucket).sum(0))


def _tell_of_lost(called: Tensor, known: Tensor, pipeline: Pipeline) -> None:
    """Warn of layers whose gradients are not finite in some bucket, bool [buckets, layers]; raise if in all."""
    lost = called & ~known
    never_known = (called.any(0) & ~known.any(0)).nonzero().flatten().tolist()
    if never_known:
        raise InputError(
            f"gradients of layer {never_known[0]} in {pipeline.place[1]} are not finite; calibrate with "
            "the pipeline in float32 or bfloat16"
        )
    if bool(lost.any()):
        warnings.warn(
            f"gradients are not finite in {int(lost.sum())} of {int(called.sum())} layers and steps that were looked "
            "at; those of the nearest step stand for them",
            stacklevel=2,
        )


def _probed_buckets(pipeline: Pipeline, called: Tensor, count: int) -> list[int]:
    """Step buckets, ascending: at most `count` of those that call each transformer; called: bool [buckets, layers]."""
    buckets, first = set(), 0
    for layers in pipeline.layers:
        own = called[:, first : first + len(layers)].any(1).nonzero().flatten().tolist()
        buckets |= {own[place] for place in spread(count, len(own))} if own else set()
        first += len(layers)
    return sorted(buckets)


class _HeadProbe:
    """Backward passes through a transformer at one step bucket."""

    def __init__(self, pipeline: Pipeline, draft: Plan, bucket: int, int4: bool, cotangents: int):
        self._pipeline = pipeline
        self._cotangents = cotangents
        self._shape = (draft.model.layers, draft.model.heads)
        self._plans: tuple[Plan, ...] = ()
        if int4:
            in_int4 = replace(draft, precisions=(Precision("int4", "int4"),) * len(draft.precisions))
            self._plans = (draft, in_int4)
        self._runners: list[Runner] = []
        self._bucket = torch.tensor(bucket)

    def measure(self, forward: ForwardCall, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """For one recorded call: squared change of the model's output per squared error of a head's output, and the
        squared error of a head in INT4 (zero if not asked for); each [layers, heads] float64, zero for layers that are
        not called, NaN for gradients that are not finite.
        """
        found = self._measure(forward, generator)
        if not found[0].isfinite().all():  # seen on an H100 in bfloat16, where cuDNN's kernels are the first choice
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                found = self._measure(forward, generator)
        return torch.where(found[0].isfinite(), found[0], torch.nan), found[1]

    def _measure(self, forward: ForwardCall, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        layers: list[int] = []
        touched: list[Tensor] = []  # zeros added to each call's attention, whose gradient is wanted
        rounding = torch.zeros(self._shape, dtype=torch.float64)

        def add_zeros(call: ObservedCall) -> Tensor:
            output = call.dense()
            zeros = torch.zeros_like(output, requires_grad=True)
            if not backward_began:  # with gradient checkpointing, forward code runs again in the backward pass
                layers.append(call.layer)
                touched.append(zeros)
                rounding[call.layer] += self._int4_error(call)
            return output + zeros

        backward_began: list[bool] = []
        totals, elements = torch.zeros(self._shape, dtype=torch.float64), torch.zeros(self._shape[0], 1)
        with observe(self._pipeline, add_zeros), _for_gradients(forward.transformer), torch.enable_grad():
            output = forward()
            backward_began.append(True)
            for number in range(self._cotangents):
                cotangent = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
                gradients = torch.autograd.grad(output, touched, cotangent, retain_graph=number < self._cotangents - 1)
                for layer, gradient in zip(layers, gradients, strict=True):
                    totals[layer] += gradient.double().square().sum((0, 1, 3)).cpu()
                    elements[layer] += gradient[:, :, 0].numel()
        return totals / elements.clamp(min=1), rounding

    @torch.no_grad()
    def _int4_error(self, call: ObservedCall) -> Tensor:
        """Squared difference of INT4 to the plan's own precision, per sample, float64 [heads]."""
        if not self._plans:
            return torch.zeros(self._shape[1], dtype=torch.float64)
        device, tensors = call.query.device, (call.query, call.key, call.value)
        settings: dict[str, Any] = {"bucket": self._bucket.to(device), "key_mask": call.key_mask, "scale": call.scale}
        self._runners = self._runners or [Runner(plan, device) for plan in self._plans]
        answers = [runner.call(call.layer, *tensors, **settings) for runner in self._runners]
        outputs = [answer.double() for answer in answers if isinstance(answer, Tensor)]
        return (outputs[1] - outputs[0]).square().sum((0, 1, 3)).cpu() / len(call.query)


@contextmanager
def _for_gradients(module: Any) -> Any:
    """Autograd then keeps nothing for the weights and, on a GPU, where memory is short, nothing inside the blocks."""
    checkpoint = next(module.parameters()).device.type == "cuda" and not module.is_gradient_checkpointing
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    if checkpoint:
        module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if checkpoint:
            module.disable_gradient_checkpointing()
        for parameter in wanted:
            parameter.requires_grad_(True)


def _propagation(
    run: CalibrationRun,
    draft: Plan,
    output_changes: Tensor,
    steps_of: Sequence[Sequence[int]],
    sampling: Sampling,
) -> Tensor:
    """Squared change of the final latents over that of the transformer's output in one step, float64 [buckets].

    Some buckets are approximated alone, each in a generation of its own; in between, logarithms of the change per
    length of the steps are interpolated over the schedule.
    """
    measured = spread(sampling.propagation_runs, draft.buckets)
    lengths = -torch.tensor([*run.schedule, 0.0], dtype=torch.float64).diff()
    lengths = torch.stack([lengths[list(own)].square().mean() for own in steps_of]).clamp(min=1e-12)
    kept = run.checkpoint.load("propagation")
    found: list[float] = [] if kept is None else kept[0]["found"].tolist()
    with run.bar(len(measured), "calibration 4/4, propagation of steps", "run", len(found)) as bar:
        for bucket in measured[len(found) :]:
            reference = run.recorded()
            with apply(run.pipeline, _only_in(draft, bucket)), reference.replayed(steps_of[bucket][0]):
                change = float((run.generate_one(0) - reference.latents).double().square().sum())
            if not math.isfinite(change):
                raise InputError(
                    f"the pipeline in {run.pipeline.place[1]} makes latents that are not finite: "
                    "calibrate with it in float32 or bfloat16"
                )
            found.append(change / max(float(output_changes[bucket]) * len(steps_of[bucket]), 1e-30))
            run.checkpoint.save("propagation", {"found": torch.tensor(found, dtype=torch.float64)}, {})
            bar.update()
    gains = torch.tensor(found, dtype=torch.float64).clamp(min=1e-30) / lengths[measured]
    return _interpolated(measured, gains.log(), draft.buckets).exp() * lengths


def _interpolated(places: Sequence[int], values: Tensor, count: int) -> Tensor:
    """Values [places, ...] at every place of range(count), linear in between and constant outside."""
    return torch.stack([_between(places, values, place) for place in range(count)])


def _between(places: Sequence[int], values: Tensor, place: int) -> Tensor:
    """Linear interpolation, constant outside."""
    right = next((number for number, own in enumerate(places) if own >= place), len(places) - 1)
    left = max(right - 1, 0) if places[right] > place else right
    if left == right or place >= places[right]:
        return values[right]
    share = (place - places[left]) / (places[right] - places[left])
    return values[left] * (1 - share) + values[right] * share


def _only_in(plan: Plan, bucket: int) -> Plan:
    """The plan with all blocks computed in every other bucket; without the masks of those, which are most of it."""
    rows, columns = block_count(plan.grid.tokens, plan.block_q), block_count(plan.grid.tokens, plan.block_kv)
    everything = pack_bits(torch.ones(1, rows, columns, dtype=torch.bool))
    used, own = plan.mask_index[bucket].unique(return_inverse=True)
    index = torch.full_like(plan.mask_index, len(used))
    index[bucket] = own
    compensate = torch.zeros_like(plan.compensate)
    compensate[bucket] = plan.compensate[bucket]
    return replace(
        plan, mask_table=torch.cat((plan.mask_table[used.long()], everything)), mask_index=index, compensate=compensate
    )
