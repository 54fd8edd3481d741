"""Reading records of evaluations and ablations: the rows that charts and the report show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from paroattn.errors import PlanError
from paroattn.evaluation.metrics import lower_is_closer

Record = Mapping[str, Any]
_LABELS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "cosine": "cosine similarity",
    "relative_l2": "relative L2",
    "lpips": "LPIPS",
    "latent_cosine": "cosine similarity of latents",
    "latent_relative_l2": "relative L2 of latents",
    "clip_score_change": "CLIP score, change",
    "fvd": "FVD",
}
_SPREADS = ("_spread", "_error", "_pairs")  # a name with one of these beside it in a record is a metric
_OF_ALL_PAIRS = ("fvd",)  # metrics that have no figure per pair, and so no spread
SHOWN_DENSITY = 0.3


def metric_label(name: str) -> str:
    """How a metric is called on the page; unknown ones keep the record's name."""
    return _LABELS.get(name, name.replace("_", " "))


@dataclass(frozen=True)
class Figure:
    """One metric of a row over its prompt/seed pairs.

    Attributes:
        name: of the metric, as in the record.
        mean: over the pairs; None for the infinite PSNR of equal videos.
        spread: standard deviation over the pairs; None for a single pair.
        worst: of the pairs.
        pairs: how many.
    """

    name: str
    mean: float | None
    spread: float | None
    worst: float | None
    pairs: int

    @property
    def label(self) -> str:
        return metric_label(self.name)

    def shown(self, value: float | None) -> str:
        """A value of this metric as text."""
        if value is None:
            return "∞" if self.name == "psnr" else "not defined"
        return f"{value:.2f}" if self.name == "psnr" else f"{value:.4f}"


@dataclass(frozen=True)
class Row:
    """A record with the questions that the report asks of it."""

    record: Record

    @cached_property
    def name(self) -> str:
        """The variant, or an ablation's method with what it was asked for."""
        record = self.record
        if "variant" in record:
            return str(record["variant"])
        precision = "" if record["precision"] == "exact" else f" + {record['precision']}"
        return f"{record['method']} {record['asked_density']:g}{precision}"

    @property
    def method(self) -> str:
        """What rows of several densities have in common."""
        if "method" in self.record:
            return str(self.record["method"])
        asked = self.record.get("calibration", {}).get("density")
        return self.name if asked is None else " ".join(self.name.replace(f"{asked:g}", "", 1).split())

    @property
    def series(self) -> str:
        """The method with its precision: one line in the chart."""
        record = self.record
        exact = "precision" not in record or record["precision"] == "exact"
        return self.method if exact else f"{self.method} + {record['precision']}"

    @property
    def density(self) -> float:
        return float(self.record["density"])

    @property
    def precision(self) -> str:
        """Of the plan; rules of other papers that have none compute exactly."""
        return ", ".join(self.record.get("precisions") or [self.record.get("precision", "exact")])

    @property
    def group(self) -> str:
        return str(self.record.get("group", ""))

    @property
    def speed_up(self) -> float | None:
        """Of the transformer; None where it was not measured."""
        return self.record.get("speed_up")

    @property
    def attention(self) -> Mapping[str, Any] | None:
        """Seconds of attention calls alone, from `head_study`; None where they were not measured."""
        return self.record.get("attention")

    @property
    def attention_speed_up(self) -> float | None:
        return self.attention["full_seconds"] / self.attention["seconds"] if self.attention else None

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """By name of metric, in the record's order; metrics that are not defined here are left out."""
        found = {}
        for name, value in self.record.items():
            beside = any(f"{name}{suffix}" in self.record for suffix in _SPREADS) or name in _OF_ALL_PAIRS
            if beside and not name.startswith("over_") and (value is not None or name == "psnr"):
                found[name] = self._figure(name)
        return found

    def pair_values(self, metric: str) -> list[float | None]:
        """The metric of each pair; empty where the record does not hold them."""
        if f"{metric}_pairs" in self.record:
            return list(self.record[f"{metric}_pairs"])
        pairs = self.record.get("pairs", [])
        return [pair[metric] for pair in pairs if isinstance(pair, Mapping) and metric in pair]

    def _figure(self, metric: str) -> Figure:
        values = self.pair_values(metric)
        finite = [value for value in values if value is not None]
        spread = statistics.stdev(finite) if len(finite) > 1 and len(finite) == len(values) else None
        worst = (max if lower_is_closer(metric) else min)(finite, default=None)
        return Figure(metric, self.record[metric], spread, worst, len(values))


def rows_of(records: Sequence[Record]) -> list[Row]:
    return [Row(record) for record in records]


def headline(rows: Sequence[Row]) -> Row:
    """The row that the page's summary is about.

    Among rows that reorder tokens and are not the paper's method or a baseline, the one nearest to `SHOWN_DENSITY`; of
    several as near, the one with the lowest precision.
    """
    if not rows:
        raise PlanError("there are no records to report")
    own = [row for row in rows if row.method == "ours" or _is_ours(row.record)]
    candidates = own or list(rows)
    distance = min(abs(row.density - SHOWN_DENSITY) for row in candidates)
    near = [row for row in candidates if abs(row.density - SHOWN_DENSITY) < distance + 0.01]
    return min(near, key=lambda row: _bits(row.precision))


def _is_ours(record: Record) -> bool:
    return record.get("calibration", {}).get("method") == "cost" and len(record.get("orders", [])) > 1


def _bits(precision: str) -> float:
    """Orders precisions from low to high."""
    return min(
        (bits for word, bits in (("int4", 4), ("int8", 8), ("fp8", 8), ("bf16", 16)) if word in precision),
        default=math.inf,
    )
