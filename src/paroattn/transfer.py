"""Which blocks matter on a grid, from what is known of another grid or from positions alone."""

from __future__ import annotations

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK, block_count, pack_bits, text_blocks, unpack_bits
from paroattn.grid import TokenGrid
from paroattn.keep import keep_counts
from paroattn.order import box_sizes, inverse_order, token_order, token_places

_PAIRS = 8  # of tokens that stand for all of two blocks
_NEARNESS = 1e-3  # decides between blocks that cover as much of what was kept
_FRAMES_APART = 0.2  # how far the first and the last frame are apart, beside 1 for opposite edges of a frame


def resample_masks(
    bits: Tensor,
    order_name: str,
    block_q: int,
    old: TokenGrid,
    new_name: str,
    new: TokenGrid,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Masks of one grid on another one: a block keeps what lies as far from it as what was kept at its place.

    Its place is scaled from one grid to the other; how far two tokens are apart is not, since models know positions
    by their differences. Beyond the old grid's edges is what is at them.

    Args:
        bits: uint8 [masks, q blocks, ceil(kv blocks / 8)], see `pack_bits`.
        order_name, old: token order and grid they are for.
        block_q: queries per block.
        new_name, new: order and grid they are wanted for.
        device: that computes it.

    Returns:
        uint8 as `bits`, of the new grid: each mask keeps the same share of its blocks, of which those with text.
    """
    rows, columns = (x.to(device) for x in _old_blocks(order_name, old, new_name, new, block_q))
    required = text_blocks(new, block_q).to(device)
    nearness = _NEARNESS * (1 - block_distances(new_name, new, block_q)).to(device)
    old_columns = block_count(old.tokens, BLOCK)
    place = rows.unsqueeze(1) * old_columns + columns
    made = []
    for own in bits:
        kept = unpack_bits(own.to(device), old_columns)
        count = round(float(kept.double().mean()) * required.numel())
        seen = kept.flatten()[place].float().mean(-1)
        mask = keep_counts((seen + nearness).unsqueeze(0), torch.tensor([count]), required)
        made.append(pack_bits(mask).cpu())
    return torch.cat(made)


def block_distances(order_name: str, grid: TokenGrid, block_q: int = BLOCK) -> Tensor:
    """Distance of the centres of blocks in a grid whose height and width are 1, float32 [q blocks, kv blocks].

    All frames together are a fifth: attention reaches farther in time. Blocks of text alone lie in the first corner,
    and several boxes on top of each other.
    """
    token = torch.arange(grid.visual_tokens)
    lengths = torch.tensor((_FRAMES_APART, 1.0, 1.0))
    places = (token_places(order_name, grid) + 0.5) / box_sizes(grid) * lengths

    def centres(block: int) -> Tensor:
        sums = torch.zeros(block_count(grid.tokens, block), 3).index_add_(0, token // block, places)
        return sums / (token // block).bincount(minlength=len(sums)).clamp(min=1).unsqueeze(1)

    return torch.cdist(centres(block_q), centres(BLOCK))


def _old_blocks(order_name: str, old: TokenGrid, new_name: str, new: TokenGrid, block_q: int) -> tuple[Tensor, Tensor]:
    """Which blocks of the old grid stand for pairs of tokens of new blocks: rows int64 [q blocks, pairs] and columns
    [q blocks, kv blocks, pairs].
    """
    places, new_sizes = token_places(new_name, new) + 0.5, box_sizes(new)
    counts = torch.tensor(new.boxes).prod(1)
    old_sizes = torch.tensor(old.boxes).repeat_interleave(counts, 0)
    starts = torch.tensor(old.starts).repeat_interleave(counts)
    position = inverse_order(token_order(order_name, old))

    def some(block: int) -> Tensor:
        """Tokens that are spread over each block."""
        first = torch.arange(block_count(new.tokens, block)).unsqueeze(1) * block
        inner = torch.arange(_PAIRS) * (block // _PAIRS) + block // _PAIRS // 2
        return (first + inner).clamp(max=new.visual_tokens - 1)

    def old_block(place: Tensor, token: Tensor, block: int) -> Tensor:
        """Blocks of places in the old boxes of tokens."""
        sizes = old_sizes[token]
        frame, row, column = torch.minimum(place.long().clamp(min=0), sizes - 1).unbind(-1)
        return position[(frame * sizes[..., 1] + row) * sizes[..., 2] + column + starts[token]] // block

    queries, keys = some(block_q), some(BLOCK)
    rows = old_block(places[queries] * old_sizes[queries] / new_sizes[queries], queries, block_q)
    asking = queries.unsqueeze(1)  # in the keys' boxes, which may be others
    there, before = (places[asking] * sizes[keys] / new_sizes[asking] for sizes in (new_sizes, old_sizes))
    return rows, old_block(before + (places[keys] - there), keys.expand(len(queries), -1, -1), BLOCK)
