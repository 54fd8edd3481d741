"""Attaching intercepts to a pipeline: the part that applying a plan and calibrating have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from paroattn.grid import TokenGrid
from paroattn.integrations.descriptors import attention_modules, describe
from paroattn.integrations.rebind import Intercept, rebind
from paroattn.integrations.schedule import Schedule


def transformer_of(pipe: Any) -> nn.Module:
    """The transformer of a diffusers pipeline, or `ValueError`."""
    transformer = getattr(pipe, "transformer", None)
    if not isinstance(transformer, nn.Module) or getattr(pipe, "scheduler", None) is None:
        raise ValueError(
            f"pipe is a {type(pipe).__name__}; expected a diffusers pipeline with transformer and scheduler"
        )
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(f"{type(pipe).__name__} has two transformers; paroattn handles one so far (Wan 2.1)")
    return transformer


class Attachment:
    """Intercepts in place of a transformer's self-attention, until `remove()`.

    Args:
        pipe: a diffusers pipeline.
        intercepts: one per self-attention layer.
        on_grid: called with the token grid before each forward pass of the transformer; may raise.
        on_step: called whenever the denoising step changes.
    """

    def __init__(
        self,
        pipe: Any,
        intercepts: Sequence[Intercept],
        on_grid: Callable[[TokenGrid], None],
        on_step: Callable[[Schedule], None],
    ):
        transformer: Any = transformer_of(pipe)
        descriptor = describe(transformer)
        modules: list[Any] = attention_modules(transformer, descriptor)
        if any(hasattr(module.processor, "_paroattn_slot") for module in modules):
            raise ValueError("paroattn is already applied to this pipeline; call remove() on its handle first")
        rebound = [rebind(module.processor, intercept) for module, intercept in zip(modules, intercepts, strict=True)]
        signature = inspect.signature(type(transformer).forward)

        def before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if pipe.scheduler is not self.schedule.scheduler:
                raise ValueError("the pipeline's scheduler was replaced after paroattn was applied; apply again")
            arguments = signature.bind_partial(module, *args, **kwargs).arguments
            on_grid(descriptor.grid(transformer.config, arguments))

        self._originals = [(module, module.processor) for module in modules]
        for module, processor in zip(modules, rebound, strict=True):
            module.processor = processor
        self._hook = transformer.register_forward_pre_hook(before_forward, with_kwargs=True)
        self.schedule = Schedule(pipe.scheduler, on_step)
        self._attached = True

    def remove(self) -> None:
        """Put everything back; a second call does nothing."""
        if not self._attached:
            return
        self._attached = False
        self.schedule.remove()
        self._hook.remove()
        for module, processor in self._originals:
            module.processor = processor
