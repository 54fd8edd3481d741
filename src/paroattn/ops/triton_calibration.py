"""Calibration's statistics on a GPU, streaming: no attention map is held, whatever the number of tokens.

`paroattn.calibration.statistics.block_sums` and `paroattn.calibration.skip_cost.skip_costs` define the results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from paroattn.block_mask import BLOCK, block_count
from paroattn.calibration.keep import keep_levels
from paroattn.calibration.kernels import Kernels
from paroattn.calibration.skip_cost import LEVELS, SkipCosts, block_means
from paroattn.ops.triton_attention import check_device, on_device_of, target_here
from paroattn.ops.triton_configs import skip_cost_options


def block_sums(q: Tensor, k: Tensor, orders: Sequence[Tensor], scale: float) -> Tensor:
    """Sum of P in each block, of one head in several orders at once.

    One pass finds the log-sum-exp of every row, which no order changes. A second one, in each order, computes P block
    by block and keeps the sum of each.

    Args:
        q, k: [N, D] on a GPU, in the model's order; 16-bit ones are multiplied as they are, float32 ones in float32.
        orders: gather indices [N].
        scale: factor of the logits.

    Returns:
        float32 [orders, q blocks, kv blocks] on the CPU.
    """
    table = torch.stack([order.to(q.device, torch.int32) for order in orders])
    return torch.ops.paroattn.triton_block_sums(q.detach(), k.detach(), table, scale).cpu()


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
    with on_device_of(q):
        kernels.row_lse[(blocks,)](q, k, lse, scale, tokens, **size)
        reordered = (x.index_select(0, orders.flatten()) for x in (q, k, lse))
        kernels.block_sums[(blocks, len(orders))](*reordered, sums, scale, tokens, blocks, **size)
    return sums


@triton_block_sums.register_fake
def _(q: Tensor, k: Tensor, orders: Tensor, scale: float) -> Tensor:
    blocks = (q.shape[0] + BLOCK - 1) // BLOCK
    return q.new_empty((orders.shape[0], blocks, blocks), dtype=torch.float32)


def skip_costs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    scale: float,
    required: Tensor,
    *,
    block_q: int = BLOCK,
    q_blocks: Tensor | None = None,
    levels: Sequence[float] = LEVELS,
) -> SkipCosts:
    """Costs and errors of skipping blocks of one head in a given order,.

    Args: as the reference, q, k, v [N, D] on a GPU; 16-bit ones are multiplied as they are. The costliest blocks of a level are those of all rows.
    """
    check_device(q)
    from paroattn.ops import triton_skip_cost as kernels

    device, (tokens, head_dim) = q.device, q.shape
    width = 64 if head_dim <= 64 else 128
    if q_blocks is None:
        q_blocks = torch.arange(block_count(tokens, block_q))
    index = (q_blocks.unsqueeze(-1) * block_q + torch.arange(block_q)).flatten()
    index, order = index[index < tokens].to(device), order.to(device)
    q, k, v = (x.detach().index_select(0, which) for x, which in ((q, order[index]), (k, order), (v, order)))
    rows, per_block = len(index), block_q // BLOCK
    tiles, columns = len(q_blocks) * per_block, block_count(tokens, BLOCK)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    sizes = (scale, tokens, rows)
    constants: dict[str, Any] = {"HEAD_DIM": head_dim, "D": width}
    constants |= skip_cost_options(target_here(device), width)
    with on_device_of(q):
        lse, output = new(tiles * BLOCK), new(tiles * BLOCK, width)
        kernels.attend_rows[(tiles,)](q, k, v, lse, output, *sizes, **constants)

        mean_k, mean_v, count = block_means(k.float(), v.float())
        mean_v = pad(mean_v, (0, width - head_dim))
        logits = mean_k @ q.float().mT * scale + count.log()
        surrogate = torch.zeros(columns, tiles * BLOCK, device=device)
        surrogate[:, :rows] = torch.exp2(logits / math.log(2) - lse[:rows])
        head = (q, k, v, lse, output, surrogate, mean_v)

        sums, costs = new(tiles, columns), new(2, tiles, columns)
        kernels.block_costs[(tiles,)](*head, sums, costs, *sizes, **constants)
        sums, costs = sums.unflatten(0, (-1, per_block)).sum(1), costs.unflatten(1, (-1, per_block)).sum(2)

        # The blocks of a level are among those of the next one: one walk over a row's list meets all levels.
        level = torch.stack([keep_levels(cost, levels, required[q_blocks].to(device)) for cost in costs])
        lists = level.argsort(dim=-1, stable=True).int()
        kept = (level.unsqueeze(-1) <= torch.arange(len(levels), device=device)).sum(-2)  # [2, q blocks, levels]
        last = kept - 1
        wanted = torch.zeros(lists.shape, dtype=torch.uint8, device=device).scatter_(-1, last, 1)
        errors = new(2, tiles, columns)
        everything = (surrogate.mT @ mean_v, surrogate.sum(0))
        kept = kept[..., -1].int()
        kernels.kept_errors[(tiles, 2)](
            *head, *everything, lists, kept, wanted, errors, *sizes, per_block, **constants
        )
        errors = errors.gather(-1, last.repeat_interleave(per_block, 1)).sum(1, dtype=torch.float64)
    return SkipCosts(sums.cpu(), costs.cpu(), errors.cpu(), float(output.square().sum()))


KERNELS = Kernels(skip_costs, block_sums)
