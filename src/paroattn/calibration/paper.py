"""The paper's calibration (sections 4.1 and 4.2): axis orders by its criterion, the largest block sums."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from paroattn.block_mask import text_blocks
from paroattn.calibration.capture import BlockSums, OrderScores
from paroattn.calibration.checkpoint import remove_work
from paroattn.calibration.mask_table import MaskTable, plan_from_masks
from paroattn.calibration.run import (
    THOROUGH,
    CalibrationRun,
    Prompt,
    calibration_checkpoint,
    calibration_kernels,
    check_orders,
    spread,
)
from paroattn.calibration.statistics import OrderCriterion
from paroattn.errors import InputError
from paroattn.grid import TokenGrid
from paroattn.integrations.observe import ObservedCall
from paroattn.integrations.pipeline import Pipeline
from paroattn.keep import check_density, check_reachable, keep_best
from paroattn.order import AXIS_ORDERS
from paroattn.plan import ModelIdentity, Plan, bucket_of
from paroattn.quantize import Precision

METRIC_ROW_SHARE = 0.25  # share of the rows of blocks that order metrics look at


def calibrate_paper(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    density: float = 0.3,
    precision: str | Precision = "exact",
    criterion: OrderCriterion = OrderCriterion(),
    order_names: tuple[str, ...] = AXIS_ORDERS,
    work_dir: str | os.PathLike[str] | None = None,
    **measuring: Any,
) -> Plan:
    """A plan as the PAROAttention paper makes it, to compare with: `paroattn.calibrate` comes closer (docs/results.md).

    Axis orders by the paper's criterion, the blocks with the largest sums of P, one density for each layer and step.

    Args:
        pipe, prompts, density, precision, work_dir: as `paroattn.calibrate`.
        criterion: parameters of the paper's choice of orders.
        order_names: candidate orders.
        **measuring: seed, step_buckets, prompt_texts, progress and arguments of the pipeline, as `collect_block_sums`.

    Returns:
        The plan.

    Raises:
        InputError: as `paroattn.calibrate`.
        PlanError: a density too low for text blocks and one block per row.

    Example:
        >>> plan = calibrate_paper(pipe, ["a cat"], density=0.5)  # doctest: +SKIP
    """
    precision = Precision.parse(precision)
    measuring |= {"densities": (density,), "criterion": criterion, "order_names": order_names, "work_dir": work_dir}
    (statistics,) = collect_block_sums(pipe, prompts, **measuring)
    plan = select_plan(statistics, density=density, precision=precision)
    remove_work(work_dir)
    return plan


@dataclass(frozen=True, eq=False)
class CalibrationStatistics:
    """What calibration measured; plans of any density and precision are selected from it.

    Attributes:
        model, grid: what it was measured on.
        order_names: candidate orders; order_index uint8 [layers, heads]: the order chosen for each head.
        schedule: noise level of each step, descending.
        bucket_edges: start of each step bucket, fractions of the schedule.
        block_sums: mean block sums of P [buckets, layers, heads, q blocks, kv blocks] in those orders.
        usage: share of each bucket's steps in which a layer is called, float32 [buckets, layers].
        provenance: prompts, seed, steps and the like; JSON values.
    """

    model: ModelIdentity
    grid: TokenGrid
    order_names: tuple[str, ...]
    order_index: Tensor
    schedule: tuple[float, ...]
    bucket_edges: tuple[float, ...]
    block_sums: Tensor
    usage: Tensor
    provenance: Mapping[str, Any]


def collect_block_sums(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    densities: Sequence[float] = (),
    seed: int = 0,
    step_buckets: int = 10,
    criterion: OrderCriterion = OrderCriterion(),
    order_names: tuple[str, ...] = AXIS_ORDERS,
    fixed_orders: Sequence[str] = (),
    prompt_texts: Sequence[str] | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **call_arguments: Any,
) -> list[CalibrationStatistics]:
    """The paper's measurements: orders by its criterion, block sums in them; see `select_plan`.

    Args: as `calibrate`; `densities` are the ones plans will be selected for, checked as soon as the grid is known;
        `fixed_orders` are also measured, each for all heads ("FHW" is the model's own order). Files in `work_dir` stay.

    Returns:
        Statistics in the chosen orders, then in each of the fixed ones.
    """
    check_orders(order_names)
    arguments = {"step_buckets": step_buckets, "criterion": asdict(criterion), "order_names": order_names}
    arguments["fixed_orders"] = fixed_orders
    checkpoint = calibration_checkpoint(work_dir, Pipeline(pipe), "paper", prompts, seed, call_arguments, arguments)
    run = CalibrationRun(pipe, prompts, densities, seed, call_arguments, progress, checkpoint)
    identity = run.identity
    shape = (identity.layers, identity.heads)

    def make_scores() -> tuple[OrderScores]:
        return (OrderScores(*shape, run.grid, order_names, criterion, METRIC_ROW_SHARE, seed),)

    def score(accumulators: tuple[OrderScores], call: ObservedCall) -> None:
        if call.step in spread(THOROUGH.order_steps, call.num_steps):
            accumulators[0].add(call)

    chosen = torch.zeros(shape, dtype=torch.uint8)
    if len(order_names) > 1:
        (scores,) = run.measure("scores", "calibration 1/2, token orders", make_scores, score)
        chosen = choose_orders(*scores.means(), criterion.alpha)
    choices = [(order_names, chosen), *(((name,), torch.zeros_like(chosen)) for name in fixed_orders)]

    def make_sums() -> tuple[BlockSums]:
        return (BlockSums(len(step_bucket_edges(run.num_steps, step_buckets)), choices, run.grid, calibration_kernels),)

    def add_up(accumulators: tuple[BlockSums], call: ObservedCall) -> None:
        edges = step_bucket_edges(call.num_steps, step_buckets)
        accumulators[0].add(bucket_of(edges, call.step, call.num_steps), call)

    (sums,) = run.measure("sums", "calibration 2/2, block sums", make_sums, add_up)
    run.say_where_time_went()
    edges = step_bucket_edges(run.num_steps, step_buckets)
    provenance = {
        **run.provenance("paper", prompt_texts),
        "criterion": {
            "alpha": criterion.alpha,
            "epsilon": criterion.epsilon_for(run.grid.tokens),
            "sigma": criterion.sigma,
        },
    }
    return [
        CalibrationStatistics(
            model=identity,
            grid=run.grid,
            order_names=names,
            order_index=index,
            schedule=run.schedule,
            bucket_edges=edges,
            block_sums=block_sums,
            usage=run.usage(edges),
            provenance=provenance,
        )
        for (names, index), block_sums in zip(choices, sums.means(), strict=True)
    ]


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
        InputError: density outside (0, 1], or an unknown precision.
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
        schedule=statistics.schedule,
        bucket_edges=statistics.bucket_edges,
        usage=statistics.usage,
        precisions=(chosen,),
        provenance={**statistics.provenance, "density": density},
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
        raise InputError(f"step_buckets is {most}; expected at least 1")
    early = min(most - 1, (num_steps + 1) // 2)
    if num_steps < 2 or early < 1:
        return (0.0,)
    return (*(0.5 * part / early for part in range(early)), 0.5)
