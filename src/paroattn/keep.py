"""Which blocks to keep: the best ones of a density, and which densities are possible at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paroattn.block_mask import text_blocks
from paroattn.errors import InputError, PlanError
from paroattn.grid import TokenGrid


def keep_best(score: Tensor, density: float, required: Tensor) -> Tensor:
    """Keep the blocks with the highest scores, `density` of all.

    Required blocks, and the best block of a row that has none, are kept in any case and count. Where they alone are
    more than `density`, they are the result.

    Args:
        score: [..., q blocks, kv blocks]; block sums or costs, compared over all leading dimensions together. Those
            in bfloat16 must not be negative; codes in uint8 are at most 254.
        density: kept blocks over all blocks, met to the nearest block.
        required: bool [q blocks, kv blocks], blocks that must be computed (text).

    Returns:
        bool like score, True for kept blocks.

    Example:
        >>> keep_best(torch.tensor([[9.0, 1.0], [5.0, 6.0]]), 0.75, torch.zeros(2, 2, dtype=torch.bool))
        tensor([[ True, False],
                [ True,  True]])
    """
    together = score.reshape(1, -1, score.shape[-1])
    rows = required.expand(score.shape).reshape(together.shape[1:])
    return keep_counts(together, torch.tensor([round(density * score.numel())]), rows).view_as(score)


def keep_counts(score: Tensor, counts: Tensor, required: Tensor) -> Tensor:
    """`keep_best` of each head apart, of which so many blocks are kept.

    Args:
        score: [heads, q blocks, kv blocks].
        counts: int64 [heads].
        required: as `keep_best`.

    Example:
        >>> score = torch.tensor([[[9.0, 1.0], [5.0, 6.0]], [[1.0, 2.0], [4.0, 3.0]]])
        >>> keep_counts(score, torch.tensor([3, 2]), torch.zeros(2, 2, dtype=torch.bool)).int().tolist()
        [[[1, 0], [1, 1]], [[0, 1], [1, 0]]]
    """
    forced = _forced(score, required).flatten(1)
    wanted = counts.to(score.device).maximum(forced.sum(1))
    if score.dtype in _COUNTED:  # a positive bfloat16 number's bits, read as an integer, are in the numbers' order
        whole = score.flatten(1).view(torch.int16) if score.dtype == torch.bfloat16 else score.flatten(1)
        most = _COUNTED[score.dtype]
        return _largest(whole.masked_fill(forced, most), wanted, most).view_as(score)
    kept = torch.zeros_like(forced)
    for head, count in enumerate(wanted.tolist()):
        kept[head, score[head].flatten().masked_fill(forced[head], torch.inf).topk(count).indices] = True
    return kept.view_as(score)


_COUNTED = {torch.bfloat16: 2**15 - 1, torch.uint8: 255}  # and an integer above what scores of the dtype hold


def _largest(numbers: Tensor, counts: Tensor, most: int) -> Tensor:
    """Where the largest of each head's integers in [0, most] are, of equal ones the first; faster than sorting."""
    heads, kinds = len(numbers), most + 2
    shifted = numbers + torch.arange(0, heads * kinds, kinds, device=numbers.device, dtype=torch.int32).unsqueeze(1)
    found = torch.bincount(shifted.flatten(), minlength=heads * kinds).view(heads, kinds)
    at_least = found.flip(1).cumsum(1).flip(1)  # how many are >= each number
    threshold = (at_least >= counts.unsqueeze(1)).sum(1, keepdim=True) - 1
    limit = threshold.to(numbers.dtype)
    kept = numbers > limit
    head, place = (numbers == limit).nonzero().unbind(1)
    equal = found.gather(1, threshold).flatten()  # of each head, among which they are numbered
    number = torch.arange(len(head), device=head.device) - (equal.cumsum(0) - equal)[head]
    chosen = number < (counts - at_least.gather(1, threshold + 1).flatten())[head]
    kept[head[chosen], place[chosen]] = True
    return kept


def keep_levels(score: Tensor, densities: Sequence[float], required: Tensor) -> Tensor:
    """`keep_best` of each head apart for several densities at once, each keeping what the ones below it keep.

    Args:
        score: [..., q blocks, kv blocks]; leading dimensions are heads.
        densities: ascending.
        required: as `keep_best`.

    Returns:
        int64 like score: how many of the densities leave the block out. Density number i keeps those <= i.

    Example:
        >>> keep_levels(torch.tensor([[9.0, 1.0], [5.0, 6.0]]), (0.5, 0.75), torch.zeros(2, 2, dtype=torch.bool))
        tensor([[0, 2],
                [1, 0]])
    """
    forced = _forced(score, required).flatten(-2)
    blocks = forced.shape[-1]
    asked = torch.tensor([round(density * blocks) for density in densities], device=score.device)
    wanted = asked.maximum(forced.sum(-1, keepdim=True))
    best_first = score.flatten(-2).masked_fill(forced, torch.inf).argsort(-1, descending=True)
    rank = torch.empty_like(best_first)
    rank.scatter_(-1, best_first, torch.arange(blocks, device=score.device).expand_as(rank))
    return torch.searchsorted(wanted, rank, right=True).view_as(score)


def _forced(score: Tensor, required: Tensor) -> Tensor:
    """Blocks kept at any density, bool like score: required ones, and the best one of each row that has none."""
    best = score.argmax(-1, keepdim=True)
    alone = ~required.any(-1, keepdim=True)
    return required | alone & torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)


def least_density(grid: TokenGrid, block_q: int = 64) -> float:
    """What text blocks and one block per row need: the least density that `keep_best` reaches."""
    required = text_blocks(grid, block_q)
    return least_blocks(required) / required.numel()


def least_blocks(required: Tensor) -> int:
    """How many blocks `keep_best` keeps at least: the required ones, bool [q blocks, kv blocks], and one per row."""
    return int(required.sum()) + int((~required.any(-1)).sum())


def check_density(density: float) -> None:
    """Raise `InputError` for what is no share of blocks."""
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise InputError(f"density is {density!r}; expected a number above 0, up to 1")


def check_reachable(density: float, grid: TokenGrid, block_q: int = 64) -> None:
    """Raise `PlanError` for a density that no plan of this grid can have; found before anything is measured."""
    least, blocks = least_density(grid, block_q), text_blocks(grid, block_q).numel()
    if round(density * blocks) < round(least * blocks):
        shown = math.ceil(least * 1e4) / 1e4  # rounded up, so that asking for it succeeds
        raise PlanError(
            f"density {density:g} cannot be reached: text blocks and one block per row already need "
            f"{shown:.4f}. Ask for at least that."
        )
