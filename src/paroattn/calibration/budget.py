"""Spending a number of blocks where they count: densities per step bucket, layer and head, and the masks from them.

The final result moves by about the sum over steps, layers and heads of weight x error. The error is the squared change
of a head's output at a density (`costs`), the weight what a unit of it does to the final result
(`sensitivity`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from paroattn.block_mask import text_blocks
from paroattn.calibration.cost_codes import CODES_PER_OCTAVE, MOST
from paroattn.calibration.cost_statistics import CostStatistics
from paroattn.calibration.costs import COMPENSATE, DROP, LEVELS
from paroattn.calibration.mask_table import MaskTable, plan_from_masks
from paroattn.errors import InputError, PlanError
from paroattn.keep import check_density, check_reachable, keep_counts, least_blocks, least_density
from paroattn.plan import Plan
from paroattn.quantize import Precision


@dataclass(frozen=True)
class Selection:
    """How blocks are chosen from `CostStatistics`; the defaults are what paroattn does, the others are for comparison.

    Attributes:
        score: keep the blocks with the largest "cost" (change of the output when skipped) or "block sum" (the paper's).
        compensate: approximate skipped blocks by their means "never", "always", or where the error is then smaller
            ("chosen").
        budget: "effect" shares one average density by measured weights, "error" by relative errors of the heads'
            outputs, "uniform" gives every head of every step the same.
        dense_steps: share of the schedule, from its start, in which all blocks are computed; buckets that begin there.
        dense_layers: number of layers, from the first, in which all blocks are computed, in exact arithmetic.
        steady: a block takes the place of one that the step bucket before keeps only if it costs more than 1 + steady
            times as much. Masks then change less from bucket to bucket, and plan files are smaller; each keeps at least
            1 / (1 + steady) of the cost that it could.

    Raises:
        InputError: dense_steps outside [0, 1), a negative number of layers, or a negative steady.
    """

    score: Literal["cost", "block sum"] = "cost"
    compensate: Literal["never", "always", "chosen"] = "chosen"
    budget: Literal["effect", "error", "uniform"] = "effect"
    dense_steps: float = 0.0
    dense_layers: int = 0
    steady: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dense_steps < 1:
            raise InputError(f"dense_steps is {self.dense_steps!r}; expected a share of the schedule in [0, 1)")
        if not isinstance(self.dense_layers, int) or self.dense_layers < 0:
            raise InputError(f"dense_layers is {self.dense_layers!r}; expected a number of layers, at least 0")
        if not 0 <= self.steady < math.inf:
            raise InputError(f"steady is {self.steady!r}; expected a number of at least 0")

    def fixed(self, statistics: CostStatistics) -> Tensor:
        """Where all blocks are kept whatever they cost, bool [buckets, layers, heads].

        These are dense steps and layers, and layers that are never called in a bucket.
        """
        buckets, layers, heads = statistics.norms.shape
        early = torch.tensor([edge < self.dense_steps - 1e-9 for edge in statistics.bucket_edges])
        first = torch.arange(layers) < self.dense_layers
        return (early.unsqueeze(1) | first).unsqueeze(-1).expand(buckets, layers, heads) | (statistics.shares == 0)


def select_by_cost(
    statistics: CostStatistics,
    *,
    density: float,
    precision: str | Precision = "exact",
    selection: Selection = Selection(),
    int8_share: float = 0.25,
    device: torch.device | str = "cpu",
) -> Plan:
    """A plan whose masks spend `density` on average over steps, layers and heads where skipping would cost most.

    Args:
        statistics: from calibration.
        density: kept blocks over all blocks, in (0, 1], text blocks counted.
        precision: of all heads; with "int4" the heads in which it hurts most are computed in INT8.
        selection: how blocks are chosen.
        int8_share: most heads that an "int4" plan computes in INT8, as a share in [0, 1].
        device: of the model: blocks are compared there if it is a GPU.

    Raises:
        InputError: density or int8_share out of range, or an unknown precision.
        PlanError: a density below what text blocks and one block per row need.
    """
    check_density(density)
    parsed = Precision.parse(precision)
    densities = allocate(statistics, density, selection)
    errors = statistics.errors.unbind()
    dropped, approximated = (interpolate(each, densities) for each in errors)
    compensate = {
        "never": torch.zeros_like(dropped, dtype=torch.bool),
        "always": torch.ones_like(dropped, dtype=torch.bool),
        "chosen": approximated < dropped,
    }[selection.compensate]
    required = text_blocks(statistics.grid, statistics.block_q)
    where = torch.device(device if torch.device(device).type == "cuda" else "cpu")
    masks, required_there = MaskTable((*compensate.shape, *required.shape)), required.to(where)
    sparse = ~selection.fixed(statistics)
    compensate &= sparse  # where nothing is skipped there is nothing to approximate
    counts = _whole_blocks(densities, statistics.shares, sparse, required)
    for layer, bucket in sparse.any(-1).T.nonzero().tolist():
        place = (bucket, layer, sparse[bucket, layer].nonzero().flatten())
        score = _scores(statistics, selection, *place, compensate[place]).to(where)
        if selection.steady and bucket:
            before = masks.get(bucket - 1, layer, place[2].tolist(), required.shape[1]).to(where)
            score = _raised(score, before, 1 + selection.steady)
        masks.put(bucket, layer, place[2].tolist(), keep_counts(score, counts[place], required_there))
    compensate &= counts < required.numel()
    precisions, index = mixed_precision(parsed, statistics.int4_effects, int8_share)
    if selection.dense_layers and parsed != Precision():
        index[: selection.dense_layers] = len(precisions)
        precisions = (*precisions, Precision())
    return plan_from_masks(
        masks,
        model=statistics.model,
        grid=statistics.grid,
        order_names=statistics.order_names,
        order_index=statistics.order_index,
        schedule=statistics.schedule,
        bucket_edges=statistics.bucket_edges,
        usage=statistics.usage,
        block_q=statistics.block_q,
        compensate=compensate,
        precisions=precisions,
        precision_index=index,
        provenance={
            **statistics.provenance,
            "density": density,
            "selection": vars(selection),
            **({"int8_share": int8_share} if "int4" in (parsed.qk, parsed.pv) else {}),
        },
    )


def select_like(plan: Plan, statistics: CostStatistics, density: float | None = None) -> Plan:
    """The plan of some statistics whose precision and way of choosing blocks are those of another one.

    density: default: the other plan's.

    Raises:
        InputError: statistics of another model or grid than the plan's.
        PlanError: as `select_by_cost`, or a plan that was not made from statistics.
    """
    if (statistics.model, statistics.grid.boxes) != (plan.model, plan.grid.boxes):
        raise InputError(
            f"statistics are of {statistics.model.class_name} at {statistics.grid}; the plan is for "
            f"{plan.model.class_name} at {plan.grid}"
        )
    told = plan.provenance
    try:
        selection, int8_share = Selection(**told["selection"]), float(told.get("int8_share", 0.25))
        density = float(told["density"]) if density is None else density
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError("the plan does not say how its blocks were chosen; calibrate again") from error
    precision = plan.precisions[0]
    return select_by_cost(statistics, density=density, precision=precision, selection=selection, int8_share=int8_share)


def _whole_blocks(densities: Tensor, shares: Tensor, sparse: Tensor, required: Tensor) -> Tensor:
    """How many blocks each head keeps, int64 like densities: what rounding one leaves to spend goes to the next."""
    counts = torch.full(densities.shape, required.numel())
    least = least_blocks(required)
    owed = 0.0  # blocks times share of all calls
    for place in map(tuple, sparse.nonzero().tolist()):
        share, wanted = float(shares[place]), float(densities[place]) * required.numel()
        kept = min(max(round(wanted + owed / share), least), required.numel())
        owed += (wanted - kept) * share
        counts[place] = kept
    return counts


def _scores(
    statistics: CostStatistics, selection: Selection, bucket: int, layer: int, heads: Tensor, compensated: Tensor
) -> Tensor:
    """What the blocks of some heads are ranked by, [heads, q blocks, kv blocks]."""
    if selection.score == "cost":
        return statistics.costs[torch.where(compensated, COMPENSATE, DROP), bucket, layer, heads]
    if statistics.block_sums is None:
        raise InputError("score 'block sum' needs statistics with block sums; collect them with block_sums=True")
    return statistics.block_sums[bucket, layer, heads]


def _raised(score: Tensor, where: Tensor, factor: float) -> Tensor:
    """Scores, some of which count as costs that are so much larger."""
    if score.dtype == torch.uint8:
        raised = score.int() + round(CODES_PER_OCTAVE * math.log2(factor)) * (where & (score > 0))
        return raised.clamp(max=MOST).to(torch.uint8)
    return torch.where(where, score * factor, score)


def mixed_precision(
    precision: Precision, int4_effects: Tensor, int8_share: float
) -> tuple[tuple[Precision, ...], Tensor]:
    """Precisions and the index of each head, uint8 [layers, heads]: INT8 for the heads in which INT4 hurts most."""
    if not 0 <= int8_share <= 1:
        raise InputError(f"int8_share is {int8_share!r}; expected a number from 0 to 1")
    index = torch.zeros(int4_effects.shape, dtype=torch.uint8)
    count = round(int8_share * index.numel())
    if "int4" not in (precision.qk, precision.pv) or not count:
        return (precision,), index
    index.view(-1)[int4_effects.flatten().topk(count).indices] = 1
    finer = Precision(*("int8" if item == "int4" else item for item in (precision.qk, precision.pv)))
    return (precision, finer), index


def allocate(statistics: CostStatistics, density: float, selection: Selection = Selection()) -> Tensor:
    """Densities [buckets, layers, heads], float64, whose mean over the calls of a schedule is `density`.

    The budget is spent in the order of what a block brings: along the lower convex hull of each head's error over
    density, the steepest piece first.
    """
    check_reachable(density, statistics.grid, statistics.block_q)
    least, densities = least_density(statistics.grid, statistics.block_q), least_densities(statistics, selection)
    shares, fixed = statistics.shares, selection.fixed(statistics)
    left = density - float((densities * shares).sum())
    if left < -0.5 / text_blocks(statistics.grid, statistics.block_q).numel():
        raise PlanError(
            f"density {density:g} cannot be reached: dense steps and layers, text blocks and one block per row already "
            f"need {density - left:.4f}. Ask for at least that, or for fewer dense steps or layers."
        )
    if selection.budget == "uniform":
        return densities + (~fixed) * (left / max(float(shares[~fixed].sum()), 1e-30))
    ways = {"never": [DROP], "always": [COMPENSATE], "chosen": [DROP, COMPENSATE]}[selection.compensate]
    errors = statistics.errors[ways].amin(0)
    weights = statistics.weights if selection.budget == "effect" else 1 / statistics.norms.clamp(min=1e-30)
    curves = _weighted_curves(errors * weights.unsqueeze(-1), least)
    pieces = []  # gain per density, head, density wanted
    for head in (~fixed).flatten().nonzero().flatten().tolist():
        hull = _lower_hull(curves[head])
        for (a, high), (b, low) in pairwise(hull):
            pieces.append(((high - low) / (b - a), head, b - a))
    flat, share = densities.flatten(), shares.flatten().tolist()
    for _, head, width in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        taken = min(width, max(left, 0.0) / share[head])
        flat[head] += taken
        left -= taken * share[head]
        if left <= 0:
            break
    return flat.view_as(densities)


def least_densities(statistics: CostStatistics, selection: Selection) -> Tensor:
    """The least density of each head, float64 [buckets, layers, heads]: 1 where all blocks are computed."""
    least = least_density(statistics.grid, statistics.block_q)
    return torch.where(selection.fixed(statistics), 1.0, torch.full_like(statistics.norms, least, dtype=torch.float64))


def interpolate(errors: Tensor, densities: Tensor) -> Tensor:
    """Errors [..., levels] read at one density each [...], linearly; constant below the first level, zero at 1."""
    levels = torch.tensor([*LEVELS, 1.0], dtype=torch.float64)
    values = torch.cat((errors, torch.zeros_like(errors[..., :1])), -1)
    right = torch.searchsorted(levels, densities.clamp(LEVELS[0], 1.0).contiguous()).clamp(min=1)
    low, high = levels[right - 1], levels[right]
    share = ((densities.clamp(min=LEVELS[0]) - low) / (high - low)).unsqueeze(-1)
    left_values, right_values = (values.gather(-1, index.unsqueeze(-1)) for index in (right - 1, right))
    return (left_values * (1 - share) + right_values * share).squeeze(-1)


def _weighted_curves(errors: Tensor, least: float) -> list[list[tuple[float, float]]]:
    """(density, error) points of each head from the least density to 1, where the error is zero."""
    first = interpolate(errors, torch.full(errors.shape[:-1], least, dtype=torch.float64)).flatten().tolist()
    beyond = [(number, level) for number, level in enumerate((*LEVELS, 1.0)) if level > least]
    return [
        [(least, start), *((level, [*row, 0.0][number]) for number, level in beyond)]
        for start, row in zip(first, errors.flatten(0, -2).tolist(), strict=True)
    ]


def _lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the lower convex hull of points with ascending x."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (y - hull[-2][1]) * (hull[-1][0] - hull[-2][0]) <= (hull[-1][1] - hull[-2][1]) * (
            x - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull
