"""Calibration's statistics on a GPU, streaming: no attention map is held, whatever the number of tokens.

`paroattn.calibration.statistics.block_sums` and `paroattn.calibration.costs.skip_costs` define the results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from paroattn.block_mask import BLOCK, block_count
from paroattn.calibration.costs import LEVELS, SkipCosts, block_means
from paroattn.calibration.kernels import Kernels
from paroattn.keep import keep_levels
from paroattn.ops.gpu.configs import block_warps, skip_cost_options
from paroattn.ops.gpu.device import check_device, on_device_of, target_here
from paroattn.quantize import padded_head_dim

_MOST_ENTRIES = 2**27  # of a tensor [heads, ...]: so many heads are looked at at once


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
    check_device(q)
    from paroattn.calibration.gpu import kernels

    table = torch.stack([order.to(q.device, torch.int32) for order in orders])
    q, k = q.detach().contiguous(), k.detach().contiguous()
    tokens, head_dim = q.shape
    blocks = block_count(tokens, BLOCK)
    lse = q.new_empty(tokens, dtype=torch.float32)
    sums = q.new_empty((len(table), blocks, blocks), dtype=torch.float32)
    width = padded_head_dim(head_dim)
    size: dict[str, Any] = {"HEAD_DIM": head_dim, "D": width, "num_warps": block_warps(width)}
    with on_device_of(q):
        kernels.row_lse[(blocks,)](q, k, lse, scale, tokens, **size)
        reordered = (x.index_select(0, table.flatten()) for x in (q, k, lse))
        kernels.block_sums[(blocks, len(table))](*reordered, sums, scale, tokens, blocks, **size)
    return sums.cpu()


def skip_costs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    orders: Sequence[Tensor],
    scale: float,
    required: Tensor,
    *,
    heads: Sequence[int] | None = None,
    block_q: int = BLOCK,
    q_blocks: Tensor | None = None,
    rows: Tensor | None = None,
    levels: Sequence[float] = LEVELS,
) -> list[SkipCosts]:
    """Costs and errors of skipping blocks, of heads [H, N, D] on a GPU in given orders.

    Args: as `paroattn.calibration.kernels.skip_costs_of_heads`; 16-bit tensors are multiplied as they are. The
        costliest blocks of a level are those of all rows that are looked at. `rows` of a block are 8, 16, 32 or
        all, all where there are levels.
    """
    check_device(q)
    if q_blocks is None:
        q_blocks = torch.arange(block_count(q.shape[1], block_q))
    if rows is None:
        rows = torch.arange(block_q)
    entries = max(block_count(q.shape[1], BLOCK) * len(q_blocks) * len(rows), math.prod(k.shape[1:]))
    at_once = max(1, _MOST_ENTRIES // entries)
    found: list[SkipCosts] = []
    with on_device_of(q):
        head_of = torch.tensor(range(len(q)) if heads is None else heads, device=q.device)
        for first in range(0, len(orders), at_once):
            own = slice(first, first + at_once)
            index = torch.stack(list(orders[own])).to(q.device, torch.int64)
            found += _skip_costs(q, k, v, head_of[own], index, scale, required, block_q, q_blocks, rows, levels)
    return found


def _skip_costs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_of: Tensor,
    orders: Tensor,
    scale: float,
    required: Tensor,
    block_q: int,
    q_blocks: Tensor,
    looked_at: Tensor,
    levels: Sequence[float],
) -> list[SkipCosts]:
    from paroattn.calibration.gpu import kernels

    device, heads, (tokens, head_dim) = q.device, len(orders), q.shape[1:]
    width = padded_head_dim(head_dim)
    columns = block_count(tokens, BLOCK)
    stands_for = block_q / len(looked_at)
    index = (q_blocks.unsqueeze(-1) * block_q + looked_at).flatten()
    index = index[index < tokens].to(device)
    rows, tiles = len(index), block_count(len(q_blocks) * len(looked_at), BLOCK)
    q, k, v = (
        x.detach()[head_of.unsqueeze(1), which] for x, which in ((q, orders[:, index]), (k, orders), (v, orders))
    )
    mean_k, mean_v, count = block_means(k, v)
    logits = mean_k @ q.float().mT * scale + count.log()
    q, k, v, mean_v = (
        pad(x, (0, width - head_dim, 0, length - x.shape[1]))
        for x, length in ((q, tiles * BLOCK), (k, columns * BLOCK), (v, columns * BLOCK), (mean_v, columns))
    )

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    # Costs rank blocks, for which a P of 16 bits will do; of what is left in the end at high densities it would not.
    rounded = q.dtype != torch.float32 and not len(levels)
    constants = {"D": width, "ROUNDED": rounded, **skip_cost_options(target_here(device), width)}
    lse, output = new(heads, tiles * BLOCK), new(heads, tiles * BLOCK, width)
    kernels.attend_rows[(tiles, heads)](q, k, v, lse, output, scale, tokens, rows, **constants)

    surrogate = torch.zeros(heads, columns, tiles * BLOCK, device=device, dtype=torch.float32)
    surrogate[..., :rows] = torch.exp2(logits.div_(math.log(2)) - lse[:, None, :rows])
    of_heads = (q, k, v, lse, output, surrogate, mean_v)

    parts = new(heads, columns, 3, tiles * BLOCK)
    kernels.block_costs[(tiles, heads)](*of_heads, parts, scale, tokens, **constants)
    parts = parts.unflatten(-1, (-1, len(looked_at))).sum(-1)[..., : len(q_blocks)] * stands_for
    parts = parts.permute(2, 0, 3, 1)  # [3, heads, q blocks, kv blocks]
    sums, costs = parts[0], parts[1:]
    norms = output.square().sum((1, 2)) * stands_for
    errors = torch.zeros(2, heads, 0, dtype=torch.float64, device=device)
    if len(levels):
        errors = _errors(of_heads, costs, levels, required[q_blocks].to(device), scale, tokens, rows)
    found = (sums, costs.transpose(0, 1), errors.transpose(0, 1).cpu(), norms.tolist())
    return [SkipCosts(*own) for own in zip(*found, strict=True)]


def _errors(
    of_heads: tuple[Tensor, ...],
    costs: Tensor,
    levels: Sequence[float],
    required: Tensor,
    scale: float,
    tokens: int,
    rows: int,
) -> Tensor:
    """Errors of `SkipCosts`, float64 [2, heads, levels]; costs [2, heads, q blocks, kv blocks]."""
    from paroattn.calibration.gpu import kernels

    surrogate, mean_v = of_heads[5:]
    heads, columns, padded = surrogate.shape
    tiles = padded // BLOCK
    per_block = tiles // costs.shape[2]

    # The blocks of a level are among those of the next one: one walk over a row's list meets all levels.
    level = keep_levels(costs, levels, required)
    lists = level.argsort(dim=-1, stable=True).int()
    kept = torch.stack([(level <= number).sum(-1) for number in range(len(levels))], -1)  # [2, heads, q blocks, levels]
    last = kept - 1
    wanted = torch.zeros(lists.shape, dtype=torch.uint8, device=costs.device).scatter_(-1, last, 1)
    errors = torch.empty((2, heads, tiles, columns), dtype=torch.float32, device=costs.device)
    everything = (surrogate.mT @ mean_v, surrogate.sum(1))
    ends = kept[..., -1].int()
    width = mean_v.shape[-1]
    constants = {"D": width, **skip_cost_options(target_here(costs.device), width, of_lists=True)}
    kernels.kept_errors[(tiles, heads, 2)](
        *of_heads, *everything, lists, ends, wanted, errors, scale, tokens, rows, per_block, **constants
    )
    return errors.gather(-1, last.repeat_interleave(per_block, 2)).sum(2, dtype=torch.float64)


KERNELS = Kernels(skip_costs, block_sums)
