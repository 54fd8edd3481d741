"""Methods x densities x precisions on the same prompts and seeds: the paper's method, ours part by part, baselines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from paroattn.block_mask import text_blocks
from paroattn.calibration.budget import CostStatistics, Selection, allocate, select_by_cost
from paroattn.calibration.select import (
    CalibrationStatistics,
    least_density,
    plan_from_masks,
    select_blocks,
    select_plan,
)
from paroattn.evaluation.baselines import DYNAMIC_BASELINES, STATIC_BASELINES, apply_dynamic, static_baseline
from paroattn.evaluation.metrics import Closeness, compare
from paroattn.evaluation.pairs import Pair
from paroattn.evaluation.records import METRICS, environment, finite
from paroattn.integrations.apply import apply
from paroattn.integrations.calibrate import collect_costs
from paroattn.integrations.paper import collect_block_sums
from paroattn.integrations.video_model import VideoModel
from paroattn.order import AXIS_ORDERS, token_order
from paroattn.plan import Plan, bucket_of

PAPER = "paper"
OURS = "ours"


@dataclass(frozen=True)
class Measured:
    """All statistics that methods are made from, of the same calibration prompts.

    Attributes:
        paper: block sums in axis orders chosen by the paper's criterion.
        original: block sums in the model's own order.
        temporal: block sums with frames fastest ("HWF").
        costs: paroattn's own, over all axis and tiled orders.
        axis_costs: the same over axis orders only.
    """

    paper: CalibrationStatistics
    original: CalibrationStatistics
    temporal: CalibrationStatistics
    costs: CostStatistics
    axis_costs: CostStatistics


@dataclass(frozen=True)
class Case:
    """One row of the ablation.

    Attributes:
        group: "paper", "parts", "ours", "precision" or "baseline"; tables are made by group.
        method: its name.
        density: asked for.
        precision: of the plan.
        attach: applies it to a pipeline; the context's value may have a `density` measured while running.
        plan: for methods that have one.
    """

    group: str
    method: str
    density: float
    precision: str
    attach: Callable[[Any], AbstractContextManager[Any]]
    plan: Plan | None = None


def measure(
    model: VideoModel, prompts: Sequence[str], densities: Sequence[float], *, progress: bool = True
) -> Measured:
    """Calibrate once for all methods."""
    arguments = [model.call_arguments(prompt) for prompt in prompts]
    common: dict[str, Any] = {"densities": sorted(densities), "prompt_texts": prompts, "progress": progress}
    paper, original, temporal = collect_block_sums(model.pipe, arguments, fixed_orders=("FHW", "HWF"), **common)
    costs = collect_costs(model.pipe, arguments, int4=True, **common)
    axis_costs = collect_costs(model.pipe, arguments, order_names=AXIS_ORDERS, effects=False, **common)
    return Measured(paper, original, temporal, costs, axis_costs)


def cases(
    measured: Measured, densities: Sequence[float], *, lowest: float = 0.125, backend: str = "auto"
) -> list[Case]:
    """All rows: methods at each density, the paper's and ours also at `lowest`, and precisions.

    Args:
        measured: from `measure`.
        densities: shares of computed blocks.
        lowest: a density for the paper's method and ours only.
        backend: of the operator.
    """

    def planned(group: str, method: str, plan: Plan, density: float) -> Case:
        precision = max(map(str, plan.precisions), key=lambda name: "int4" in name)
        return Case(group, method, density, precision, partial(apply, plan=plan, backend=backend), plan)

    found = []
    for density in (*densities, lowest):
        found.append(planned("paper", PAPER, select_plan(measured.paper, density=density), density))
        found.append(planned("ours", OURS, select_by_cost(measured.costs, density=density), density))
    for density, precision in ((1.0, "int8"), (1.0, "int8/exact"), (1.0, "int4"), (0.3, "int8"), (0.5, "int4")):
        with_precision = select_plan(measured.paper, density=density, precision=precision)
        found.append(planned("precision", PAPER, with_precision, density))
        ours = select_by_cost(measured.costs, density=density, precision=precision)
        found.append(planned("precision", OURS, ours, density))
        if precision == "int4":
            alone = select_by_cost(measured.costs, density=density, precision=precision, int8_share=0.0)
            found.append(planned("precision", _INT4_EVERYWHERE, alone, density))
    for density in densities:
        for method, make in _PARTS.items():
            found.append(planned("parts", method, make(measured, density), density))
        for name in STATIC_BASELINES:
            plan = static_baseline(name, measured.original, density, temporal=measured.temporal)
            found.append(planned("baseline", name, plan, density))
        for name in DYNAMIC_BASELINES:
            orders = _orders(measured.paper) if "orders" in name else None
            attach = partial(apply_dynamic, name=name, density=density, orders=orders, backend=backend)
            found.append(Case("baseline", name, density, "exact", attach))
    return found


def _normalised_per_step(costs: CostStatistics) -> Tensor:
    """Weights with which every step bucket gets about the same density."""
    level = (costs.errors.amin(0).mean(-1) * costs.weights).sum((1, 2), keepdim=True)
    return costs.weights / level


def _paper_with_budget(measured: Measured, density: float) -> Plan:
    """The paper's masks, with the mean density that our budget gives to each step; skipped blocks are dropped."""
    source, edges = measured.paper, measured.costs.bucket_edges
    sums = source.block_sums[[bucket_of(source.bucket_edges, number, len(edges)) for number in range(len(edges))]]
    shares = allocate(measured.costs, density, Selection(compensate="never")).mean((1, 2)).tolist()
    required, least = text_blocks(source.grid), least_density(source.grid)
    masks = [
        torch.stack([select_blocks(layer, max(share, least), required) for layer in step])
        for step, share in zip(sums, shares, strict=True)
    ]
    return plan_from_masks(
        torch.stack(masks),
        model=source.model,
        grid=source.grid,
        order_names=source.order_names,
        order_index=source.order_index,
        bucket_edges=edges,
        provenance={**source.provenance, "density": density},
    )


def _selected(selection: Selection, costs: Callable[[Measured], CostStatistics]) -> Callable[[Measured, float], Plan]:
    return lambda measured, density: select_by_cost(costs(measured), density=density, selection=selection)


def _all_orders(measured: Measured) -> CostStatistics:
    return measured.costs


def _axis_orders(measured: Measured) -> CostStatistics:
    return measured.axis_costs


def _same_for_steps(measured: Measured) -> CostStatistics:
    return replace(measured.costs, weights=_normalised_per_step(measured.costs))


_BLOCK_SUMS = Selection(score="block sum", compensate="never", budget="uniform")
_PARTS: dict[str, Callable[[Measured, float], Plan]] = {
    "original order": lambda measured, density: select_plan(measured.original, density=density),
    "paper's masks, our budget over steps": _paper_with_budget,
    "axis orders by output error": _selected(_BLOCK_SUMS, _axis_orders),
    "+ tiled orders": _selected(_BLOCK_SUMS, _all_orders),
    "+ blocks by cost": _selected(replace(_BLOCK_SUMS, score="cost"), _all_orders),
    "+ compensation where better": _selected(Selection(budget="uniform"), _all_orders),
    "compensation everywhere": _selected(Selection(compensate="always", budget="uniform"), _all_orders),
    "budget by relative error": _selected(Selection(budget="error"), _all_orders),
    "budget over heads only": _selected(Selection(), _same_for_steps),
    "ours without compensation": _selected(Selection(compensate="never"), _all_orders),
}
"""From the paper's method to ours, one part after another; then what did not help, and ours with one part less."""

_INT4_EVERYWHERE = "ours, INT4 in all heads"
METHODS = (PAPER, OURS, *_PARTS, *STATIC_BASELINES, *DYNAMIC_BASELINES, _INT4_EVERYWHERE)


def _orders(statistics: CalibrationStatistics) -> Tensor:
    """The heads' orders as gather indices [layers, heads, N]."""
    orders = torch.stack([token_order(name, statistics.grid) for name in statistics.order_names])
    return orders[statistics.order_index.long()]


@dataclass(frozen=True)
class CaseResult:
    """Closeness of one case to full attention, pair by pair, and the density that was computed."""

    case: Case
    density: float
    closeness: tuple[Closeness, ...]

    def values(self, metric: str) -> list[float]:
        return [getattr(item, metric) for item in self.closeness]


def run(
    model: VideoModel, chosen: Sequence[Case], pairs: Sequence[Pair], *, progress: bool = True
) -> Iterator[CaseResult]:
    """Generate every pair with full attention once, then with every case; yields a case when all its pairs are done."""
    with tqdm(total=len(pairs) * (1 + len(chosen)), desc="ablation", unit="video", disable=not progress) as bar:
        references = []
        for prompt, seed in pairs:
            references.append(model.generate(prompt, seed))
            bar.update()
        for case in chosen:
            bar.set_postfix_str(f"{case.method} {case.density:g}")
            closeness = []
            with case.attach(model.pipe) as applied:
                for (prompt, seed), reference in zip(pairs, references, strict=True):
                    closeness.append(compare(model.generate(prompt, seed), reference))
                    bar.update()
            density = applied.density if case.plan is None else case.plan.density()
            yield CaseResult(case, density, tuple(closeness))


def ablation_records(model: VideoModel, results: Sequence[CaseResult], pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """One record per case: means and standard errors, and the paired difference in PSNR to the paper's method and to
    ours at the same density and precision.
    """
    common = {
        "kind": "ablation",
        "model": model.name,
        "settings": asdict(model.settings),
        "pairs": [list(pair) for pair in pairs],
        **environment(),
    }
    by_place = {(item.case.method, item.case.density, item.case.precision): item for item in results}
    records = []
    for item in results:
        case = item.case
        record: dict[str, Any] = {
            "group": case.group,
            "method": case.method,
            "asked_density": case.density,
            "density": item.density,
            "precision": case.precision,
        }
        for metric in METRICS:
            values = item.values(metric)
            record[metric] = finite(statistics.fmean(values))
            record[f"{metric}_error"] = finite(standard_error(values))
            record[f"{metric}_pairs"] = [finite(value) for value in values]
        for other in (PAPER, OURS):
            reference = by_place.get((other, case.density, case.precision))
            differences = (
                [own - base for own, base in zip(item.values("psnr"), reference.values("psnr"), strict=True)]
                if reference is not None
                else [math.nan]
            )
            record[f"over_{other}"] = finite(statistics.fmean(differences))
            record[f"over_{other}_error"] = finite(standard_error(differences))
        records.append({**record, **common})
    return records


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
