"""Token orders: per head, the permutation that makes its attention map block-wise (paper, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from paroattn.grid import TokenGrid

AXIS_ORDERS = ("FHW", "FWH", "HFW", "HWF", "WFH", "WHF")
"""The six axis orders, slowest axis first; "FHW" is the order in which models flatten their tokens."""


def token_order(name: str, grid: TokenGrid) -> Tensor:
    """Gather index of a named token order.

    Args:
        name: one of `AXIS_ORDERS`; the last letter is the axis that varies fastest.
        grid: the token grid of the model.

    Returns:
        int64 [grid.tokens]: position i of the reordered sequence holds token `order[i]` of the model's sequence.
        Visual tokens come first, text tokens last and in their own order.

    Raises:
        ValueError: an unknown order name.

    Example:
        >>> token_order("WHF", TokenGrid(2, 1, 3)).tolist()
        [0, 3, 1, 4, 2, 5]
    """
    if name not in AXIS_ORDERS:
        raise ValueError(f"token order {name!r} is unknown; expected one of {', '.join(AXIS_ORDERS)}")
    box = torch.arange(grid.visual_tokens).view(grid.frames, grid.height, grid.width)
    visual = box.permute(*("FHW".index(axis) for axis in name)).flatten() + grid.visual_start
    text_start = 0 if grid.text_position == "prefix" else grid.visual_tokens
    return torch.cat((visual, torch.arange(text_start, text_start + grid.text_tokens)))


def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes `order`, along the last dimension: `inverse[order[i]] == i`.

    Example:
        >>> inverse_order(torch.tensor([2, 0, 1])).tolist()
        [1, 2, 0]
    """
    positions = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order, dtype=torch.int64).scatter_(-1, order.long(), positions)


def check_permutation(permutation: Tensor, heads: int, tokens: int) -> None:
    """Raise `ValueError` unless `permutation` is an integer [N] or [heads, N] tensor of permutations of 0..N-1."""
    if permutation.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"permutation has dtype {permutation.dtype}; expected torch.int32 or torch.int64")
    if permutation.shape not in ((tokens,), (heads, tokens)):
        raise ValueError(
            f"permutation has shape {list(permutation.shape)}; expected [{tokens}] or [{heads}, {tokens}] "
            f"for {heads} heads and {tokens} tokens"
        )
    if torch.compiler.is_compiling():
        return  # values are not known while a graph is traced
    expected = torch.arange(tokens, device=permutation.device, dtype=permutation.dtype)
    if not bool((permutation.sort(dim=-1).values == expected).all()):
        raise ValueError(f"permutation must hold each number from 0 to {tokens - 1} once per head")
