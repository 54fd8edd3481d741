"""Knowing the denoising step from the scheduler instance, exactly, also when caches skip attention calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Schedule:
    """Follows a diffusers scheduler by wrapping two methods of the instance; `remove()` takes the wrappers off.

    Attributes:
        step: the current denoising step, from 0.
        num_steps: the steps of the schedule in force.
    """

    def __init__(self, scheduler: Any, on_change: Callable[[Schedule], None]):
        self.scheduler = scheduler
        self.step = 0
        self.num_steps = 1
        set_timesteps, step = scheduler.set_timesteps, scheduler.step

        # functools.wraps keeps the signatures, which pipelines inspect.
        @functools.wraps(set_timesteps)
        def start(*args: Any, **kwargs: Any) -> Any:
            result = set_timesteps(*args, **kwargs)
            self.step, self.num_steps = 0, len(scheduler.timesteps)
            on_change(self)
            return result

        @functools.wraps(step)
        def advance(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.step = min(self.step + 1, self.num_steps - 1)
            on_change(self)
            return result

        scheduler.set_timesteps, scheduler.step = start, advance

    def remove(self) -> None:
        del self.scheduler.set_timesteps, self.scheduler.step
