"""From scores of blocks to a mask: the one place where all rules spend their blocks."""

from __future__ import annotations

from torch import Tensor

from paroattn.block_mask import text_blocks
from paroattn.calibration.select import select_blocks
from paroattn.grid import TokenGrid


def keep_best(scores: Tensor, density: float, grid: TokenGrid) -> Tensor:
    """One head's mask: text blocks, the best block of each row, then the best of all others.

    Args:
        scores: [q blocks, kv blocks] on the CPU, larger is better; scores of text blocks do not matter.
        density: kept blocks over all blocks, text blocks counted; met to the nearest block.
        grid: the token grid.

    Returns:
        bool [q blocks, kv blocks].

    Raises:
        PlanError: text blocks and the best block of each row alone exceed the density.
    """
    return select_blocks(scores[None], density, text_blocks(grid))[0]
