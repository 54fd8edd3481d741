"""From scores of blocks to a mask: the one place where all rules spend their blocks."""

from __future__ import annotations

from torch import Tensor

from paroattn.block_mask import text_blocks
from paroattn.grid import TokenGrid
from paroattn.keep import check_reachable, keep_best


def baseline_mask(scores: Tensor, density: float, grid: TokenGrid) -> Tensor:
    """One head's mask: text blocks, a block in each row, then the best of all others.

    Args:
        scores: [q blocks, kv blocks] on the CPU, larger is better; scores of text blocks do not matter.
        density: kept blocks over all blocks, text blocks counted; met to the nearest block.
        grid: the token grid.

    Returns:
        bool [q blocks, kv blocks].

    Raises:
        PlanError: text blocks and one block per row alone exceed the density.
    """
    check_reachable(density, grid)
    return keep_best(scores, density, text_blocks(grid))
