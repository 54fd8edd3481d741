"""The choice of token orders and block masks from statistics (paper, sections 4.1 and 4.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK, text_blocks
from paroattn.calibration.keep import check_density, check_reachable, keep_best
from paroattn.calibration.mask_table import MaskTable
from paroattn.grid import TokenGrid
from paroattn.plan import ModelIdentity, Plan
from paroattn.quantize import Precision


@dataclass(frozen=True, eq=False)
class CalibrationStatistics:
    """What calibration measured; plans of any density and precision are selected from it.

    Attributes:
        model, grid: what it was measured on.
        order_names: candidate orders; order_index uint8 [layers, heads]: the order chosen for each head.
        bucket_edges: start of each step bucket, fractions of the schedule.
        block_sums: mean block sums of P [buckets, layers, heads, q blocks, kv blocks] in those orders.
        usage: share of each bucket's steps in which a layer is called, float32 [buckets, layers].
        provenance: prompts, seed, steps and the like; JSON values.
    """

    model: ModelIdentity
    grid: TokenGrid
    order_names: tuple[str, ...]
    order_index: Tensor
    bucket_edges: tuple[float, ...]
    block_sums: Tensor
    usage: Tensor
    provenance: Mapping[str, Any]


def choose_orders(sparse: Tensor, incoherence: Tensor, alpha: float) -> Tensor:
    """The order of each head: least alpha * M_dense + (1 - alpha) * M_quant, each divided by its sum over the orders.

    The paper minimises although its M_sparse is better when higher; we take M_dense = 1 - M_sparse.

    Args:
        sparse, incoherence: M_sparse and M_quant, [layers, heads, orders].
        alpha: weight of sparsity, in [0, 1].

    Returns:
        uint8 [layers, heads]; the first of equal orders.

    Example:
        >>> choose_orders(torch.tensor([[[0.1, 0.8]]]), torch.tensor([[[90.0, 20.0]]]), alpha=0.5)
        tensor([[1]], dtype=torch.uint8)
    """
    combined = alpha * _share(1 - sparse) + (1 - alpha) * _share(incoherence)
    return combined.argmin(-1).to(torch.uint8)


def _share(metric: Tensor) -> Tensor:
    """Metric over its sum along the last dimension; equal shares where the sum is zero."""
    total = metric.sum(-1, keepdim=True)
    return torch.where(total > 0, metric / total, 1 / metric.shape[-1])


def select_plan(statistics: CalibrationStatistics, *, density: float, precision: str | Precision = "exact") -> Plan:
    """A plan with block-sum masks: one threshold per step bucket and layer, `density` on average over its heads.

    Raises:
        ValueError: density outside (0, 1], or an unknown precision.
        PlanError: a density below what text blocks and one block per row need.
    """
    check_density(density)
    check_reachable(density, statistics.grid)
    chosen = Precision.parse(precision)
    sums = statistics.block_sums
    required = text_blocks(statistics.grid)
    masks = torch.stack([torch.stack([keep_best(layer, density, required) for layer in step]) for step in sums])
    return plan_from_masks(
        MaskTable.of(masks),
        model=statistics.model,
        grid=statistics.grid,
        order_names=statistics.order_names,
        order_index=statistics.order_index,
        bucket_edges=statistics.bucket_edges,
        usage=statistics.usage,
        precisions=(chosen,),
        provenance={**statistics.provenance, "density": density},
    )


def plan_from_masks(
    masks: MaskTable,
    *,
    model: ModelIdentity,
    grid: TokenGrid,
    order_names: tuple[str, ...],
    order_index: Tensor,
    bucket_edges: tuple[float, ...],
    usage: Tensor,
    block_q: int = BLOCK,
    compensate: Tensor | None = None,
    precisions: tuple[Precision, ...] = (Precision(),),
    precision_index: Tensor | None = None,
    provenance: Mapping[str, Any],
) -> Plan:
    """A plan from its masks.

    A layer that is never called in a bucket gets all blocks there: another schedule may call it after all.

    Args: as the attributes of `Plan`; compensate None stands for nowhere, precision_index None for the first precision.
    """
    masks.keep_all(usage == 0)
    table, index = masks.packed()
    return Plan(
        model=model,
        grid=grid,
        order_names=order_names,
        order_index=order_index,
        precisions=precisions,
        precision_index=torch.zeros(index.shape[1:], dtype=torch.uint8) if precision_index is None else precision_index,
        bucket_edges=bucket_edges,
        mask_table=table,
        mask_index=index,
        compensate=torch.zeros(index.shape, dtype=torch.bool) if compensate is None else compensate,
        usage=usage,
        provenance=provenance,
        block_q=block_q,
    )


def step_bucket_edges(num_steps: int, most: int) -> tuple[float, ...]:
    """Bucket edges for a schedule: the steps of the first half apart, the second half shared (paper, section 4.2).

    Args:
        num_steps: steps of the schedule that calibration runs.
        most: the most buckets allowed; the first half is then cut into `most - 1` equal parts.

    Example:
        >>> step_bucket_edges(8, most=10)
        (0.0, 0.125, 0.25, 0.375, 0.5)
    """
    if most < 1:
        raise ValueError(f"step_buckets is {most}; expected at least 1")
    early = min(most - 1, (num_steps + 1) // 2)
    if num_steps < 2 or early < 1:
        return (0.0,)
    return (*(0.5 * part / early for part in range(early)), 0.5)


def bucket_edges_by_change(changes: Sequence[float], most: int, forced: Sequence[int] = ()) -> tuple[float, ...]:
    """Bucket edges such that attention changes equally much within each bucket; every step apart if `most` allows it.

    Args:
        changes: how much attention maps change from each step to the next, one fewer than there are steps; infinite
            where another bucket must begin, if `most` allows it.
        most: the most buckets allowed.
        forced: more steps at which a bucket must begin.

    Example:
        >>> bucket_edges_by_change([3.0, 1.0, 1.0, 1.0], most=3)
        (0.0, 0.2, 0.6)
    """
    if most < 1:
        raise ValueError(f"step_buckets is {most}; expected at least 1")
    steps = len(changes) + 1
    if steps <= most:
        return tuple(step / steps for step in range(steps))
    starts = {step for step, change in enumerate(changes, start=1) if change == math.inf}
    starts = set(sorted(starts | {step for step in forced if 0 < step < steps})[: most - 1])
    finite = [0.0 if change == math.inf else change for change in changes]
    parts, total = most - len(starts), sum(finite)
    bucket, passed = 0, 0.0
    for step, change in enumerate(finite, start=1):
        passed += change
        # A step starts a bucket when half of the way to it lies in the next equal part of the whole change.
        number = min(parts - 1, int(parts * (passed - change / 2) / total)) if total > 0 else 0
        if number > bucket:
            bucket = number
            starts.add(step)
    return (0.0, *(step / steps for step in sorted(starts)))
