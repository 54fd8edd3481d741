"""Methods x densities x precisions on the same prompts and seeds: the paper's, paroattn's part by part, baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from paroattn.block_mask import text_blocks
from paroattn.calibration.budget import Selection, allocate, select_by_cost
from paroattn.calibration.calibrate import collect_costs
from paroattn.calibration.cost_statistics import CostStatistics
from paroattn.calibration.mask_table import MaskTable, plan_from_masks
from paroattn.calibration.paper import CalibrationStatistics, collect_block_sums, select_plan
from paroattn.cli.models import GenerativeModel
from paroattn.keep import keep_best
from paroattn.ops.backend import formats_of
from paroattn.order import AXIS_ORDERS, token_order
from paroattn.plan import Plan, bucket_of
from paroattn_lab.baselines import DYNAMIC_BASELINES, STATIC_BASELINES, apply_dynamic, static_baseline
from paroattn_lab.quality.metrics import finite
from paroattn_lab.quality.pairs import PAPER, PAROATTN, Evaluation, Variant
from paroattn_lab.records import environment

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
        int4: whether plans may be in INT4: what it does to each head is measured, too.
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
        """Paroattn's own, over all axis and tiled orders; of parts and methods alike all rows are looked at."""
        given = {**self._common, "block_sums": True, "thorough": True}
        return collect_costs(self._pipe, self._arguments, int4=self._int4, **given)

    @cached_property
    def axis_costs(self) -> CostStatistics:
        """The same over axis orders only."""
        given = {**self._common, "block_sums": True, "thorough": True}
        return collect_costs(self._pipe, self._arguments, order_names=AXIS_ORDERS, effects=False, **given)

    @cached_property
    def _block_sums(self) -> list[CalibrationStatistics]:
        return collect_block_sums(self._pipe, self._arguments, fixed_orders=("FHW", "HWF"), **self._common)


def variants(
    measured: Measured,
    densities: Sequence[float],
    *,
    methods: Sequence[str] = (),
    lowest: float | None = 0.125,
    precisions: Sequence[tuple[float, str]] = PRECISIONS,
    backend: str = "auto",
    progress: bool = True,
) -> list[Variant]:
    """What is compared: methods at each density, the paper's and paroattn's also at `lowest`, and precisions.

    Args:
        measured: what was, or will be, measured; only what the variants need is.
        densities: shares of computed blocks.
        methods: names from `METHODS`; none stands for all.
        lowest: a density for the paper's method and paroattn's only; None for none.
        precisions: densities and precisions of further variants of the paper's method and paroattn's.
        backend: of the operator.
        progress: show a bar on stderr.

    Returns:
        Variants whose group is "paper", "paroattn", "parts", "precision" or "baseline".
    """
    makers: list[Callable[[], Variant]] = []

    def add(group: str, method: str, density: float, make: Callable[[], Plan]) -> None:
        if not methods or method in methods:
            makers.append(lambda: Variant.of(make(), method, density, group=group))

    def add_dynamic(name: str, density: float) -> None:
        def make() -> Variant:
            orders = _orders(measured.paper) if "orders" in name else None
            attach = partial(apply_dynamic, name=name, density=density, orders=orders, backend=backend)
            return Variant(name, density, attach=attach, group="baseline")

        if not methods or name in methods:
            makers.append(make)

    def own(**choice: Any) -> Callable[[], Plan]:
        return lambda: select_by_cost(measured.costs, **choice)

    def papers(**choice: Any) -> Callable[[], Plan]:
        return lambda: select_plan(measured.paper, **choice)

    for density in dict.fromkeys((*densities, *(() if lowest is None else (lowest,)))):
        add("paper", PAPER, density, papers(density=density))
        add("paroattn", PAROATTN, density, own(density=density))
    for density, precision in precisions:
        choice = {"density": density, "precision": precision}
        add("precision", PAPER, density, papers(**choice))
        add("precision", PAROATTN, density, own(**choice))
        if precision == "int4":
            add("precision", _INT4_EVERYWHERE, density, own(**choice, int8_share=0.0))
    for density in densities:
        for method, part in _PARTS.items():
            add("parts", method, density, partial(part, measured, density))
        for name in STATIC_BASELINES:
            add("baseline", name, density, partial(_static_baseline, measured, name, density))
        for name in DYNAMIC_BASELINES:
            add_dynamic(name, density)
    made = [make() for make in tqdm(makers, desc="plans", unit="plan", disable=not progress)]
    return list({variant.name: variant for variant in made}.values())


def _static_baseline(measured: Measured, name: str, density: float) -> Plan:
    return static_baseline(name, measured.original, density, temporal=measured.temporal)


def _normalised_per_step(costs: CostStatistics) -> Tensor:
    """Weights with which every step bucket gets about the same density."""
    level = (costs.errors.amin(0).mean(-1) * costs.weights).sum((1, 2), keepdim=True)
    return costs.weights / level


def _paper_with_budget(measured: Measured, density: float) -> Plan:
    """The paper's masks, with paroattn's mean density of each step; skipped blocks are dropped."""
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
        schedule=measured.costs.schedule,
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
    "paper's masks, paroattn's budget over steps": _paper_with_budget,
    "axis orders by output error": _selected(_BLOCK_SUMS, _axis_orders),
    "+ tiled orders": _selected(_BLOCK_SUMS, _all_orders),
    "+ blocks by cost": _selected(replace(_BLOCK_SUMS, score="cost"), _all_orders),
    "+ compensation where better": _selected(Selection(budget="uniform"), _all_orders),
    "compensation everywhere": _selected(Selection(compensate="always", budget="uniform"), _all_orders),
    "budget by relative error": _selected(Selection(budget="error"), _all_orders),
    "budget over heads only": _selected(Selection(), _same_for_steps),
    "paroattn without compensation": _selected(Selection(compensate="never"), _all_orders),
}
"""From the paper's method to paroattn's, one part after another; then what did not help, and one part less."""

_INT4_EVERYWHERE = "paroattn, INT4 in all heads"
METHODS = (PAPER, PAROATTN, *_PARTS, *STATIC_BASELINES, *DYNAMIC_BASELINES, _INT4_EVERYWHERE)


def _orders(statistics: CalibrationStatistics) -> Tensor:
    """The heads' orders as gather indices [layers, heads, N]."""
    orders = torch.stack([token_order(name, statistics.grid) for name in statistics.order_names])
    return orders[statistics.order_index.long()]


def ablation_records(model: GenerativeModel, evaluation: Evaluation) -> list[dict[str, Any]]:
    """One record per variant: means and standard errors, and the paired difference in PSNR to the paper's method and to
    paroattn's at the same density and precision.
    """
    common = {
        "kind": "ablation",
        "model": model.name,
        "settings": asdict(model.settings),
        "pairs": [list(pair) for pair in evaluation.pairs],
        **environment(model.pipe.device),
    }
    by_place = {(item.variant.method, *item.variant.asked): item for item in evaluation.results}
    records = []
    for item in evaluation.results:
        variant = item.variant
        record: dict[str, Any] = {
            "group": variant.group,
            "method": variant.method,
            "asked_density": variant.density,
            "density": item.density,
            "precision": variant.precision,
        }
        for metric in item.metrics():
            record |= item.summary(metric)
            record[f"{metric}_pairs"] = [None if value is None else finite(value) for value in item.figures(metric)]
        for method in (PAPER, PAROATTN):
            other = by_place.get((method, *variant.asked))
            gain, error = (math.nan, math.nan) if other is None else item.gain_over(other)
            record |= {f"over_{method}": finite(gain), f"over_{method}_error": finite(error)}
        records.append({**record, **common})
    return records
