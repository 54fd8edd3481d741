"""Block sums of attention maps on a GPU, streaming: no map is held, whatever the number of tokens.

One pass finds the log-sum-exp of every row, which no order changes. A second one, in each candidate order, computes P
block by block and keeps the sum of each. `paroattn.calibration.statistics.block_sums` defines the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK, block_count
from paroattn.ops.triton_attention import check_device


def block_sums(q: Tensor, k: Tensor, orders: Sequence[Tensor], scale: float) -> Tensor:
    """Sum of P in each block, of one head in several orders at once.

    Args:
        q, k: [N, D] on a GPU, in the model's order; 16-bit ones are multiplied as they are, float32 ones in float32.
        orders: gather indices [N].
        scale: factor of the logits.

    Returns:
        float32 [orders, q blocks, kv blocks] on the same device.
    """
    table = torch.stack([order.to(q.device, torch.int32) for order in orders])
    return torch.ops.paroattn.triton_block_sums(q.detach(), k.detach(), table, scale)


@torch.library.custom_op("paroattn::triton_block_sums", mutates_args=())
def triton_block_sums(q: Tensor, k: Tensor, orders: Tensor, scale: float) -> Tensor:
    """Block sums of one head; q, k [N, D], orders int32 [orders, N] -> float32 [orders, q blocks, kv blocks]."""
    check_device(q)
    from paroattn.ops import triton_block_sums as kernels

    q, k = q.contiguous(), k.contiguous()
    tokens, head_dim = q.shape
    blocks = block_count(tokens, BLOCK)
    lse = q.new_empty(tokens, dtype=torch.float32)
    sums = q.new_empty((len(orders), blocks, blocks), dtype=torch.float32)
    size: dict[str, Any] = {"HEAD_DIM": head_dim, "D": 64 if head_dim <= 64 else 128}
    kernels.row_lse[(blocks,)](q, k, lse, scale, tokens, **size)
    reordered = (x.index_select(0, orders.flatten()) for x in (q, k, lse))
    kernels.block_sums[(blocks, len(orders))](*reordered, sums, scale, tokens, blocks, **size)
    return sums


@triton_block_sums.register_fake
def _(q: Tensor, k: Tensor, orders: Tensor, scale: float) -> Tensor:
    blocks = (q.shape[0] + BLOCK - 1) // BLOCK
    return q.new_empty((orders.shape[0], blocks, blocks), dtype=torch.float32)
