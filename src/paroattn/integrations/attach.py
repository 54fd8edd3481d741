"""Attaching intercepts to a pipeline: the part that applying a plan and calibrating have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paroattn.grid import TokenGrid
from paroattn.integrations.descriptors import TRANSFORMERS, attention_modules, describe, transformers_of
from paroattn.integrations.rebind import Intercept, is_rebound, rebind
from paroattn.integrations.schedule import Schedule

OnCall = Callable[[TokenGrid | None, Tensor], None]
"""Called before each forward pass of a transformer with its token grid (None: its visual tokens are no single box) and
its `hidden_states`; may raise."""


class Attachment:
    """Intercepts in place of the self-attention of a pipeline's transformers, until `remove()`.

    Args:
        pipe: a diffusers pipeline.
        intercepts: one per self-attention layer; the layers of a second transformer follow those of the first.
        on_call: see `OnCall`.
        on_step: called whenever the denoising step changes.
    """

    def __init__(
        self,
        pipe: Any,
        intercepts: Sequence[Intercept],
        on_call: OnCall,
        on_step: Callable[[Schedule], None],
    ):
        self._pipe = pipe
        self._on_call = on_call
        self._originals: list[tuple[Any, Any]] = []
        self._hooks: list[Any] = []
        transformers = transformers_of(pipe)
        modules = [attention_modules(transformer) for transformer in transformers]
        if any(is_rebound(module.processor) for own in modules for module in own):
            raise ValueError("paroattn is already applied to this pipeline; call remove() on its handle first")
        remaining = iter(intercepts)
        rebound = [[rebind(module.processor, next(remaining)) for module in own] for own in modules]
        self.schedule = Schedule(pipe.scheduler, on_step)
        for transformer, own, processors in zip(transformers, modules, rebound, strict=True):
            for module, processor in zip(own, processors, strict=True):
                self._originals.append((module, module.processor))
                module.processor = processor
            self._hooks.append(self._watch(transformer, list(zip(own, processors, strict=True))))
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

    def _watch(self, transformer: Any, installed: list[tuple[Any, Any]]) -> Any:
        """Look at each forward call of a transformer before it runs."""
        descriptor, config = describe(transformer), transformer.config
        names = list(inspect.signature(type(transformer).forward).parameters)[1:]

        def before_forward(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            if torch.compiler.is_compiling():
                # A transformer compiled in place is watched from within its graph, where only shapes are known.
                if not descriptor.box_from_values:
                    self._on_call(descriptor.grid(config, arguments), arguments["hidden_states"])
                return
            if self._pipe.scheduler is not self.schedule.scheduler:
                raise ValueError("the pipeline's scheduler was replaced after paroattn was applied; apply again")
            if any(module.processor is not processor for module, processor in installed):
                raise ValueError(
                    "the transformer's attention processors were replaced after paroattn was applied (by fusing "
                    "projections or loading an adapter, say); call remove() on its handle and apply again"
                )
            self.schedule.observe(arguments.get("timestep"))
            self._on_call(descriptor.grid(config, arguments), arguments["hidden_states"])

        # A compiled transformer is a module around the original one; watched there, this code is not compiled.
        own = [getattr(self._pipe, name, None) for name in TRANSFORMERS]
        outer = next(item for item in own if item is not None and getattr(item, "_orig_mod", item) is transformer)
        return outer.register_forward_pre_hook(before_forward, with_kwargs=True)
