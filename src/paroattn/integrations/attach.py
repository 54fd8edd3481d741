"""Attaching intercepts to a pipeline: what applying a plan, calibrating and observing have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from paroattn.errors import InputError
from paroattn.grid import TokenGrid
from paroattn.integrations.descriptors import describe
from paroattn.integrations.pipeline import Pipeline
from paroattn.integrations.rebind import Intercept, is_rebound, rebind
from paroattn.integrations.schedule import Schedule

OnForward = Callable[[TokenGrid | None, Tensor], None]
"""Called before each forward pass of a transformer with its token grid (None: its visual tokens are no single box) and
its `hidden_states`; may raise."""


class Attachment:
    """Intercepts in place of the self-attention of a pipeline's transformers, until `remove()`.

    Args:
        pipe: a diffusers pipeline.
        intercepts: one per self-attention layer; the layers of a second transformer follow those of the first.
        on_forward: see `OnForward`; default: nothing.
        on_step: called whenever the denoising step changes; default: nothing.
    """

    def __init__(
        self,
        pipe: Any,
        intercepts: Sequence[Intercept],
        on_forward: OnForward = lambda grid, hidden_states: None,
        on_step: Callable[[Schedule], None] = lambda schedule: None,
    ):
        self._pipeline = Pipeline(pipe)
        self._on_forward = on_forward
        modules = self._pipeline.layers
        if any(is_rebound(module.processor) for own in modules for module in own):
            raise InputError("paroattn is already applied to this pipeline; call remove() on its handle first")
        remaining = iter(intercepts)
        rebound = [[rebind(module.processor, next(remaining)) for module in own] for own in modules]
        self.schedule = Schedule(self._pipeline.scheduler, on_step)
        self._originals: list[tuple[Any, Any]] = []
        self._hooks: list[Any] = []
        for number, (own, processors) in enumerate(zip(modules, rebound, strict=True)):
            installed = list(zip(own, processors, strict=True))
            for module, processor in installed:
                self._originals.append((module, module.processor))
                module.processor = processor
            self._hooks.append(self._pipeline.hook_before(number, self._watcher(number, installed)))
        self._attached = True

    def remove(self) -> None:
        """Put everything back; a second call does nothing."""
        if not self._attached:
            return
        self._attached = False
        self.schedule.remove()
        for hook in self._hooks:
            hook.remove()
        for module, processor in self._originals:
            module.processor = processor

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _watcher(self, number: int, installed: list[tuple[Any, Any]]) -> Any:
        """Looks at each forward call of a transformer before it runs."""
        transformer = self._pipeline.transformers[number]
        descriptor, config = describe(transformer), transformer.config
        names = list(inspect.signature(type(transformer).forward).parameters)[1:]

        def before_forward(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            if torch.compiler.is_compiling():
                # A transformer compiled in place is watched from within its graph, where only shapes are known.
                if not descriptor.box_from_values:
                    self._on_forward(descriptor.grid(config, arguments), arguments["hidden_states"])
                return
            if self._pipeline.scheduler is not self.schedule.scheduler:
                raise InputError("the pipeline's scheduler was replaced after paroattn was applied; apply again")
            if any(module.processor is not processor for module, processor in installed):
                raise InputError(
                    "the transformer's attention processors were replaced after paroattn was applied (by fusing "
                    "projections or loading an adapter, say); call remove() on its handle and apply again"
                )
            self.schedule.observe(arguments.get("timestep"))
            self._on_forward(descriptor.grid(config, arguments), arguments["hidden_states"])

        return before_forward
