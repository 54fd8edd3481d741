"""The paper's calibration (sections 4.1 and 4.2): axis orders by its criterion, then block sums of attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from paroattn.calibration.calls import AttentionCall
from paroattn.calibration.capture import BlockSums, OrderScores
from paroattn.calibration.select import CalibrationStatistics, choose_orders, step_bucket_edges
from paroattn.calibration.statistics import OrderCriterion
from paroattn.integrations.calibration_run import CalibrationRun, Prompt, calibration_kernels, spread
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
    progress: bool = True,
    **call_arguments: Any,
) -> list[CalibrationStatistics]:
    """The paper's measurements: orders by its criterion, block sums in them; see `select_plan`.

    Args: as `calibrate`; `densities` are the ones plans will be selected for, checked as soon as the grid is known;
        `fixed_orders` are also measured, each for all heads ("FHW" is the model's own order).

    Returns:
        Statistics in the chosen orders, then in each of the fixed ones.
    """
    run = CalibrationRun(pipe, prompts, densities, seed, call_arguments, progress)
    identity = run.identity

    scores: list[OrderScores] = []

    def score(call: AttentionCall) -> None:
        if not scores:
            shape = (identity.layers, identity.heads)
            scores.append(OrderScores(*shape, run.grid, order_names, criterion, ORDER_ROW_SHARE, seed))
        if call.step in spread(ORDER_STEPS, call.num_steps):
            scores[0].add(call)

    if len(order_names) > 1:
        run.generate(score, "calibration 1/2, token orders")
        chosen = choose_orders(*scores[0].means(), criterion.alpha)
    else:
        chosen = torch.zeros(identity.layers, identity.heads, dtype=torch.uint8)

    choices = [(order_names, chosen), *(((name,), torch.zeros_like(chosen)) for name in fixed_orders)]
    sums: list[BlockSums] = []
    edges: list[tuple[float, ...]] = []

    def add_up(call: AttentionCall) -> None:
        if not sums:
            edges.append(step_bucket_edges(call.num_steps, step_buckets))
            sums.append(BlockSums(len(edges[0]), choices, run.grid, calibration_kernels))
        sums[0].add(bucket_of(edges[0], call.step, call.num_steps), call)

    run.generate(add_up, "calibration 2/2, block sums")
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
            bucket_edges=edges[0],
            block_sums=block_sums,
            usage=run.usage(edges[0]),
            provenance=provenance,
        )
        for (names, index), block_sums in zip(choices, sums[0].means(), strict=True)
    ]
