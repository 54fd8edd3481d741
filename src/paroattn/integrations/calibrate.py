"""Calibrating a pipeline: running it on a few prompts while statistics are taken inside its attention calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import paroattn
from paroattn.calibration.capture import BlockSums, OrderScores
from paroattn.calibration.select import (
    CalibrationStatistics,
    check_density,
    check_density_for,
    choose_orders,
    select_plan,
    step_bucket_edges,
)
from paroattn.calibration.statistics import OrderCriterion
from paroattn.grid import TokenGrid
from paroattn.integrations.attach import Attachment, transformer_of
from paroattn.integrations.descriptors import identify
from paroattn.integrations.schedule import Schedule
from paroattn.order import AXIS_ORDERS
from paroattn.plan import Plan, bucket_of
from paroattn.quantize import Precision

Prompt = str | Mapping[str, Any]
ORDER_STEPS = 3  # denoising steps at which order metrics are taken: orders are stable over steps (paper, section 4.1)
ORDER_ROW_SHARE = 0.25  # share of the rows of blocks that order metrics look at


def calibrate(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    density: float = 0.3,
    precision: str | Precision = "exact",
    seed: int = 0,
    step_buckets: int = 10,
    criterion: OrderCriterion = OrderCriterion(),
    order_names: tuple[str, ...] = AXIS_ORDERS,
    prompt_texts: Sequence[str] | None = None,
    progress: bool = True,
    **call_arguments: Any,
) -> Plan:
    """Find token orders and block masks for a pipeline (paper, sections 4.1 and 4.2).

    The pipeline generates from each prompt twice with its own attention: once to choose each head's order, once to
    add up the blocks of its attention map in that order. The same arguments give the same plan.

    Args:
        pipe: a diffusers pipeline (Wan 2.1).
        prompts: one or two are enough; each a string, or a mapping of pipeline arguments such as `prompt_embeds`.
        density: kept blocks over all blocks, in (0, 1], averaged over the heads of each layer.
        precision: number format the plan asks for: "exact", "bf16", "int8", "int4" or a `Precision`.
        seed: of the initial noise (prompt i uses seed + i) and of the sampled rows.
        step_buckets: most groups of steps with masks of their own; the second half of the schedule shares one.
        criterion: parameters of the choice of orders.
        order_names: candidate orders; ("FHW",) keeps the model's own order.
        prompt_texts: what the plan records as its prompts, where `prompts` holds embeddings; default: the prompts.
        progress: show a tqdm progress bar.
        **call_arguments: passed to every call of the pipeline (height, width, num_frames, num_inference_steps, ...).

    Returns:
        The plan.

    Raises:
        ValueError: no prompts, density outside (0, 1], or an argument the model does not take.
        PlanError: a density too low for text blocks and one block per row.

    Example:
        >>> plan = paroattn.calibrate(pipe, ["a cat", "a harbour"], density=0.3, precision="int8")  # doctest: +SKIP
    """
    Precision.parse(precision)
    statistics = collect_statistics(
        pipe,
        prompts,
        densities=(density,),
        seed=seed,
        step_buckets=step_buckets,
        criterion=criterion,
        order_names=order_names,
        prompt_texts=prompt_texts,
        progress=progress,
        **call_arguments,
    )
    return select_plan(statistics[0], density=density, precision=precision)


def collect_statistics(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    densities: Sequence[float] = (),
    seed: int = 0,
    step_buckets: int = 10,
    criterion: OrderCriterion = OrderCriterion(),
    order_names: tuple[str, ...] = AXIS_ORDERS,
    with_original_order: bool = False,
    prompt_texts: Sequence[str] | None = None,
    progress: bool = True,
    **call_arguments: Any,
) -> list[CalibrationStatistics]:
    """The measuring part of `calibrate`: plans of several densities can be selected from one run.

    Args: as `calibrate`; `densities` are the ones plans will be selected for, checked as soon as the grid is known;
        `with_original_order` also measures the model's own order, for comparison.

    Returns:
        Statistics in the chosen orders, then, if asked for, in the model's own order.
    """
    if isinstance(prompts, (str, Mapping)) or not prompts:
        raise ValueError(f"prompts is {prompts!r}; expected a list of at least one prompt")
    for density in densities:
        check_density(density)
    run = _CalibrationRun(pipe, prompts, densities, seed, call_arguments, progress)
    identity = identify(transformer_of(pipe))

    scores: list[OrderScores] = []

    def score(layer: int, schedule: Schedule, grid: TokenGrid, query: Tensor, key: Tensor, scale: float) -> None:
        if not scores:
            shape = (identity.layers, identity.heads)
            scores.append(OrderScores(*shape, grid, order_names, criterion, ORDER_ROW_SHARE, seed))
        if schedule.step in _spread(ORDER_STEPS, schedule.num_steps):
            scores[0].add(layer, query, key, scale)

    if len(order_names) > 1:
        run.generate(score, "calibration 1/2, token orders")
        chosen = choose_orders(*scores[0].means(), criterion.alpha)
    else:
        chosen = torch.zeros(identity.layers, identity.heads, dtype=torch.uint8)

    choices = [(order_names, chosen)]
    if with_original_order:
        choices.append((("FHW",), torch.zeros_like(chosen)))
    sums: list[BlockSums] = []
    edges: list[tuple[float, ...]] = []

    def add_up(layer: int, schedule: Schedule, grid: TokenGrid, query: Tensor, key: Tensor, scale: float) -> None:
        if not sums:
            edges.append(step_bucket_edges(schedule.num_steps, step_buckets))
            sums.append(BlockSums(len(edges[0]), choices, grid))
        bucket = bucket_of(edges[0], schedule.step, schedule.num_steps)
        sums[0].add(bucket, layer, query, key, scale)

    run.generate(add_up, "calibration 2/2, block sums")
    provenance = {
        "paroattn": paroattn.__version__,
        "prompts": list(prompt_texts) if prompt_texts else [_text_of(prompt) for prompt in prompts],
        "seed": seed,
        "num_inference_steps": run.num_steps,
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
            provenance=provenance,
        )
        for (names, index), block_sums in zip(choices, sums[0].means(), strict=True)
    ]


Take = Callable[[int, Schedule, TokenGrid, Tensor, Tensor, float], None]


class _CalibrationRun:
    """Generates from all prompts with the model's own attention, handing every attention call to a function."""

    grid: TokenGrid
    num_steps: int

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Prompt],
        densities: Sequence[float],
        seed: int,
        call_arguments: Mapping[str, Any],
        progress: bool,
    ):
        self._pipe = pipe
        self._prompts = prompts
        self._densities = densities
        self._seed = seed
        self._call_arguments = call_arguments
        self._progress = progress

    def generate(self, take: Take, description: str) -> None:
        layers = identify(transformer_of(self._pipe)).layers
        with tqdm(total=len(self._prompts), desc=description, unit="prompt", disable=not self._progress) as bar:

            def follow(schedule: Schedule) -> None:
                bar.set_postfix_str(f"step {schedule.step + 1}/{schedule.num_steps}")

            def check_grid(grid: TokenGrid) -> None:
                if getattr(self, "grid", grid) != grid:
                    raise ValueError(f"prompts give different token grids: {self.grid}, then {grid}")
                for density in self._densities:
                    check_density_for(density, grid)
                self.grid = grid
                self.num_steps = attachment.schedule.num_steps

            def intercept(layer: int) -> Any:
                def attend(
                    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dense: Callable[[], Tensor]
                ) -> Tensor:
                    logit_scale = query.shape[-1] ** -0.5 if scale is None else scale
                    take(layer, attachment.schedule, self.grid, query, key, logit_scale)
                    return dense()

                return attend

            attachment = Attachment(self._pipe, [intercept(layer) for layer in range(layers)], check_grid, follow)
            try:
                for number, prompt in enumerate(self._prompts):
                    arguments = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
                    generator = torch.Generator().manual_seed(self._seed + number)
                    call = {"output_type": "latent", **self._call_arguments, **arguments, "generator": generator}
                    self._pipe(**call)
                    bar.update()
            finally:
                attachment.remove()


def _text_of(prompt: Prompt) -> str | None:
    return prompt if isinstance(prompt, str) else prompt.get("prompt")


def _spread(count: int, total: int) -> set[int]:
    """`count` numbers spread evenly over range(total)."""
    return {(2 * part + 1) * total // (2 * count) for part in range(count)}
