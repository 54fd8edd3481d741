"""Orders and masks of a plan for a sequence with another number of text tokens than the plan was made with.

Visual tokens come first in every order, so that their blocks stay; blocks that touch text are computed. Everything
happens on the device, without asking it for values.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from paroattn.block_mask import pack_bits, text_blocks
from paroattn.grid import TokenGrid


def orders_for(orders: Tensor, grid: TokenGrid, text_tokens: int) -> Tensor:
    """Gather indices [orders, N] for `text_tokens` instead of the grid's own number."""
    if text_tokens == grid.text_tokens:
        return orders
    changed = replace(grid, text_tokens=text_tokens)
    visual = orders[:, : grid.visual_tokens] + (changed.visual_start - grid.visual_start)
    start = grid.visual_tokens if grid.text_position == "suffix" else 0
    text = torch.arange(start, start + text_tokens, dtype=orders.dtype, device=orders.device)
    return torch.cat((visual, text.expand(len(orders), -1)), 1)


def masks_for(bits: Tensor, grid: TokenGrid, text_tokens: int, block_q: int, block_kv: int) -> Tensor:
    """Packed masks [masks, q blocks, bytes] for `text_tokens` instead of the grid's own number."""
    if text_tokens == grid.text_tokens:
        return bits
    text, everything = _text_bits(replace(grid, text_tokens=text_tokens), block_q, block_kv, bits.device)
    rows, size = (min(a, b) for a, b in zip(text.shape, bits.shape[1:], strict=True))
    changed = bits.new_zeros(len(bits), *text.shape)
    changed[:, :rows, :size] = bits[:, :rows, :size]
    return (changed | text) & everything


@functools.lru_cache(maxsize=64)
def _text_bits(grid: TokenGrid, block_q: int, block_kv: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Packed masks of the blocks that touch text, and of all blocks."""
    text = text_blocks(grid, block_q, block_kv)
    return pack_bits(text).to(device), pack_bits(torch.ones_like(text)).to(device)
