"""The latents that a pipeline ends with, whatever it makes of them."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

from torch import Tensor


class FinalLatents:
    """Watches a scheduler inside a `with` block.

    Attributes:
        latents: what its last step gave, float32 on the CPU; None before.

    Example:
        >>> with FinalLatents(pipe.scheduler) as final:  # doctest: +SKIP
        ...     video = pipe(prompt="a cat").frames
        >>> final.latents.shape  # doctest: +SKIP
        torch.Size([1, 16, 21, 60, 104])
    """

    def __init__(self, scheduler: Any):
        self._scheduler = scheduler
        self._before = vars(scheduler).get("step")  # of a plan that is applied
        self._last: Any = None

    def __enter__(self) -> FinalLatents:
        own = self._scheduler.step

        @functools.wraps(own)  # keeps the signature, which pipelines inspect
        def step(*args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            self._last = result[0] if isinstance(result, tuple) else result.prev_sample
            return result

        self._scheduler.step = step
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is None:
            del self._scheduler.step
        else:
            self._scheduler.step = self._before

    @property
    def latents(self) -> Tensor | None:
        return None if self._last is None else self._last.detach().float().cpu()
