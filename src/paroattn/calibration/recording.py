"""A generation with the model's own attention, kept: forward calls of the transformers and the final latents."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paroattn.integrations.attach import Forward
from paroattn.integrations.pipeline import Pipeline


@dataclass(frozen=True, eq=False)
class ForwardCall:
    """A forward call of a transformer, to be repeated."""

    transformer: Any
    step: int
    arguments: Mapping[str, Any]
    output: Any

    def __call__(self) -> Tensor:
        """What the transformer makes of the latents; a list of samples as one tensor."""
        sample = self.transformer(**self.arguments)[0]
        return sample if isinstance(sample, Tensor) else torch.stack(list(sample))


def _copied(output: Any) -> Any:
    """An output of a transformer with tensors of its own."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, Mapping):
        return type(output)(**{name: _copied(value) for name, value in output.items()})
    return type(output)(_copied(value) for value in output) if isinstance(output, list | tuple) else output


class Recording:
    """What it holds is small: inputs and outputs of the transformers.

    Attributes:
        latents: the final ones.
    """

    latents: Tensor

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline
        self._calls: list[ForwardCall] = []
        self._arguments: list[dict[str, Any]] | None = None  # of calls in progress, while something is recorded
        self._step = 0

    def follow(self, step: int) -> None:
        """Take note of the denoising step that begins."""
        self._step = step

    def before(self, forward: Forward) -> None:
        """Take note of a forward call that begins."""
        if self._arguments is not None:
            self._arguments.append(dict(forward.arguments))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record the calls of a generation, of which the caller tells by `follow` and `before`."""
        self._calls, self._arguments = [], []
        hooks = [
            hook
            for number in range(len(self._pipeline.transformers))
            for hook in self._pipeline.hook(number, before=lambda *_: None, after=self._take)
        ]
        try:
            yield
        finally:
            self._arguments = None
            for hook in hooks:
                hook.remove()

    def _take(self, module: Any, _: Any, output: Any) -> None:
        if output is None or not self._arguments:  # the call failed
            return
        module = getattr(module, "_orig_mod", module)
        self._calls.append(ForwardCall(module, self._step, self._arguments.pop(), _copied(output)))

    def calls_of(self, step: int) -> list[ForwardCall]:
        """The forward calls of a step, two under guidance."""
        return [call for call in self._calls if call.step == step]

    @contextmanager
    def replayed(self, steps: int) -> Iterator[None]:
        """The transformers answer the calls of the first steps with what they answered then, without computing it."""
        left = [call for call in self._calls if call.step < steps]
        transformers = self._pipeline.transformers
        own = {transformer: vars(transformer).get("forward") for transformer in transformers}
        forwards = {transformer: transformer.forward for transformer in transformers}

        def answer(*args: Any, **kwargs: Any) -> Any:
            call = left.pop(0)
            if kwargs.get("kv_cache_mode") == "extract":  # calls of later steps read what this one keeps
                forwards[call.transformer](*args, **kwargs)
            if not left:
                put_back()
            return call.output

        def put_back() -> None:
            for transformer, forward in own.items():
                if forward is None:
                    vars(transformer).pop("forward", None)
                else:  # that of a library which moves weights when they are needed
                    transformer.forward = forward

        if left and not self._pipeline.is_compiled:
            for transformer, forward in forwards.items():  # modular pipelines ask for the signature
                transformer.forward = functools.wraps(forward)(answer)
        try:
            yield
        finally:
            put_back()
