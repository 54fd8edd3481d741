"""Looking at the attention calls of a running pipeline: calibration, benchmarks and the study of heads stand on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from paroattn.errors import InputError
from paroattn.grid import TokenGrid
from paroattn.integrations.attach import Attachment, Forward, OnForward
from paroattn.integrations.pipeline import Pipeline
from paroattn.integrations.rebind import AttentionCall, Intercept
from paroattn.integrations.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample of a call, without hidden text tokens.

    Attributes:
        grid: with the number of text tokens that are left.
        query, key, value: [N, H, D] in the model's order.
    """

    grid: TokenGrid
    query: Tensor
    key: Tensor
    value: Tensor

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, [H, N, D]."""
        return self.query.transpose(0, 1), self.key.transpose(0, 1), self.value.transpose(0, 1)

    def head(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a head, [N, D]."""
        return self.query[:, number], self.key[:, number], self.value[:, number]


@dataclass(frozen=True, eq=False)
class ObservedCall:
    """A self-attention call of a running pipeline.

    Attributes:
        layer: its number.
        step, num_steps: denoising step, from 0, and steps of the generation; calls at one noise level are one step.
        level: the noise level, from 1 (pure noise) down to 0.
        grid: the box of visual tokens, with as many text tokens as this call has.
        query, key, value: [B, N, H, D] in the model's order; shared keys and values are repeated.
        key_mask: bool [B, N], False for padding of text, or None.
        scale: factor of the logits.
        dense: computes the call with the model's own attention, [B, N, H, D].
    """

    layer: int
    step: int
    num_steps: int
    level: float
    grid: TokenGrid
    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    scale: float
    dense: Callable[[], Tensor]

    @classmethod
    def of(cls, call: AttentionCall, layer: int, schedule: Schedule, grid: TokenGrid) -> ObservedCall:
        """An intercepted call of a layer, where a generation is and with the visual tokens of a grid."""
        group = call.query.shape[2] // call.key.shape[2]
        key, value = call.key.detach(), call.value.detach()
        if group > 1:  # statistics are of query heads, each with its own orders
            key, value = key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
        return cls(
            layer,
            schedule.step,
            schedule.num_steps,
            schedule.level,
            replace(grid, text_tokens=call.query.shape[1] - grid.visual_tokens),
            call.query.detach(),
            key,
            value,
            call.key_mask,
            call.query.shape[-1] ** -0.5,
            call.dense,
        )

    @property
    def heads(self) -> int:
        return self.query.shape[2]

    def first(self, count: int | None) -> ObservedCall:
        """The call with its first samples only; None for all."""
        mask = None if self.key_mask is None else self.key_mask[:count]
        return replace(self, query=self.query[:count], key=self.key[:count], value=self.value[:count], key_mask=mask)

    def samples(self) -> Iterator[Sample]:
        """The call's samples; padding is left out, since nothing attends to it."""
        for number, (q, k, v) in enumerate(zip(self.query, self.key, self.value, strict=True)):
            if self.key_mask is None:
                yield Sample(self.grid, q, k, v)
                continue
            kept = self.key_mask[number].nonzero().flatten()
            text = len(kept) - self.grid.visual_tokens
            yield Sample(replace(self.grid, text_tokens=text), q[kept], k[kept], v[kept])


def observe(
    pipe: Any,
    function: Callable[[ObservedCall], Tensor | None],
    *,
    on_forward: OnForward = lambda forward: None,
    on_step: Callable[[Schedule], None] = lambda schedule: None,
    on_unseen: Callable[[str], None] = lambda reason: None,
) -> Attachment:
    """Hand every self-attention call of a pipeline's transformers to a function, until the handle is removed.

    Args:
        pipe: a diffusers pipeline whose transformer paroattn knows (docs/models.md).
        function: gets an `ObservedCall`. The tensor [B, N, H, D] that it returns takes the place of the call's output;
            None leaves it to the model's own attention. Cross-attention does not arrive.
        on_forward: called before each forward call of a transformer, with its arguments and token grid.
        on_step: called with the schedule (`step`, `num_steps`, `level`) whenever the denoising step changes.
        on_unseen: called with the reason for each self-attention call that `function` cannot get: a causal one, or one
            whose mask hides more than keys.

    Returns:
        A handle with `remove()`; also a context manager.

    Raises:
        InputError: an unknown model class, a pipeline that paroattn is applied to, and, while generating, visual tokens
            that form no boxes.

    Example:
        >>> norms = []
        >>> with paroattn.observe(pipe, lambda call: norms.append(call.query.norm())):  # doctest: +SKIP
        ...     pipe(prompt="a cat")
    """
    known: list[TokenGrid] = []
    pipeline, schedule = Pipeline(pipe), Schedule()

    def before_forward(forward: Forward) -> None:
        grid = forward.grid
        if grid is None:
            raise InputError("visual tokens form no boxes of frames, height and width; use other arguments")
        known[:] = [grid]
        if schedule.follow(forward.descriptor, forward.timestep, pipeline.scheduler):
            on_step(schedule)
        on_forward(forward)

    def intercept(layer: int) -> Intercept:
        def attend(call: AttentionCall) -> Tensor:
            text = call.query.shape[1] - known[0].visual_tokens
            if call.refusal:
                on_unseen(call.refusal)
            if call.refusal or not call.attends_to_itself or text < 0:
                return call.dense()
            output = function(ObservedCall.of(call, layer, schedule, known[0]))
            return call.dense() if output is None else output

        return attend

    return Attachment(pipeline, [intercept(layer) for layer in range(pipeline.identity.layers)], before_forward)
