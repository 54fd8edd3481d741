"""Token orders: per head, the permutation that makes its attention map block-wise (paper, section 4.1, and beyond)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK
from paroattn.errors import InputError
from paroattn.grid import Box, TokenGrid

AXIS_ORDERS = ("FHW", "FWH", "HFW", "HWF", "WFH", "WHF")
"""The six axis orders, slowest axis first; "FHW" is the order in which models flatten their tokens."""


def token_order(name: str, grid: TokenGrid) -> Tensor:
    """Gather index of a named token order.

    Args:
        name: one of `AXIS_ORDERS`, whose last letter is the axis that varies fastest; or a tiled order such as "4x4x4",
            frames x height x width of the box that each block of 64 tokens is: powers of two with product 64.
        grid: the token grid of the model.

    Returns:
        int64 [grid.tokens]: position i of the reordered sequence holds token `order[i]` of the model's sequence.
        Visual tokens come first, box by box; text tokens last and in their own order. Boxes that a tile is larger than
        have the nearest one that fits (`fitting_order`).

    Raises:
        InputError: an unknown order name, or a tile larger than the first box.

    Example:
        >>> token_order("WHF", TokenGrid(2, 1, 3)).tolist()
        [0, 3, 1, 4, 2, 5]
        >>> token_order("1x8x8", TokenGrid(1, 8, 16))[64]  # the second block starts at the ninth column
        tensor(8)
    """
    check_order(name, grid)
    visual = [own + start for own, start in zip(_orders_of_boxes(name, grid), grid.starts, strict=True)]
    text_start = 0 if grid.text_position == "prefix" else grid.visual_tokens
    return torch.cat((*visual, torch.arange(text_start, text_start + grid.text_tokens)))


def _orders_of_boxes(name: str, grid: TokenGrid) -> list[Tensor]:
    """The tokens of each box, numbered from 0, in an order that fits it."""
    orders = []
    for size in grid.boxes:
        box, own = torch.arange(math.prod(size)).view(size), fitting_order(name, TokenGrid(*size))
        axes = own in AXIS_ORDERS
        orders.append(box.permute(*map("FHW".index, own)).flatten() if axes else _tiled(box, _sides(own)))
    return orders


def token_places(name: str, grid: TokenGrid) -> Tensor:
    """Frame, row and column in its box of each visual token of the reordered sequence, int64 [visual tokens, 3].

    Example:
        >>> token_places("WHF", TokenGrid(2, 1, 3)).tolist()
        [[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1], [0, 0, 2], [1, 0, 2]]
    """
    check_order(name, grid)
    orders = zip(_orders_of_boxes(name, grid), grid.boxes, strict=True)
    return torch.cat([torch.stack(torch.unravel_index(own, size), -1) for own, size in orders])


def box_sizes(grid: TokenGrid) -> Tensor:
    """Frames, height and width of the box of each visual token of a reordered sequence, int64 [visual tokens, 3]."""
    sizes = torch.tensor(grid.boxes)
    return sizes.repeat_interleave(sizes.prod(1), 0)


def check_order(name: str, grid: TokenGrid) -> None:
    """Raise `InputError` unless `token_order` has an order of this name for the grid."""
    if name not in AXIS_ORDERS:
        sides = _sides(name)
        if any(side > own for side, own in zip(sides, grid.size, strict=True)):
            raise InputError(f"tile {name!r} is larger than the grid {grid}; expected a smaller box of {BLOCK} tokens")


def candidate_orders(grid: TokenGrid) -> tuple[str, ...]:
    """All axis orders and all tiled orders of a grid that cut it into different blocks, the first of equal ones.

    Example:
        >>> candidate_orders(TokenGrid(1, 16, 16))
        ('FHW', 'FWH', '1x8x8')
    """
    sides = [2**power for power in range(BLOCK.bit_length())]
    tiles = [(f, h, BLOCK // (f * h)) for f in sides for h in sides if f * h <= BLOCK]
    names = [f"{f}x{h}x{w}" for f, h, w in tiles if f <= grid.frames and h <= grid.height and w <= grid.width]
    distinct: dict[bytes, str] = {}
    for name in (*AXIS_ORDERS, *names):
        block_of = inverse_order(token_order(name, grid)) // BLOCK
        _, first = torch.unique(block_of, return_inverse=True)
        distinct.setdefault(_partition(first), name)
    return tuple(distinct.values())


def fitting_order(name: str, grid: TokenGrid) -> str:
    """The order of this name, or where its tile is larger than the grid the one of the nearest tile that fits.

    Example:
        >>> fitting_order("8x4x2", TokenGrid(4, 16, 16))
        '4x4x4'
    """
    if name in AXIS_ORDERS:
        return name
    tile = _fitted(_sides(name), grid.size)
    return "x".join(map(str, tile)) if math.prod(tile) == BLOCK else AXIS_ORDERS[0]


def same_blocks(name: str, old: TokenGrid, new: TokenGrid) -> str:
    """The order that cuts another grid into blocks of the shape that this one has on the old grid, or nearly.

    Example:
        >>> same_blocks("FHW", TokenGrid(16, 8, 8), TokenGrid(16, 16, 16))  # a frame each
        '1x8x8'
    """
    if name not in AXIS_ORDERS:
        return fitting_order(name, new)
    before, after = (_box_of_first_block(name, grid) for grid in (old, new))
    return name if before is None or before == after else fitting_order("x".join(map(str, before)), new)


def _box_of_first_block(name: str, grid: TokenGrid) -> tuple[int, ...] | None:
    """Sides of the box that the first block of an order is, or None if it is none."""
    places = token_places(name, grid)[:BLOCK]
    sides = tuple((places.amax(0) - places.amin(0) + 1).tolist())
    return sides if math.prod(sides) == len(places) == BLOCK else None


def _partition(block_of: Tensor) -> bytes:
    """The same bytes for the same division of tokens into blocks, whatever the blocks' numbers."""
    first_token = torch.full((int(block_of.max()) + 1,), len(block_of))
    first_token.scatter_reduce_(0, block_of, torch.arange(len(block_of)), "amin")
    return first_token[block_of].numpy().tobytes()


def _sides(name: str) -> Box:
    """The sides of a tiled order's boxes."""
    match = re.fullmatch(r"(\d{1,2})x(\d{1,2})x(\d{1,2})", name)
    sides = tuple(int(side) for side in match.groups()) if match else ()
    if math.prod(sides) != BLOCK or not sides:
        raise InputError(
            f"token order {name!r} is unknown; expected one of {', '.join(AXIS_ORDERS)}, or a tile such as '4x4x4' "
            f"whose sides have the product {BLOCK}"
        )
    frames, height, width = sides
    return frames, height, width


def _tiled(box: Tensor, tile: tuple[int, int, int]) -> Tensor:
    """The tokens of a box [F, H, W], tile by tile; what the tile leaves over is tiled in turn.

    Tokens that fill no tile of 64 come last, so that all other blocks are whole boxes. Neighbours in the sequence of
    tiles are neighbours in the grid: two blocks in a row form a box, and so do the halves, quarters, ... of a block.
    """
    whole: list[Tensor] = []
    loose: list[Tensor] = []
    _cover(box, tile, whole, loose)
    return torch.cat((*whole, *loose))


def _cover(box: Tensor, tile: Sequence[int], whole: list[Tensor], loose: list[Tensor]) -> None:
    if box.numel() == 0:
        return
    tile = _fitted(tile, box.shape)
    if math.prod(tile) < BLOCK:
        loose.append(box.flatten())
        return
    counts = [size // side for size, side in zip(box.shape, tile, strict=True)]
    f, h, w = (count * side for count, side in zip(counts, tile, strict=True))
    cut = box[:f, :h, :w].reshape(counts[0], tile[0], counts[1], tile[1], counts[2], tile[2])
    tiles = cut.permute(0, 2, 4, 1, 3, 5).reshape(*counts, *tile)
    whole.append(_nested(_walk(tiles, tile), tile).flatten())
    for rest in (box[f:], box[:f, h:], box[:f, :h, w:]):
        _cover(rest, tile, whole, loose)


def _fitted(tile: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The tile with sides halved until they fit, and others doubled in return, the shortest first, while they fit."""
    fitted = list(tile)
    for axis in range(3):
        while fitted[axis] > sizes[axis]:
            fitted[axis] //= 2
    while math.prod(fitted) < BLOCK:
        growing = [axis for axis in range(3) if 2 * fitted[axis] <= sizes[axis]]
        if not growing:
            break
        fitted[min(growing, key=lambda axis: fitted[axis])] *= 2
    return fitted


def _walk(tiles: Tensor, tile: Sequence[int]) -> Tensor:
    """Tiles [nF, nH, nW, ...] as a sequence, each beside the one before, mostly along the tile's shortest side."""
    slow, middle, fast = sorted(range(3), key=lambda axis: (tiles.shape[axis] > 1, -tile[axis]))
    grid = tiles.permute(slow, middle, fast, 3, 4, 5)
    turning = torch.stack([row if number % 2 == 0 else row.flip(1) for number, row in enumerate(grid.unbind(1))], 1)
    slices = turning.flatten(1, 2)
    return torch.cat([path if number % 2 == 0 else path.flip(0) for number, path in enumerate(slices)])


def _nested(tiles: Tensor, tile: Sequence[int]) -> Tensor:
    """The tokens of tiles [n, f, h, w] as [n, 64], halving the longest side again and again."""
    bits = [side.bit_length() - 1 for side in tile]
    dimensions = [list(range(1 + sum(bits[:axis]), 1 + sum(bits[: axis + 1]))) for axis in range(3)]
    order = []
    while any(dimensions):
        longest = max(range(3), key=lambda axis: len(dimensions[axis]))
        order.append(dimensions[longest].pop(0))
    return tiles.reshape(len(tiles), *[2] * sum(bits)).permute(0, *order).reshape(len(tiles), -1)


def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes `order`, along the last dimension: `inverse[order[i]] == i`.

    Example:
        >>> inverse_order(torch.tensor([2, 0, 1])).tolist()
        [1, 2, 0]
    """
    positions = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order, dtype=torch.int64).scatter_(-1, order.long(), positions)


def check_permutation(permutation: Tensor, heads: int, tokens: int) -> None:
    """Raise `InputError` unless `permutation` is an integer [N] or [heads, N] tensor of permutations of 0..N-1."""
    if permutation.dtype not in (torch.int32, torch.int64):
        raise InputError(f"permutation has dtype {permutation.dtype}; expected torch.int32 or torch.int64")
    if permutation.shape not in ((tokens,), (heads, tokens)):
        raise InputError(
            f"permutation has shape {list(permutation.shape)}; expected [{tokens}] or [{heads}, {tokens}] "
            f"for {heads} heads and {tokens} tokens"
        )
    if torch.compiler.is_compiling():
        return  # values are not known while a graph is traced
    expected = torch.arange(tokens, device=permutation.device, dtype=permutation.dtype)
    if not bool((permutation.sort(dim=-1).values == expected).all()):
        raise InputError(f"permutation must hold each number from 0 to {tokens - 1} once per head")
