"""Calibrating a pipeline: running it on a few prompts to find token orders, block masks and where blocks count."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK, block_count, usual_block_q
from paroattn.calibration.budget import Selection, interpolate, least_densities, select_by_cost
from paroattn.calibration.capture import BlockCosts, OrderErrors, StepChange
from paroattn.calibration.checkpoint import remove_work
from paroattn.calibration.cost_statistics import CostStatistics, statistics_path
from paroattn.calibration.density_search import Goal, reach
from paroattn.calibration.forecast import Forecast
from paroattn.calibration.run import (
    QUICK,
    THOROUGH,
    CalibrationRun,
    Prompt,
    Sampling,
    calibration_checkpoint,
    calibration_kernels,
    check_orders,
    spread,
)
from paroattn.calibration.sensitivity import measure_effects
from paroattn.errors import InputError
from paroattn.files import check_output
from paroattn.integrations.observe import ObservedCall
from paroattn.integrations.pipeline import Pipeline
from paroattn.keep import check_density, least_density
from paroattn.ops.backend import choose_backend
from paroattn.ops.inputs import CallKind
from paroattn.order import candidate_orders, same_blocks
from paroattn.plan import ModelIdentity, Plan, bucket_of, first_steps
from paroattn.quantize import Precision

DENSITY = 0.3  # where none is asked for


def calibrate(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    density: float | None = None,
    target_psnr: float | None = None,
    target_speed_up: float | None = None,
    precision: str | Precision = "exact",
    seed: int = 0,
    step_buckets: int = 10,
    block_q: int | None = None,
    order_names: tuple[str, ...] | None = None,
    int8_share: float = 0.25,
    dense_steps: float = 0.0,
    dense_layers: int = 0,
    steady: float = 0.0,
    thorough: bool = False,
    memory_gb: float = 8.0,
    prompt_texts: Sequence[str] | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    start: Plan | CostStatistics | str | os.PathLike[str] | None = None,
    keep_statistics: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **call_arguments: Any,
) -> Plan:
    """Find token orders and block masks for a pipeline.

    The pipeline generates from each prompt with its own attention: a few steps to choose each head's order by the error
    of its output, then all to measure what skipping each block costs. On the first prompt it then measures what errors
    of the heads and steps do to the final result (some backward passes and the later parts of three more generations),
    so that the blocks go where they count. The same arguments give the same plan. `calibration.paper.calibrate_paper`
    is the paper's method.

    Args:
        pipe: a diffusers pipeline whose transformer paroattn knows (docs/models.md).
        prompts: one or two are enough; each a string, or a mapping of pipeline arguments such as `prompt_embeds`.
        density: kept blocks over all blocks, in (0, 1], averaged over steps, layers and heads; default 0.3.
        target_psnr: instead of a density, the PSNR in dB that generating from the calibration prompts must reach
            against the model's own attention; the sparsest plan found that reaches it is returned.
        target_speed_up: instead of a density, how many times faster the transformer must be on this machine; the
            densest plan found that reaches it is returned.
        precision: number format the plan asks for: "exact", "bf16", "int8", "int4" or a `Precision`.
        seed: of the initial noise (prompt i uses seed + i), of sampled rows and of random cotangents.
        step_buckets: most groups of steps with masks of their own; where there are more steps, attention changes
            equally much in each group.
        block_q: queries per block, 64 or 128; default: 64, from 100,000 tokens on 128.
        order_names: candidate orders; default: all axis and tiled orders of the grid. ("FHW",) keeps the model's own.
        int8_share: with INT4, the share of heads computed in INT8 because INT4 hurts them most.
        dense_steps: share of the schedule, from its start, in which all blocks are computed.
        dense_layers: number of layers, from the first, that stay dense and exact.
        steady: a block takes the place of one that the step bucket before keeps only if it costs more than 1 + steady
            times as much: plan files get smaller (docs/fidelity.md).
        thorough: look at all rows, steps and passes of guidance, and measure every effect instead of interpolating.
            It takes longer; docs/fidelity.md says what it brings.
        memory_gb: host memory for what skipping blocks costs, in 10^9 bytes; what takes more lies in a file in
            `work_dir` (or where the system has temporary files) while calibration runs.
        prompt_texts: what the plan records as its prompts, where `prompts` holds embeddings; default: the prompts.
        work_dir: a folder for what every finished generation found: calibrating with the same arguments again after an
            interruption continues from them. Its files are deleted in the end. None keeps nothing.
        start: a plan of the same model, of any size, or its file: token orders are taken from it instead of being
            compared. From its statistics, if they were kept beside the file, or from `CostStatistics`, also what errors
            do to the final result: only costs of blocks are measured then.
        keep_statistics: a file for what was measured, a byte or two per block: plans of other densities are made from
            it without the model (`paroattn plan adapt`).
        progress: show a tqdm progress bar.
        **call_arguments: passed to every call of the pipeline (height, width, num_frames, num_inference_steps, ...).

    Returns:
        The plan.

    Raises:
        InputError: no prompts, density outside (0, 1], or an argument the model does not take.
        PlanError: a density too low for text blocks and one block per row, or a target that cannot be reached.

    Example:
        >>> plan = paroattn.calibrate(pipe, ["a cat", "a harbour"], density=0.3, precision="int8")  # doctest: +SKIP
    """
    density, goal, parsed = check_choice(density, target_psnr, target_speed_up, precision)
    if keep_statistics is not None:
        check_output(keep_statistics)  # before anything is measured
    selection = Selection(dense_steps=dense_steps, dense_layers=dense_layers, steady=steady)
    check_precision(pipe, parsed)
    costs = collect_costs(
        pipe,
        prompts,
        densities=() if goal else (density,),
        block_q=block_q,
        order_names=order_names,
        dense_steps=dense_steps,
        int4="int4" in (parsed.qk, parsed.pv),
        thorough=thorough,
        memory_gb=memory_gb,
        seed=seed,
        step_buckets=step_buckets,
        prompt_texts=prompt_texts,
        work_dir=work_dir,
        start=start,
        progress=progress,
        **call_arguments,
    )
    if keep_statistics is not None:
        costs.save(keep_statistics)

    def select(density: float) -> Plan:
        choice: dict[str, Any] = {"precision": parsed, "selection": selection, "int8_share": int8_share}
        return select_by_cost(costs, density=density, **choice, device=Pipeline(pipe).place[0])

    if goal is None:
        plan = select(density)
    else:
        run = CalibrationRun(pipe, prompts, (), seed, call_arguments, progress)
        run.grid, run.schedule = costs.grid, costs.schedule
        least = float((least_densities(costs, selection) * costs.shares).sum())
        plan = reach(run, goal, select, min(1.0, math.ceil(least * 1e4) / 1e4))
    remove_work(work_dir)
    return plan


def check_choice(
    density: float | None = None,
    target_psnr: float | None = None,
    target_speed_up: float | None = None,
    precision: str | Precision = "exact",
) -> tuple[float, Goal | None, Precision]:
    """The density to calibrate for, what it is to reach instead, and the precision; `InputError` for what cannot be."""
    goal = None
    if target_psnr is not None or target_speed_up is not None:
        if density is not None:
            raise InputError(f"density is {density!r} beside a target; give one of them")
        goal = Goal(target_psnr, target_speed_up)
    density = DENSITY if density is None else density
    check_density(density)
    return density, goal, Precision.parse(precision)


def check_precision(pipe: Any, precision: Precision) -> None:
    """Raise `InputError` for a precision that no backend has where the pipeline is, before anything is measured."""
    device, dtype = Pipeline(pipe).place
    if device.type != "meta":
        choose_backend("auto", CallKind([precision], device, dtype))


@torch.inference_mode(False)  # effects are measured with gradients, wherever this is called
def collect_costs(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    densities: Sequence[float] = (DENSITY,),
    seed: int = 0,
    step_buckets: int = 10,
    block_q: int | None = None,
    order_names: tuple[str, ...] | None = None,
    dense_steps: float = 0.0,
    int4: bool = False,
    effects: bool = True,
    block_sums: bool = False,
    thorough: bool = False,
    memory_gb: float = 8.0,
    prompt_texts: Sequence[str] | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    start: Plan | CostStatistics | str | os.PathLike[str] | None = None,
    progress: bool = True,
    **call_arguments: Any,
) -> CostStatistics:
    """The measuring part of `calibrate`: plans of several densities can be selected from one run.

    Args: as `calibrate`; `densities` are the ones plans will be selected for, checked as soon as the grid is known;
        effects are measured at the middle one. `int4` also measures which heads INT4 hurts. Without `effects` all
        weights are one, which serves uniform budgets. `block_sums` are for pictures and for masks that rank by them.
        Files in `work_dir` stay: the same call returns the same statistics at once (`remove_work` deletes them).
    """
    if block_q not in (None, BLOCK, 2 * BLOCK):
        raise InputError(f"block_q is {block_q!r}; expected 64 or 128")
    check_orders(order_names)
    if order_names is not None and start is not None:
        raise InputError("order_names are given beside start, whose orders are taken; give one of them")
    if not memory_gb > 0:
        raise InputError(f"memory_gb is {memory_gb!r}; expected a number above 0")
    if step_buckets < 1:
        raise InputError(f"step_buckets is {step_buckets}; expected at least 1")
    arguments: dict[str, Any] = {"step_buckets": step_buckets, "block_q": block_q, "order_names": order_names}
    arguments |= {"dense_steps": dense_steps, "int4": int4, "effects": effects, "block_sums": block_sums}
    given = _known_from(start, Pipeline(pipe).identity)
    arguments |= {"start": None if given is None else [given.grid.as_json(), given.order_names, given.order_index]}
    known = given if isinstance(given, CostStatistics) and effects and not int4 else None  # of effects
    effects = effects and known is None
    sampling = THOROUGH if thorough else QUICK
    arguments |= {"densities": sorted(densities), "sampling": asdict(sampling)}
    checkpoint = calibration_checkpoint(work_dir, Pipeline(pipe), "paroattn", prompts, seed, call_arguments, arguments)
    run = CalibrationRun(pipe, prompts, densities, seed, call_arguments, progress, checkpoint, sampling.samples)
    identity = run.identity
    shape = (identity.layers, identity.heads)
    memory = memory_gb * 1e9
    if given is not None:
        names, chosen, changes = _take_orders(run, given)
    else:
        names, chosen, changes = _choose_orders(
            run, sampling, order_names, step_buckets, block_q, seed, memory, effects
        )
    guard = math.ceil(dense_steps * run.num_steps - 1e-9)
    edges = bucket_edges_by_change(changes, step_buckets, forced=(guard,))

    def make() -> tuple[BlockCosts]:
        arguments: dict[str, Any] = {"block_sums": block_sums, "kernels_for": calibration_kernels, "seed": seed}
        arguments |= {"row_share": sampling.cost_rows, "error_share": sampling.error_rows}
        arguments |= {"in_bytes": sampling.costs_in_bytes}
        new_zeros = functools.partial(run.checkpoint.zeros, memory=memory)
        queries = block_q or usual_block_q(run.grid.tokens)
        return (BlockCosts(len(edges), names, chosen, run.grid, queries, new_zeros=new_zeros, **arguments),)

    looked_at = run.steps_of(edges, sampling.cost_steps)

    def add(accumulators: tuple[BlockCosts], call: ObservedCall) -> None:
        if (call.step, call.layer) in looked_at:
            accumulators[0].add(bucket_of(edges, call.step, call.num_steps), call)

    (costs,) = run.measure("costs", "calibration 2/4, costs of blocks", make, add, record=effects)
    found, block_q = costs.means(), block_q or usual_block_q(run.grid.tokens)
    errors, norms = found["errors"], found["norms"]
    statistics = CostStatistics(
        model=identity,
        grid=run.grid,
        order_names=names,
        order_index=chosen,
        schedule=run.schedule,
        bucket_edges=edges,
        block_q=block_q,
        **found,
        weights=torch.ones_like(norms),
        int4_effects=torch.zeros(shape, dtype=torch.float64),
        usage=run.usage(edges),
        provenance={
            **run.provenance("paroattn", prompt_texts),
            "scheduler": type(run.pipeline.scheduler).__name__,
        },
    )
    if known is not None:
        statistics = replace(statistics, weights=known.weights[_nearest_levels(statistics, known)])
    if not effects:
        run.say_where_time_went()
        return statistics
    middle = sorted(densities)[len(densities) // 2] if densities else DENSITY
    least = least_density(run.grid, block_q)
    if not densities and least > middle:  # text alone takes more
        middle = (1 + least) / 2
    uniform = Selection(budget="uniform")
    with run.timed("draft of a plan"):
        draft = select_by_cost(statistics, density=middle, selection=uniform, device=run.pipeline.place[0])
    draft_errors = interpolate(errors.amin(0), torch.full(norms.shape, middle, dtype=torch.float64))
    measured = measure_effects(run, draft, draft_errors, sampling, seed=seed, int4=int4)
    run.say_where_time_went()
    return replace(statistics, weights=measured.weights, int4_effects=measured.int4)


def _choose_orders(
    run: CalibrationRun,
    sampling: Sampling,
    order_names: tuple[str, ...] | None,
    step_buckets: int,
    block_q: int | None,
    seed: int,
    memory: float,
    effects: bool,
) -> tuple[tuple[str, ...], Tensor, list[float]]:
    """Names of the orders in use, the index of each head's, and how attention changes from step to step.

    Where every step has a bucket of its own, changes do not matter and generations end when the orders are known.
    """
    shape = (run.identity.layers, run.identity.heads)

    def order_steps(num_steps: int) -> list[int]:
        count = sampling.order_steps * len(run.pipeline.transformers)  # each is called in its own steps
        return spread(count, num_steps)

    def make() -> tuple[OrderErrors, StepChange]:
        candidates = candidate_orders(run.grid) if order_names is None else order_names
        queries = block_q or usual_block_q(run.grid.tokens)
        blocks = block_count(run.grid.tokens, queries) * block_count(run.grid.tokens, BLOCK)
        buckets, bytes_each = min(step_buckets, run.num_steps), 1 if sampling.costs_in_bytes else 2
        run.checkpoint.check_room(2 * buckets * math.prod(shape) * blocks * bytes_each, memory)
        rows, levels = sampling.order_rows, sampling.order_levels
        errors = OrderErrors(*shape, run.grid, candidates, queries, rows, seed, levels, calibration_kernels)
        changes_matter = run.num_steps > step_buckets
        return errors, StepChange(*shape, run.grid, sampling.change_rows if changes_matter else 0.0, seed)

    def compare(accumulators: tuple[OrderErrors, StepChange], call: ObservedCall) -> None:
        errors, change = accumulators
        change.add(call)
        if len(errors.order_names) > 1 and call.step in order_steps(call.num_steps):
            with forecast.comparing(errors.work):
                errors.add(call)

    def last_step(num_steps: int) -> int:
        return num_steps if num_steps > step_buckets else max(order_steps(num_steps))

    forecast = Forecast(run, sampling, order_steps, step_buckets, effects)
    description = "calibration 1/4, token orders"
    errors, change = run.measure("orders", description, make, compare, last_step, forecast.follow)
    used, index = torch.unique(errors.choose(), return_inverse=True)
    changes = change.changes() if run.num_steps > step_buckets else [1.0] * (run.num_steps - 1)
    return tuple(errors.order_names[number] for number in used.tolist()), index.to(torch.uint8), changes


def _known_from(
    start: Plan | CostStatistics | str | os.PathLike[str] | None, identity: ModelIdentity
) -> Plan | CostStatistics | None:
    """What a calibration starts from: the statistics beside a plan's file, if they are there, else the plan."""
    if isinstance(start, (str, os.PathLike)):
        beside = statistics_path(start)
        start = CostStatistics.load(beside) if beside.is_file() else Plan.load(start)
    if start is not None and start.model != identity:
        raise InputError(
            f"start is for another model: {start.model.class_name} of {start.model.layers} layers of "
            f"{start.model.heads} heads; this one is a {identity.class_name} of {identity.layers} of {identity.heads}"
        )
    return start


def _nearest_levels(statistics: CostStatistics, start: CostStatistics) -> list[int]:
    """Of each step bucket, the one of another calibration that begins at the nearest noise level."""
    own, others = (
        [each.schedule[step] for step in first_steps(each.bucket_edges, len(each.schedule))]
        for each in (statistics, start)
    )
    return [min(range(len(others)), key=lambda number: abs(others[number] - level)) for level in own]


def _take_orders(run: CalibrationRun, start: Plan | CostStatistics) -> tuple[tuple[str, ...], Tensor, list[float]]:
    """As `_choose_orders`, with the orders of another calibration; one step of each prompt shows the size."""
    shape = (run.identity.layers, run.identity.heads)

    def make() -> tuple[StepChange]:
        return (StepChange(*shape, run.grid, 0.0, 0),)

    def take(accumulators: tuple[StepChange], call: ObservedCall) -> None:
        accumulators[0].add(call)

    run.measure("orders", "calibration 1/4, size", make, take, lambda num_steps: 0)
    names = tuple(same_blocks(name, start.grid, run.grid) for name in start.order_names)
    return names, start.order_index, [1.0] * (run.num_steps - 1)


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
        raise InputError(f"step_buckets is {most}; expected at least 1")
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
