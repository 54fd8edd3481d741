"""Knowing the denoising step from the scheduler instance, exactly, also when caches skip attention calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


class Schedule:
    """Follows a diffusers scheduler by wrapping methods of the instance; `remove()` takes the wrappers off.

    A second-order scheduler takes two steps of this count for most of its own: the count is the position in its list
    of timesteps.

    Attributes:
        step: the current denoising step, from 0.
        num_steps: the steps of the schedule in force, those that image-to-image leaves out counted.
    """

    def __init__(self, scheduler: Any, on_change: Callable[[Schedule], None]):
        self.scheduler = scheduler
        self.step = 0
        self.num_steps = 1
        self._on_change = on_change
        self._known = True  # False from the start of a schedule until its first step is known
        self._wrapped = ["set_timesteps", "step"]
        if hasattr(scheduler, "set_begin_index"):
            self._wrapped.append("set_begin_index")
        followers = {"set_timesteps": self._started, "set_begin_index": self._begins, "step": self._stepped}
        for name in self._wrapped:
            setattr(scheduler, name, self._followed(getattr(scheduler, name), followers[name]))

    def remove(self) -> None:
        for name in self._wrapped:
            delattr(self.scheduler, name)

    def observe(self, timestep: Tensor | float | None) -> None:
        """The timestep of the first call of the transformer, for pipelines that skip steps without telling the
        scheduler; looked at once per schedule, since it asks the device for a value.
        """
        if self._known or timestep is None:
            return
        self._known = True
        value = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        timesteps = self.scheduler.timesteps.double().cpu()
        distances = [(timesteps - candidate).abs() for candidate in (value, value * 1000)]  # some models take t / 1000
        nearest = min(distances, key=lambda distance: float(distance.min()))
        self._set(int(nearest.argmin()))

    def _followed(self, method: Any, follow: Callable[..., None]) -> Any:
        @functools.wraps(method)  # keeps the signature, which pipelines inspect
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            follow(*args, **kwargs)
            return result

        return wrapper

    def _started(self, *_: Any, **__: Any) -> None:
        self.num_steps = len(self.scheduler.timesteps)
        self._known = False
        self._set(0)

    def _begins(self, begin_index: int = 0) -> None:
        self._known = True
        self._set(begin_index)

    def _stepped(self, *_: Any, **__: Any) -> None:
        self._known = True
        own = getattr(self.scheduler, "step_index", None)  # of the next step; not every scheduler has it
        self._set(self.step + 1 if own is None else own)

    def _set(self, step: int) -> None:
        self.step = min(step, self.num_steps - 1)
        self._on_change(self)
