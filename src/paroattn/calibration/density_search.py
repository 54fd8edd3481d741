"""The density that reaches a quality or a speed, found by generating from the calibration prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from paroattn.calibration.run import CalibrationRun
from paroattn.errors import InputError, PlanError
from paroattn.integrations.apply import apply
from paroattn.integrations.clock import TransformerClock
from paroattn.plan import Plan

TRIES = 6  # halvings of the range of densities: the last is 1/64 of it wide


@dataclass(frozen=True)
class Goal:
    """What a plan should reach; exactly one of the two.

    Attributes:
        psnr: in dB, at least, of what the pipeline generates against its own attention, over the calibration prompts.
        speed_up: of the time in the transformer, at least, on this machine.

    Raises:
        InputError: both or neither, or a number that makes no sense.
    """

    psnr: float | None = None
    speed_up: float | None = None

    def __post_init__(self) -> None:
        if (self.psnr is None) == (self.speed_up is None):
            raise InputError("expected either target_psnr or target_speed_up")
        if self.psnr is not None and not (math.isfinite(self.psnr) and self.psnr > 0):
            raise InputError(f"target_psnr is {self.psnr!r}; expected decibels above 0")
        if self.speed_up is not None and not (math.isfinite(self.speed_up) and self.speed_up >= 1):
            raise InputError(f"target_speed_up is {self.speed_up!r}; expected a factor of at least 1")


def reach(run: CalibrationRun, goal: Goal, select: Callable[[float], Plan], least: float) -> Plan:
    """The sparsest plan of a quality, or the densest of a speed.

    Args:
        run: generates from the calibration prompts.
        goal: what to reach.
        select: the plan of a density.
        least: the least density that `select` takes.

    Raises:
        PlanError: even all blocks, or as few as possible, do not reach it; the message says what was measured.
    """
    low, high = least, 1.0
    if goal.psnr is not None:
        name, wanted, measure, extreme = "PSNR", goal.psnr, _quality(run), high
    else:
        assert goal.speed_up is not None
        name, wanted, measure, extreme = "speed-up", goal.speed_up, _speed(run), low
    with run.bar(TRIES + 1, f"aiming at {name} {wanted:g}", "try") as bar:

        def tried(density: float) -> tuple[Plan, float]:
            plan = select(density)
            value = measure(plan)
            bar.set_postfix_str(f"density {density:.3f}: {value:.2f}")
            bar.update()
            return plan, value

        best, value = tried(extreme)
        if value < wanted:
            raise PlanError(
                f"{name} {wanted:g} cannot be reached: at density {extreme:.3f} it is {value:.2f}. Ask for less"
                + (", or for a more exact precision." if goal.psnr is not None else ", or for a lower precision.")
            )
        for _ in range(TRIES):
            middle = (low + high) / 2
            plan, found = tried(middle)
            if found >= wanted:
                best, value = plan, found
            # Quality rises with density, speed falls: a plan that is good enough moves one of the ends.
            if (found >= wanted) == (goal.psnr is not None):
                high = middle
            else:
                low = middle
    reached = {f"target {name}": wanted, f"measured {name}": round(value, 3)}
    quality = {"psnr": round(value, 3)} if goal.psnr is not None and math.isfinite(value) else {}
    return replace(best, provenance={**best.provenance, **reached}, quality={**best.quality, **quality})


def _quality(run: CalibrationRun) -> Callable[[Plan], float]:
    """PSNR in dB, the mean over the prompts: of frames in [0, 1], or of latents, whose range is the peak."""
    output_type = "pt" if run.pipeline.makes_frames else "latent"
    prompts = range(run.prompt_count)
    references = [run.generate_one(number, output_type=output_type) for number in prompts]

    def measure(plan: Plan) -> float:
        with apply(run.pipeline, plan, strict=True):
            outputs = [run.generate_one(number, output_type=output_type) for number in prompts]
        peaks = [1.0 if output_type == "pt" else float(latents.max() - latents.min()) for latents in references]
        return sum(map(_psnr, outputs, references, peaks)) / len(references)

    return measure


def _psnr(output: Tensor, reference: Tensor, peak: float) -> float:
    error = float((output.double() - reference.double()).square().mean())
    return 10 * math.log10(peak**2 / error) if error else math.inf


def _speed(run: CalibrationRun) -> Callable[[Plan], float]:
    """How many times faster the transformer is, against a generation with its own attention just before."""

    def seconds() -> float:
        with TransformerClock(*run.pipeline.transformers) as clock:
            run.generate_one(0)
        return clock.seconds

    seconds()  # the first call of a process may compile or allocate

    def measure(plan: Plan) -> float:
        full = seconds()
        with apply(run.pipeline, plan, strict=True):
            return full / seconds()

    return measure
