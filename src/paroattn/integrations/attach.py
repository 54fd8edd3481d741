"""Attaching intercepts to a pipeline: what applying a plan, calibrating and observing have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paroattn.errors import InputError
from paroattn.grid import TokenGrid
from paroattn.integrations.descriptors import ModelDescriptor, describe
from paroattn.integrations.parallel import sharing_of
from paroattn.integrations.pipeline import Pipeline
from paroattn.integrations.rebind import (
    CallShape,
    ExchangeOf,
    Intercept,
    is_rebound,
    no_exchange,
    rebind,
    refuse_copies,
    released,
)


class Forward(NamedTuple):
    """A forward call of a transformer that is about to run.

    Attributes:
        transformer: its number.
        descriptor: of its class.
        arguments: by name.
        grid: of its tokens; None if its visual tokens form no boxes.
    """

    transformer: int
    descriptor: ModelDescriptor
    arguments: dict[str, Any]
    grid: TokenGrid | None

    @property
    def latents(self) -> Tensor:
        """The latents; the first ones where there is a list."""
        found = self.descriptor.latents_of(self.arguments)
        while not isinstance(found, Tensor):
            found = found[0]
        return found

    @property
    def timestep(self) -> Tensor:
        return self.descriptor.timestep_of(self.arguments)


OnForward = Callable[[Forward], None]
"""Called before each forward call of a transformer; may raise."""


class Attachment:
    """Intercepts in place of the self-attention of a pipeline's transformers, until `remove()`.

    Args:
        pipe: a diffusers pipeline.
        intercepts: one per self-attention layer; the layers of a second transformer follow those of the first.
        on_forward: see `OnForward`.
        after_forward: called with the transformer's number when a forward call has ended, also by an error.
        after_call: called when a call of the pipeline has ended, with whether it did so without an error.
        exchanges: of the layers, where intercepts can do with a transformer that ranks share.

    Raises:
        InputError: paroattn is attached already, or a processor cannot be taken over; nothing is changed then. While
            generating: a transformer or a processor was replaced meanwhile.
    """

    def __init__(
        self,
        pipe: Any,
        intercepts: Sequence[Intercept],
        on_forward: OnForward,
        after_forward: Callable[[int], None] = lambda transformer: None,
        after_call: Callable[[bool], None] = lambda succeeded: None,
        exchanges: Sequence[ExchangeOf] | None = None,
    ):
        self._pipeline = Pipeline(pipe)
        self._after_call = after_call
        modules = self._pipeline.layers
        if any(is_rebound(module.processor) for own in modules for module in own):
            raise InputError("paroattn is already applied to this pipeline; call remove() on its handle first")
        given = zip(intercepts, exchanges or [no_exchange] * len(intercepts), strict=True)
        rebound = []
        for transformer, own in zip(self._pipeline.transformers, modules, strict=True):
            shape = _shape_of_calls(describe(transformer))
            pairs = [(module, *next(given)) for module in own]
            rebound.append([rebind(module.processor, at, shape, exchange) for module, at, exchange in pairs])
        self._installed: list[tuple[Any, Any, Any]] = []  # module, its own processor, the rebound one
        self._hooks: list[Any] = []
        self._attached = True
        try:
            for number, (own, processors) in enumerate(zip(modules, rebound, strict=True)):
                installed = list(zip(own, processors, strict=True))
                for module, processor in installed:
                    self._installed.append((module, module.processor, processor))
                    module.processor = processor
                transformer = self._pipeline.transformers[number]
                watcher = _Watcher(number, transformer, installed, on_forward, after_forward, exchanges is not None)
                self._hooks += self._pipeline.hook(number, before=watcher, after=watcher.ended)
            self._pipeline.watch(self._around_call)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Give every layer back its processor, with what was set on it meanwhile; a second call does nothing.

        Layers whose processor was replaced meanwhile keep the new one.
        """
        if not self._attached:
            return
        self._attached = False
        self._pipeline.watch(None)
        for hook in self._hooks:
            hook.remove()
        for module, own, processor in self._installed:
            if module.processor is processor:
                module.processor = released(processor, own)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    @contextmanager
    def _around_call(self) -> Iterator[None]:
        """Raise `InputError` when the pipeline is called with other transformers; tell of the call's end."""
        if Pipeline(self._pipeline).transformers != self._pipeline.transformers:
            raise InputError(
                "the pipeline's transformer was replaced after paroattn was applied; call remove() on its handle and "
                "apply again"
            )
        try:
            yield
        except BaseException:
            self._after_call(False)
            raise
        self._after_call(True)


def _shape_of_calls(descriptor: ModelDescriptor) -> CallShape:
    own = descriptor
    return CallShape(own.text == "prefix", own.text_asks, own.pair_masks or own.text_masks, own.text_masks)


class _Watcher:
    """The hooks of one transformer: look at each forward call before it runs, and at its end."""

    def __init__(
        self,
        number: int,
        transformer: Any,
        installed: list[tuple[Any, Any]],
        on_forward: OnForward,
        after_forward: Callable[[int], None],
        may_be_shared: bool,
    ):
        self._number = number
        self._transformer = transformer
        self._may_be_shared = may_be_shared
        self._descriptor = describe(transformer)
        self._config = transformer.config
        self._names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self._installed = installed
        self._on_forward = on_forward
        self._after_forward = after_forward

    @torch.compiler.disable
    def ended(self, *_: object) -> None:
        """Called after the forward call."""
        self._after_forward(self._number)

    @torch.compiler.disable
    def __call__(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Called before the forward call; never compiled, since it reads values and what belongs to a thread."""
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if any(module.processor is not processor for module, processor in self._installed):
            raise InputError(
                "the transformer's attention processors were replaced after paroattn was applied (by fusing "
                "projections or loading an adapter, say); call remove() on its handle and apply again"
            )
        if not self._may_be_shared and sharing_of(self._transformer) is not None:
            raise InputError("the transformer is shared by ranks; calibrate and observe before enable_parallelism")
        self._on_forward(
            Forward(self._number, self._descriptor, arguments, self._descriptor.grid(self._config, arguments))
        )

    __reduce_ex__ = refuse_copies
