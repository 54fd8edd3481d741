"""Where in the schedule a model evaluation is: within start and end, and in the part that the plan has for a model.

The step bucket needs none of this: the runner takes it from sigma, which says where a step is in any sampler, slice of
a schedule or number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paroattn import Plan, PlanError


def is_whole(start: float, end: float) -> bool:
    """Whether start and end leave nothing out, so that no sigma has to be read."""
    return start == 0 and end == 1


def within(start: float, end: float, sampling: Any, sigma: Tensor) -> bool:
    """Whether an evaluation lies between start and end of the schedule, both included, as ComfyUI counts them.

    This waits for the value of sigma. ComfyUI does so, too, for conditioning with a start and an end.

    Args:
        start, end: shares of the whole schedule.
        sampling: ComfyUI's model sampling, whose `percent_to_sigma` knows the shift.
        sigma: of the evaluation, [1] or more.
    """
    value = float(sigma.max())
    return sampling.percent_to_sigma(end) <= value <= sampling.percent_to_sigma(start)


def check_part(plan: Plan, layers: range, part: str, sigmas: Sequence[float]) -> None:
    """Raise `PlanError` if the plan never called these layers at the noise levels that a sampler is about to run.

    Only plans of two models have such layers; this finds a model and a part that were mixed up.

    Args:
        plan: the plan.
        layers: its layers that the model has.
        part: as the node's input has it.
        sigmas: of the sampler's slice of the schedule, its end included.
    """
    called = (plan.usage[:, layers.start : layers.stop] > 0).any(1)
    run = [float(sigma) for sigma in sigmas[:-1]]
    if not run or bool(called[[plan.bucket_of(sigma) for sigma in run]].any()):
        return
    edges = (1.0, *plan.bucket_levels, 0.0)
    own = torch.nonzero(called).flatten().tolist()
    raise PlanError(
        f"part is {part!r}, but this sampler runs noise levels {run[0]:.3f} to {run[-1]:.3f}; in the plan that part "
        f"runs from {edges[own[0]]:.3f} to {edges[own[-1] + 1]:.3f}. Choose the other part, or check which steps this "
        "sampler runs."
    )
