"""The paper's calibration (sections 4.1 and 4.2): axis orders by its criterion, then block sums of attention maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from paroattn.calibration.calls import AttentionCall
from paroattn.calibration.capture import BlockSums, OrderScores
from paroattn.calibration.select import CalibrationStatistics, choose_orders, step_bucket_edges
from paroattn.calibration.statistics import OrderCriterion
from paroattn.integrations.calibration_run import (
    CalibrationRun,
    Prompt,
    calibration_checkpoint,
    calibration_kernels,
    spread,
)
from paroattn.order import AXIS_ORDERS
from paroattn.plan import bucket_of

ORDER_STEPS = 3  # denoising steps at which order metrics are taken: orders are stable over steps (paper, section 4.1)
ORDER_ROW_SHARE = 0.25  # share of the rows of blocks that order metrics look at


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
    arguments = {"step_buckets": step_buckets, "criterion": asdict(criterion), "order_names": order_names}
    arguments["fixed_orders"] = fixed_orders
    checkpoint = calibration_checkpoint(work_dir, pipe, "paper", prompts, seed, call_arguments, arguments)
    run = CalibrationRun(pipe, prompts, densities, seed, call_arguments, progress, checkpoint)
    identity = run.identity
    shape = (identity.layers, identity.heads)

    def make_scores() -> tuple[OrderScores]:
        return (OrderScores(*shape, run.grid, order_names, criterion, ORDER_ROW_SHARE, seed),)

    def score(accumulators: tuple[OrderScores], call: AttentionCall) -> None:
        if call.step in spread(ORDER_STEPS, call.num_steps):
            accumulators[0].add(call)

    chosen = torch.zeros(shape, dtype=torch.uint8)
    if len(order_names) > 1:
        (scores,) = run.measure("scores", "calibration 1/2, token orders", make_scores, score)
        chosen = choose_orders(*scores.means(), criterion.alpha)
    choices = [(order_names, chosen), *(((name,), torch.zeros_like(chosen)) for name in fixed_orders)]

    def make_sums() -> tuple[BlockSums]:
        return (BlockSums(len(step_bucket_edges(run.num_steps, step_buckets)), choices, run.grid, calibration_kernels),)

    def add_up(accumulators: tuple[BlockSums], call: AttentionCall) -> None:
        edges = step_bucket_edges(call.num_steps, step_buckets)
        accumulators[0].add(bucket_of(edges, call.step, call.num_steps), call)

    (sums,) = run.measure("sums", "calibration 2/2, block sums", make_sums, add_up)
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
            bucket_edges=edges,
            block_sums=block_sums,
            usage=run.usage(edges),
            provenance=provenance,
        )
        for (names, index), block_sums in zip(choices, sums.means(), strict=True)
    ]
