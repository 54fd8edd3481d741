"""Methods x densities x precisions on the same prompts and seeds: the paper's method, ours part by part, baselines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from paroattn.block_mask import text_blocks
from paroattn.calibration.budget import CostStatistics, Selection, allocate, select_by_cost
from paroattn.calibration.keep import keep_best
from paroattn.calibration.mask_table import MaskTable
from paroattn.calibration.select import CalibrationStatistics, plan_from_masks, select_plan
from paroattn.evaluation.baselines import DYNAMIC_BASELINES, STATIC_BASELINES, apply_dynamic, static_baseline
from paroattn.evaluation.learned_metrics import LearnedMetrics
from paroattn.evaluation.metrics import Closeness, finite, standard_error, summary
from paroattn.evaluation.pair_store import PairStore
from paroattn.evaluation.pairs import Pair, Variant, evaluate_pairs
from paroattn.evaluation.records import environment
from paroattn.integrations.apply import apply
from paroattn.integrations.calibrate import collect_costs
from paroattn.integrations.generation import GenerativeModel
from paroattn.integrations.paper import collect_block_sums
from paroattn.ops.backend import formats_of
from paroattn.order import AXIS_ORDERS, token_order
from paroattn.plan import Plan, bucket_of

PAPER = "paper"
OURS = "ours"
PRECISIONS = ((1.0, "int8"), (1.0, "int8/exact"), (1.0, "int4"), (0.3, "int8"), (0.5, "int4"))


def precisions_of(backend: str) -> tuple[tuple[float, str], ...]:
    """Those of `PRECISIONS` that a backend computes."""
    formats = formats_of(backend)
    return tuple(row for row in PRECISIONS if {*row[1].split("/")} <= formats)


class Measured:
    """Statistics that methods are made from, of the same calibration prompts; each is measured when first asked for.

    Args:
        model: what is calibrated.
        prompts: to calibrate on.
        densities: the least of them, checked before anything is measured, is the least that plans will have.
        work_dir: where finished generations of the calibrations are kept; None for nowhere.
        int4: whether our plans may be in INT4: what it does to each head is measured, too.
        progress: show a progress bar on stderr.
    """

    def __init__(
        self,
        model: GenerativeModel,
        prompts: Sequence[str],
        densities: Sequence[float],
        *,
        work_dir: Path | None = None,
        int4: bool = True,
        progress: bool = True,
    ):
        self._int4 = int4
        self._pipe = model.pipe
        self._arguments = [model.call_arguments(prompt) for prompt in prompts]
        self._common: dict[str, Any] = {
            "densities": sorted(densities),
            "prompt_texts": prompts,
            "work_dir": work_dir,
            "progress": progress,
        }

    @property
    def paper(self) -> CalibrationStatistics:
        """Block sums in axis orders chosen by the paper's criterion."""
        return self._block_sums[0]

    @property
    def original(self) -> CalibrationStatistics:
        """Block sums in the model's own order."""
        return self._block_sums[1]

    @property
    def temporal(self) -> CalibrationStatistics:
        """Block sums with frames fastest ("HWF")."""
        return self._block_sums[2]

    @cached_property
    def costs(self) -> CostStatistics:
        """Paroattn's own, over all axis and tiled orders."""
        return collect_costs(self._pipe, self._arguments, int4=self._int4, block_sums=True, **self._common)

    @cached_property
    def axis_costs(self) -> CostStatistics:
        """The same over axis orders only."""
        return collect_costs(
            self._pipe, self._arguments, order_names=AXIS_ORDERS, effects=False, block_sums=True, **self._common
        )

    @cached_property
    def _block_sums(self) -> list[CalibrationStatistics]:
        return collect_block_sums(self._pipe, self._arguments, fixed_orders=("FHW", "HWF"), **self._common)


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

    @property
    def name(self) -> str:
        """Different for every case."""
        return f"{self.method} {self.density:g} {self.precision}"


def cases(
    measured: Measured,
    densities: Sequence[float],
    *,
    methods: Sequence[str] = (),
    lowest: float | None = 0.125,
    precisions: Sequence[tuple[float, str]] = PRECISIONS,
    backend: str = "auto",
    progress: bool = True,
) -> list[Case]:
    """The rows: methods at each density, the paper's and ours also at `lowest`, and precisions.

    Args:
        measured: what was, or will be, measured; only what the rows need is.
        densities: shares of computed blocks.
        methods: names from `METHODS`; none stands for all.
        lowest: a density for the paper's method and ours only; None for none.
        precisions: densities and precisions of further rows of the paper's method and ours.
        backend: of the operator.
        progress: show a bar on stderr.
    """
    rows: list[Callable[[], Case]] = []

    def add(group: str, method: str, density: float, make: Callable[[], Plan]) -> None:
        def row() -> Case:
            plan = make()
            precision = max(map(str, plan.precisions), key=lambda name: "int4" in name)
            attach = partial(apply, plan=plan, strict=True, backend=backend)
            return Case(group, method, density, precision, attach, plan)

        if not methods or method in methods:
            rows.append(row)

    def add_dynamic(name: str, density: float) -> None:
        def row() -> Case:
            orders = _orders(measured.paper) if "orders" in name else None
            attach = partial(apply_dynamic, name=name, density=density, orders=orders, backend=backend)
            return Case("baseline", name, density, "exact", attach)

        if not methods or name in methods:
            rows.append(row)

    def ours(**choice: Any) -> Callable[[], Plan]:
        return lambda: select_by_cost(measured.costs, **choice)

    def papers(**choice: Any) -> Callable[[], Plan]:
        return lambda: select_plan(measured.paper, **choice)

    for density in dict.fromkeys((*densities, *(() if lowest is None else (lowest,)))):
        add("paper", PAPER, density, papers(density=density))
        add("ours", OURS, density, ours(density=density))
    for density, precision in precisions:
        choice = {"density": density, "precision": precision}
        add("precision", PAPER, density, papers(**choice))
        add("precision", OURS, density, ours(**choice))
        if precision == "int4":
            add("precision", _INT4_EVERYWHERE, density, ours(**choice, int8_share=0.0))
    for density in densities:
        for method, part in _PARTS.items():
            add("parts", method, density, partial(part, measured, density))
        for name in STATIC_BASELINES:
            add("baseline", name, density, partial(_static_baseline, measured, name, density))
        for name in DYNAMIC_BASELINES:
            add_dynamic(name, density)
    made = [row() for row in tqdm(rows, desc="plans", unit="plan", disable=not progress)]
    return list({case.name: case for case in made}.values())


def _static_baseline(measured: Measured, name: str, density: float) -> Plan:
    return static_baseline(name, measured.original, density, temporal=measured.temporal)


def _normalised_per_step(costs: CostStatistics) -> Tensor:
    """Weights with which every step bucket gets about the same density."""
    level = (costs.errors.amin(0).mean(-1) * costs.weights).sum((1, 2), keepdim=True)
    return costs.weights / level


def _paper_with_budget(measured: Measured, density: float) -> Plan:
    """The paper's masks, with the mean density that our budget gives to each step; skipped blocks are dropped."""
    source, edges = measured.paper, measured.costs.bucket_edges
    sums = source.block_sums[[bucket_of(source.bucket_edges, number, len(edges)) for number in range(len(edges))]]
    shares = allocate(measured.costs, density, Selection(compensate="never")).mean((1, 2)).tolist()
    required = text_blocks(source.grid)
    masks = [
        torch.stack([keep_best(layer, share, required) for layer in step])
        for step, share in zip(sums, shares, strict=True)
    ]
    return plan_from_masks(
        MaskTable.of(torch.stack(masks)),
        model=source.model,
        grid=source.grid,
        order_names=source.order_names,
        order_index=source.order_index,
        bucket_edges=edges,
        usage=measured.costs.usage,
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

    def figures(self, metric: str) -> list[float | None]:
        return [item.values().get(metric) for item in self.closeness]


def run(
    model: GenerativeModel,
    chosen: Sequence[Case],
    pairs: Sequence[Pair],
    *,
    store: PairStore | None = None,
    learned: LearnedMetrics | None = None,
    progress: bool = True,
) -> Iterator[list[CaseResult]]:
    """Generate every pair with full attention and with every case; yields the results so far after each pair.

    Args:
        model: what generates.
        chosen: from `cases`.
        pairs: prompts and seeds.
        store: keeps results: those that it has are not computed again. Default: nowhere.
        learned: metrics that need networks; default: none.
        progress: show a bar on stderr.
    """
    variants = [Variant(case.name, case.plan, case.attach) for case in chosen]
    how: dict[str, Any] = {"store": store, "learned": learned, "progress": progress}
    for evaluation in evaluate_pairs(model, variants, pairs, keep_videos=0, **how):
        yield [
            CaseResult(case, result.density, result.closeness)
            for case, result in zip(chosen, evaluation.results, strict=True)
        ]


def ablation_records(
    model: GenerativeModel, results: Sequence[CaseResult], pairs: Sequence[Pair]
) -> list[dict[str, Any]]:
    """One record per case: means and standard errors, and the paired difference in PSNR to the paper's method and to
    ours at the same density and precision.
    """
    common = {
        "kind": "ablation",
        "model": model.name,
        "settings": asdict(model.settings),
        "pairs": [list(pair) for pair in pairs],
        **environment(model.pipe.device),
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
        for metric in dict.fromkeys(name for own in item.closeness for name in own.values()):
            values = item.figures(metric)
            record |= summary(metric, values)
            record[f"{metric}_pairs"] = [None if value is None else finite(value) for value in values]
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
