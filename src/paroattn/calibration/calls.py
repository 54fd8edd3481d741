"""One attention call of a running model, as calibration looks at it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from paroattn.grid import TokenGrid
from paroattn.order import token_order


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
class AttentionCall:
    """Self-attention of one layer.

    Attributes:
        layer: its number.
        step, num_steps: denoising step, and steps of the schedule.
        grid: the box of visual tokens, with as many text tokens as this call has.
        query, key, value: [B, N, H, D] in the model's order.
        key_mask: bool [B, N], False for padding of text, or None.
        scale: factor of the logits.
    """

    layer: int
    step: int
    num_steps: int
    grid: TokenGrid
    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    scale: float

    @classmethod
    def of(
        cls,
        layer: int,
        step: int,
        num_steps: int,
        grid: TokenGrid,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        scale: float | None,
    ) -> AttentionCall | None:
        """The call that an intercept got; None where it is no self-attention over the grid's box and some text.

        Args: as the attributes; grid with any number of text tokens, scale None for 1 / sqrt(D).
        """
        text = query.shape[1] - grid.visual_tokens
        if key.shape[1] != query.shape[1] or text < 0:
            return None
        query, key, value = query.detach(), key.detach(), value.detach()
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return cls(layer, step, num_steps, replace(grid, text_tokens=text), query, key, value, key_mask, scale)

    @property
    def heads(self) -> int:
        return self.query.shape[2]

    def samples(self) -> Iterator[Sample]:
        """The call's samples; padding is left out, since nothing attends to it."""
        for number, (q, k, v) in enumerate(zip(self.query, self.key, self.value, strict=True)):
            if self.key_mask is None:
                yield Sample(self.grid, q, k, v)
                continue
            kept = self.key_mask[number].nonzero().flatten()
            text = len(kept) - self.grid.visual_tokens
            yield Sample(replace(self.grid, text_tokens=text), q[kept], k[kept], v[kept])


@functools.lru_cache(maxsize=256)
def order_of(name: str, grid: TokenGrid) -> Tensor:
    """`token_order`, kept: calls of one model ask for the same ones again and again."""
    return token_order(name, grid)
