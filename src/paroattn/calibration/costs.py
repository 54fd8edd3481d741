"""What skipping blocks does to the output of attention: the cost of each block and the error at several densities.

A row's output is o = sum over blocks j of n_j, with n_j the block's part of P V and d_j its part of the row's P. Left
out, block j takes c_j = n_j - d_j o from the output (all c_j sum to zero); approximated by its means it takes
e_j = c_j - s_j (v̄_j - o), with s_j = count_j exp(scale q·k̄_j) on the scale of P. Skipping a set S of blocks changes the
output by exactly -sum_S c_j / sum_kept d_j, or -sum_S e_j / (sum_kept d_j + sum_S s_j).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from paroattn.block_mask import BLOCK, block_count
from paroattn.keep import keep_levels

LEVELS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)
"""Densities at which errors are measured; an error in between is interpolated, at density 1 it is zero."""

DROP, COMPENSATE = 0, 1
"""Index of the two ways to skip a block, in tensors of costs and errors."""

_CHUNK_ENTRIES = 2**22  # entries of blocks x rows x head_dim held at once


@dataclass(frozen=True, eq=False)
class SkipCosts:
    """Of one head, or a sum over calls; squared L2 norms of the change of the head's output.

    Attributes:
        block_sums: sums of P, float32 [q blocks, kv blocks] on the device of the head.
        costs: of skipping one block alone, [2, q blocks, kv blocks]: dropped, or approximated by its means; there, too.
        errors: of skipping all but the costliest blocks at each density of `LEVELS`, [2, levels] on the CPU.
        norm: squared norm of the output itself.
    """

    block_sums: Tensor
    costs: Tensor
    errors: Tensor
    norm: float


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
    rows: Tensor | None = None,
    levels: Sequence[float] = LEVELS,
) -> SkipCosts:
    """Costs and errors of skipping blocks of one head in a given order.

    Args:
        q, k, v: [N, D] in the model's order, taken as float32.
        order: gather index [N].
        scale: factor of the logits.
        required: bool [q blocks, kv blocks], never skipped (text).
        block_q: queries per block, 64 or 128.
        q_blocks: which q blocks to look at, int64 [r], ascending; default all. Results hold these rows only.
        rows: which rows of a block to look at, int64 [r], ascending; default all. They stand for the others: sums over
            them are scaled up.
        levels: densities of `errors`, ascending; the costliest blocks of the rows that memory holds at once are kept.

    Example:
        >>> q, k, v = torch.randn(3, 128, 64)
        >>> found = skip_costs(q, k, v, torch.arange(128), 0.125, torch.zeros(2, 2, dtype=torch.bool))
        >>> found.costs.shape, found.errors.shape
        (torch.Size([2, 2, 2]), torch.Size([2, 11]))
    """
    tokens, head_dim = q.shape
    columns = block_count(tokens, BLOCK)
    if q_blocks is None:
        q_blocks = torch.arange(block_count(tokens, block_q))
    rows = torch.arange(block_q) if rows is None else rows
    stands_for = block_q / len(rows)
    q, k, v = (x.float()[order] for x in (q, k, v))
    mean_k, mean_v, count = block_means(k, v)
    values = pad(v, (0, 0, 0, columns * BLOCK - tokens)).view(columns, BLOCK, head_dim)

    sums, costs, errors, norm = [], [], torch.zeros(2, len(levels), dtype=torch.float64), 0.0
    for chunk in q_blocks.split(max(1, _CHUNK_ENTRIES // (columns * len(rows) * head_dim))):
        index = (chunk.unsqueeze(-1) * block_q + rows).flatten()
        exists = (index < tokens).to(q.device)
        queries = q[index.clamp(max=tokens - 1)]
        logits = queries @ k.mT * scale
        lse = logits.logsumexp(1, keepdim=True)
        p = pad((logits - lse).exp_(), (0, columns * BLOCK - tokens)) * exists.unsqueeze(1)
        p = p.view(-1, columns, BLOCK)
        share = p.sum(-1).mT  # d: [kv blocks, rows]
        part = torch.bmm(p.transpose(0, 1), values)  # n: [kv blocks, rows, D]
        output = part.sum(0)
        change = part.addcmul_(share.unsqueeze(-1), output, value=-1)  # c
        surrogate = ((queries @ mean_k.mT * scale + count.mT.log() - lse).exp() * exists.unsqueeze(1)).mT  # s
        weight = surrogate.unsqueeze(-1)
        residual = change.addcmul(weight, mean_v.unsqueeze(1), value=-1).addcmul_(weight, output)  # e
        must = required[chunk].to(q.device)
        sums.append(share.unflatten(1, (-1, len(rows))).sum(-1).mT)
        both = []
        for way, (moved, missing) in enumerate(((change, share), (residual, share - surrogate))):
            cost = torch.linalg.vector_norm(moved, dim=-1).square().unflatten(1, (-1, len(rows))).sum(-1).mT
            both.append(cost)
            if len(levels):
                errors[way] += _errors(moved, missing, cost, must, levels).cpu()
        costs.append(torch.stack(both))
        norm += float(output.square().sum())
    block_sums, block_costs = torch.cat(sums), torch.cat(costs, 1)
    return SkipCosts(block_sums * stands_for, block_costs * stands_for, errors * stands_for, norm * stands_for)


def block_means(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key and mean value of each kv block, of k, v [..., N, D]: float32 [..., kv blocks, D]; and the numbers of
    tokens of the blocks, float32 [kv blocks, 1].
    """
    tokens = k.shape[-2]
    blocks = block_count(tokens, BLOCK)
    count = torch.full((blocks, 1), float(BLOCK), device=k.device, dtype=torch.float32)
    count[-1] = tokens - BLOCK * (blocks - 1)
    sums = (
        pad(x, (0, 0, 0, blocks * BLOCK - tokens)).unflatten(-2, (blocks, BLOCK)).sum(-2, dtype=torch.float32)
        for x in (k, v)
    )
    mean_k, mean_v = (total / count for total in sums)
    return mean_k, mean_v, count


def _errors(change: Tensor, missing: Tensor, cost: Tensor, required: Tensor, levels: Sequence[float]) -> Tensor:
    """Squared change of the output when each level's share of the costliest blocks is kept, [levels] float64.

    Args:
        change: c or e, [kv blocks, rows, D].
        missing: what a skipped block takes from the rows' sums, [kv blocks, rows].
        cost, required: [q blocks, kv blocks].
    """
    rows_of_blocks, columns = cost.shape
    left_out_by = keep_levels(cost, levels, required).unsqueeze(1)
    number = torch.arange(len(levels), device=cost.device).view(-1, 1)
    skipped = (left_out_by > number).to(change.dtype)  # [q, levels, kv]
    moved = torch.bmm(skipped, change.view(columns, rows_of_blocks, -1).transpose(0, 1))  # [q, levels, block_q * D]
    taken = torch.bmm(skipped, missing.view(columns, rows_of_blocks, -1).transpose(0, 1))  # [q, levels, block_q]
    left = (1 - taken).clamp(min=1e-6).unsqueeze(-1)
    return (moved.view(*taken.shape, -1) / left).square().sum((0, 2, 3), dtype=torch.float64)
