"""Seconds spent in transformers, whatever a pipeline does around it."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch
from torch import nn


def now(device: torch.device) -> float:
    """Seconds of the host's clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class TransformerClock:
    """Adds up the time of calls of one or more modules, inside a `with` block.

    Attributes:
        seconds: so far; on CUDA until the device has finished.
        launch_seconds: of these, until the modules returned: what the CPU took to hand a GPU its work.

    Example:
        >>> with TransformerClock(module := nn.Linear(4, 4)) as clock:
        ...     _ = module(torch.ones(4))
        >>> clock.seconds > 0
        True
    """

    def __init__(self, *modules: nn.Module):
        self._modules = modules
        self.seconds = self.launch_seconds = 0.0
        self._start = 0.0
        self._hooks: list[Any] = []

    def __enter__(self) -> TransformerClock:
        self._hooks = [
            hook
            for module in self._modules
            for hook in (module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._end))
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: object) -> None:
        self._start = self._now()

    def _end(self, *_: object) -> None:
        self.launch_seconds += time.perf_counter() - self._start
        self.seconds += self._now() - self._start

    def _now(self) -> float:
        devices = (parameter.device for module in self._modules for parameter in module.parameters())
        return now(next((device for device in devices if device.type == "cuda"), torch.device("cpu")))
