"""Generating from calibration prompts while every attention call is looked at."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from paroattn.calibration import gpu
from paroattn.calibration.capture import Accumulator
from paroattn.calibration.checkpoint import Checkpoint, fingerprint, weights_fingerprint
from paroattn.calibration.costs import LEVELS
from paroattn.calibration.kernels import REFERENCE, Kernels
from paroattn.calibration.recording import Recording
from paroattn.errors import InputError
from paroattn.grid import TokenGrid
from paroattn.integrations.attach import Forward
from paroattn.integrations.observe import ObservedCall, observe
from paroattn.integrations.pipeline import Pipeline
from paroattn.integrations.schedule import Schedule
from paroattn.keep import check_density, check_reachable
from paroattn.ops.gpu.device import unavailable, unsupported
from paroattn.plan import bucket_of

Prompt = str | Mapping[str, Any]
Accumulators = TypeVar("Accumulators", bound=tuple[Accumulator, ...])


@dataclass(frozen=True)
class Sampling:
    """How much of a pipeline's attention calibration looks at.

    Attributes:
        samples: of each step and layer, of which guidance has two; None for all.
        order_steps: denoising steps at which orders are compared: they are stable over steps (paper, section 4.1).
        order_rows: share of the rows of blocks at which they are.
        order_levels: densities at which they are.
        cost_steps: steps of each step bucket in which costs are measured; None for all.
        cost_rows: share of a block's rows that stand for it in its costs.
        costs_in_bytes: keep a cost in one byte instead of two.
        error_rows: share of the rows of blocks at which errors are measured.
        change_rows: share of the rows of blocks at which steps are compared.
        sensitivity_steps: step buckets with backward passes, None for all; the others are interpolated.
        cotangents: backward passes per recorded call; each averages over all elements of a head's output.
        propagation_runs: step buckets that are approximated alone; the others are interpolated.
    """

    samples: int | None
    order_steps: int
    order_rows: float
    order_levels: tuple[float, ...]
    cost_steps: int | None
    cost_rows: float
    costs_in_bytes: bool
    error_rows: float
    change_rows: float
    sensitivity_steps: int | None
    cotangents: int
    propagation_runs: int


THOROUGH = Sampling(
    samples=None,
    order_steps=3,
    order_rows=0.1,
    order_levels=LEVELS,
    cost_steps=None,
    cost_rows=1.0,
    costs_in_bytes=False,
    error_rows=1.0,
    change_rows=0.05,
    sensitivity_steps=None,
    cotangents=2,
    propagation_runs=8,
)
QUICK = Sampling(
    samples=1,
    order_steps=1,
    order_rows=0.03,
    order_levels=(0.06, 0.15, 0.3, 0.5),
    cost_steps=1,
    cost_rows=0.25,
    costs_in_bytes=True,
    error_rows=1 / 16,
    change_rows=0.02,
    sensitivity_steps=2,
    cotangents=1,
    propagation_runs=3,
)


class CalibrationRun:
    """Generates from all prompts with the model's own attention, handing every attention call to a function.

    Args:
        pipe: a diffusers pipeline.
        prompts: strings, or mappings of pipeline arguments.
        densities: that plans will be selected for; checked as soon as the grid is known.
        seed: of the initial noise; prompt i uses seed + i.
        call_arguments: passed to every call of the pipeline.
        progress: show bars on stderr.
        checkpoint: where finished generations are kept; default: nowhere.
        samples: how many of each step and layer are looked at; None for all.

    Attributes:
        identity: of the pipeline's transformers.
        grid: the token grid, known once something was generated; its text tokens are the first prompt's.
        schedule: noise levels of the denoising steps of a generation, known then, too.
        seconds: that each part took so far.
        forwards: calls of transformers so far, while measuring.
    """

    grid: TokenGrid
    schedule: tuple[float, ...]

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Prompt],
        densities: Sequence[float],
        seed: int,
        call_arguments: Mapping[str, Any],
        progress: bool,
        checkpoint: Checkpoint | None = None,
        samples: int | None = None,
    ):
        if isinstance(prompts, (str, Mapping)) or not prompts:
            raise InputError(f"prompts is {prompts!r}; expected a list of at least one prompt")
        for density in densities:
            check_density(density)
        self.pipeline = Pipeline(pipe)
        if any(parameter.is_inference() for item in self.pipeline.transformers for parameter in item.parameters()):
            raise InputError("weights were made in torch.inference_mode(); load the pipeline outside to calibrate it")
        self.checkpoint = checkpoint or Checkpoint()
        self.identity = self.pipeline.identity
        self._prompts = prompts
        self._densities = densities
        self._seed = seed
        self._call_arguments = call_arguments
        self._progress = progress
        self._samples = samples
        self.seconds: dict[str, float] = {}
        self.forwards = 0
        self._recording = Recording(self.pipeline)
        self._called: set[tuple[int, int]] = set()  # (denoising step, layer)

    @property
    def num_steps(self) -> int:
        return len(self.schedule)

    def steps_of(self, edges: tuple[float, ...], count: int | None) -> set[tuple[int, int]]:
        """At most `count` steps, spread evenly, of each layer in each step bucket: pairs of a step and a layer.

        Steps that no generation has reached yet are taken to call all layers.
        """
        reached = max((step for step, _ in self._called), default=-1)
        later = {(step, layer) for step in range(reached + 1, self.num_steps) for layer in range(self.identity.layers)}
        found: dict[tuple[int, int], list[int]] = {}
        for step, layer in sorted(self._called | later):
            found.setdefault((bucket_of(edges, step, self.num_steps), layer), []).append(step)
        return {
            (steps[place], layer)
            for (_, layer), steps in found.items()
            for place in spread(count or len(steps), len(steps))
        }

    def usage(self, edges: tuple[float, ...]) -> Tensor:
        """Share of each step bucket's steps in which each layer was called, float32 [buckets, layers]."""
        return usage_of(self._called, edges, self.num_steps, self.identity.layers)

    def measure(
        self,
        part: str,
        description: str,
        make: Callable[[], Accumulators],
        take: Callable[[Accumulators, ObservedCall], None],
        last_step: Callable[[int], int] | None = None,
        on_step: Callable[[int], None] = lambda step: None,
        record: bool = False,
    ) -> Accumulators:
        """Generate from all prompts and add up their attention calls; from those that are not done, if some are.

        Args:
            part: its name in the checkpoint, saved after each prompt.
            description: of the bar.
            make: the accumulators; called when the grid and the number of steps are known.
            take: adds a call to them.
            last_step: the last step that is looked at, of so many; generations are then broken off. None for all.
            on_step: called with each step that begins, also with that at which a generation is broken off.
            record: keep the first prompt's generation, which `recorded` then returns.
        """
        found: list[Accumulators] = []
        done = self._resume(part, make, found)
        if done == len(self._prompts):
            return found[0]

        taken: Counter[tuple[int, int]] = Counter()

        def add(call: ObservedCall) -> None:
            place = (call.step, call.layer)
            self._called.add(place)
            if not found:
                found.append(make())
            wanted = None if self._samples is None else max(0, self._samples - taken[place])
            taken[place] += len(call.query)
            if wanted != 0:
                take(found[0], call.first(wanted))

        with self.bar(len(self._prompts), description, "prompt", done) as bar:

            def follow(schedule: Schedule) -> None:
                self._check_schedule(schedule)
                self._recording.follow(schedule.step)
                on_step(schedule.step)
                if last_step is not None and schedule.step > last_step(schedule.num_steps):
                    raise _BrokenOffError
                bar.set_postfix_str(f"step {schedule.step + 1}/{schedule.num_steps}")

            watch: dict[str, Any] = {"on_forward": self._begin_forward, "on_step": follow, "on_unseen": _refuse_unseen}
            with observe(self.pipeline, add, **watch):
                for number in range(done, len(self._prompts)):
                    taken.clear()
                    kept = record and number == 0
                    with suppress(_BrokenOffError), self._recording.running() if kept else nullcontext():
                        latents = self.generate_one(number)
                        if kept:
                            self._recording.latents = latents
                    self._keep(part, number + 1, found[0])
                    bar.update()
        return found[0]

    def recorded(self) -> Recording:
        """The first prompt's generation, which runs now if it was not recorded before."""
        if not hasattr(self._recording, "latents"):

            def follow(schedule: Schedule) -> None:
                self._recording.follow(schedule.step)

            with (
                observe(self.pipeline, lambda call: None, on_forward=self._recording.before, on_step=follow),
                self._recording.running(),
            ):
                self._recording.latents = self.generate_one(0)
        return self._recording

    def _keep(self, part: str, done: int, accumulators: tuple[Accumulator, ...]) -> None:
        tensors = {
            f"{number}.{name}": tensor
            for number, accumulator in enumerate(accumulators)
            for name, tensor in accumulator.state().items()
        }
        facts = {"done": done, "grid": self.grid.as_json(), "schedule": self.schedule, "called": sorted(self._called)}
        self.checkpoint.save(part, tensors, facts)

    def _resume(self, part: str, make: Callable[[], Accumulators], found: list[Accumulators]) -> int:
        """Put back what was kept of a part into `found`; returns the number of prompts that are done."""
        kept = self.checkpoint.load(part)
        if kept is None:
            return 0
        tensors, facts = kept
        self.grid, self.schedule = TokenGrid(**facts["grid"]), tuple(facts["schedule"])
        self._called |= {(step, layer) for step, layer in facts["called"]}
        found.append(make())
        for number, accumulator in enumerate(found[0]):
            own = f"{number}."
            accumulator.restore({key[len(own) :]: value for key, value in tensors.items() if key.startswith(own)})
        return facts["done"]

    def _begin_forward(self, forward: Forward) -> None:
        self._recording.before(forward)
        grid = forward.grid
        assert grid is not None  # observe refuses others
        known: TokenGrid = getattr(self, "grid", grid)
        if replace(known, text_tokens=grid.text_tokens) != grid:
            raise InputError(f"prompts give different token grids: {known}, then {grid}")
        for density in self._densities:
            check_reachable(density, known)
        self.grid = known
        self.forwards += 1

    def _check_schedule(self, schedule: Schedule) -> None:
        known: tuple[float, ...] = getattr(self, "schedule", schedule.levels)
        if schedule.levels != known:
            raise InputError(
                f"prompts run different schedules: {len(known)} steps from noise level {known[0]:.3f}, then "
                f"{schedule.num_steps} from {schedule.levels[0]:.3f}; give all as many steps and one strength"
            )
        self.schedule = known

    @property
    def prompt_count(self) -> int:
        return len(self._prompts)

    def generate_one(self, number: int, output_type: str = "latent") -> Tensor:
        """Generate from one prompt with whatever the pipeline has attached; returns the final latents, or frames in
        [0, 1] with output_type "pt".
        """
        prompt = self._prompts[number]
        arguments = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        generator = torch.Generator().manual_seed(self._seed + number)
        call = {**self._call_arguments, **arguments, "generator": generator, "output_type": output_type}
        return self.pipeline.generate(**call)

    @contextmanager
    def bar(self, total: int, description: str, unit: str, done: int = 0) -> Iterator[tqdm]:
        """A progress bar of a part, whose time is noted."""
        with (
            self.timed(description.rpartition(", ")[2]),
            tqdm(total=total, initial=done, desc=description, unit=unit, disable=not self._progress) as bar,
        ):
            yield bar

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of what runs within to `seconds`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def say(self, line: str) -> None:
        """A line on stderr, beside the bars."""
        if self._progress:
            tqdm.write(line, file=sys.stderr)

    def say_where_time_went(self) -> None:
        """One line on stderr, longest part first."""
        parts = sorted(self.seconds.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts)
        self.say(f"calibration measured for {sum(self.seconds.values()):.1f} s: {listed}")

    def provenance(self, method: str, prompt_texts: Sequence[str] | None) -> dict[str, Any]:
        """What a plan records of every calibration; `prompt_texts` replace the prompts where those are embeddings."""
        texts = [prompt if isinstance(prompt, str) else prompt.get("prompt") for prompt in self._prompts]
        return {
            "paroattn": version("paroattn"),
            "method": method,
            "prompts": list(prompt_texts) if prompt_texts else texts,
            "seed": self._seed,
            "num_inference_steps": self.num_steps,
        }


class _BrokenOffError(Exception):
    """Ends a generation whose other steps are not looked at."""


def usage_of(called: Iterable[tuple[int, int]], edges: tuple[float, ...], num_steps: int, layers: int) -> Tensor:
    """Share of each step bucket's steps in which each layer was called, float32 [buckets, layers].

    called: pairs of a denoising step and a layer.
    """
    buckets = torch.tensor([bucket_of(edges, step, num_steps) for step in range(num_steps)])
    calls = torch.zeros(len(edges), layers, dtype=torch.float32)
    for step, layer in called:
        calls[buckets[step], layer] += 1
    return calls / buckets.bincount(minlength=len(edges)).unsqueeze(1)


def check_orders(order_names: Sequence[str] | None) -> None:
    """Raise `InputError` for what is no list of candidate orders; None stands for all."""
    if order_names is not None and (isinstance(order_names, str) or not len(order_names)):
        raise InputError(f"order_names is {order_names!r}; expected a list of at least one, or None for all")


def _refuse_unseen(reason: str) -> None:
    raise InputError(f"this pipeline cannot be calibrated: {reason}; use prompts and settings without")


def calibration_checkpoint(
    work_dir: str | os.PathLike[str] | None,
    pipeline: Pipeline,
    method: str,
    prompts: Sequence[Prompt],
    seed: int,
    call_arguments: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> Checkpoint:
    """The checkpoint in `work_dir` (None: nowhere) of a calibration with these arguments of this pipeline."""
    if work_dir is None:
        return Checkpoint()
    found = fingerprint(
        paroattn=version("paroattn"),
        model=asdict(pipeline.identity),
        weights=weights_fingerprint(pipeline.transformers),
        scheduler=[type(pipeline.scheduler).__name__, str(dict(pipeline.scheduler.config))],
        method=method,
        prompts=prompts,
        seed=seed,
        call_arguments=call_arguments,
        arguments=arguments,
    )
    return Checkpoint(Path(work_dir), found)


def calibration_kernels(device: torch.device) -> Kernels:
    """What computes calibration's statistics on a device: the Triton kernels on a GPU that they have, else PyTorch."""
    if device.type != "cuda" or unavailable() or unsupported(device):
        return REFERENCE
    return gpu.KERNELS


def spread(count: int, total: int) -> list[int]:
    """At most `count` different numbers spread evenly over range(total), ascending.

    Example:
        >>> spread(3, 6)
        [1, 3, 5]
    """
    return sorted({(2 * part + 1) * total // (2 * count) for part in range(count)})
