"""The noise levels that a pipeline runs through, read from what its transformer is handed at each forward call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paroattn.integrations.descriptors import ModelDescriptor

_SAME = 1e-6  # levels that differ by less are one step's


class Schedule:
    """Where a generation is, for those that look at a pipeline step by step.

    Calls at the same noise level are one step, also where rounding to 16 bits gives several the same. A second-order
    scheduler takes two steps of this count for most of its own.

    Attributes:
        levels: the noise levels of the generation in progress, descending; of image-to-image only those that it runs.
        step: the current denoising step, from 0.
    """

    def __init__(self) -> None:
        self.levels: tuple[float, ...] = ()
        self.step = 0

    @property
    def num_steps(self) -> int:
        """Steps of the generation in progress."""
        return len(self.levels)

    @property
    def level(self) -> float:
        """The current noise level."""
        return self.levels[self.step]

    def follow(self, descriptor: ModelDescriptor, timestep: Tensor | float, scheduler: Any) -> bool:
        """Take note of a forward call; whether it begins another step.

        scheduler: has the list of timesteps to come; it is read at a generation's first call.
        """
        level = float(descriptor.level(timestep))
        place = _place(level, self.levels, self.step)
        if place is None:
            ahead = _levels_ahead(descriptor, timestep, scheduler)
            begin = _place(level, ahead, 0)
            if begin is not None:
                self.levels, place = ahead[begin:], 0
            elif self.levels and level < self.levels[-1]:  # of a pipeline that does not take its scheduler's timesteps
                self.levels, place = (*self.levels, level), self.num_steps
            else:
                self.levels, place = (level,), 0
            self.step = place
            return True
        moved = place != self.step
        self.step = place
        return moved


def _place(level: float, levels: tuple[float, ...], start: int) -> int | None:
    return next((place for place in range(start, len(levels)) if abs(levels[place] - level) < _SAME), None)


def _levels_ahead(descriptor: ModelDescriptor, timestep: Tensor | float, scheduler: Any) -> tuple[float, ...]:
    """Different levels of the scheduler's timesteps, rounded as the transformer gets them."""
    dtype = timestep.dtype if isinstance(timestep, Tensor) else torch.float64
    timesteps = scheduler.timesteps.cpu()
    whole = scheduler.config.get("num_train_timesteps")  # None where they are what the transformer is handed
    if whole is not None and descriptor.ascending and not scheduler.config.get("invert_sigmas"):
        timesteps = whole - timesteps  # as the pipeline turns them round
    timesteps = timesteps.to(dtype)
    if whole is not None and descriptor.timestep_range == 1:
        timesteps = timesteps / whole
        if bool((timesteps > 1).any()):  # sigmas beyond 1, of which Cosmos is handed the share of noise
            timesteps = timesteps / (1 + timesteps)
    levels = torch.stack([descriptor.level(timestep) for timestep in timesteps])
    return tuple(torch.unique_consecutive(levels).tolist())
