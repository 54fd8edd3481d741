"""Seconds spent in a transformer, whatever a pipeline does around it."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch
from torch import nn


class TransformerClock:
    """Adds up the time of a module's calls, inside a `with` block.

    Attributes:
        seconds: so far; on CUDA until the device has finished.

    Example:
        >>> with TransformerClock(nn.Linear(4, 4)) as clock:
        ...     _ = clock.module(torch.ones(4))
        >>> clock.seconds > 0
        True
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.seconds = 0.0
        self._start = 0.0
        self._hooks: list[Any] = []

    def __enter__(self) -> TransformerClock:
        self._hooks = [
            self.module.register_forward_pre_hook(self._begin),
            self.module.register_forward_hook(self._end),
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
        self.seconds += self._now() - self._start

    def _now(self) -> float:
        if any(parameter.is_cuda for parameter in self.module.parameters()):
            torch.cuda.synchronize()
        return time.perf_counter()
