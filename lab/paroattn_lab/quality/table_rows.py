"""Reading records of evaluations and ablations: the rows that charts and the report show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from paroattn.errors import InputError
from paroattn_lab.quality.metrics import lower_is_closer
from paroattn_lab.quality.pairs import PAROATTN, variant_name

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
class TableRow:
    """A record with the questions that the report asks of it."""

    record: Record

    @cached_property
    def name(self) -> str:
        """The variant's: its method with what it was asked for, or a name of its own."""
        return self.record.get("variant", self._made_name)

    @property
    def _made_name(self) -> str:
        return variant_name(self.method, self.record["asked_density"], self.record["precision"])

    @property
    def method(self) -> str:
        return self.record["method"]

    @property
    def series(self) -> str:
        """One line in the chart: the method with its precision; what has a name of its own stands alone."""
        named = self.name != self._made_name
        return self.name if named else variant_name(self.method, None, self.record["precision"])

    @property
    def density(self) -> float:
        return float(self.record["density"])

    @property
    def precision(self) -> str:
        """Of the plan; rules of other papers that have none compute exactly."""
        return ", ".join(self.record.get("precisions") or [self.record["precision"]])

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


def table_rows(records: Sequence[Record]) -> list[TableRow]:
    return [TableRow(record) for record in records]


def headline(rows: Sequence[TableRow]) -> TableRow:
    """The row that the page's summary is about.

    Among those of paroattn's method, if there are any, the one nearest to `SHOWN_DENSITY`; of several as near, the one
    with the lowest precision.
    """
    if not rows:
        raise InputError("there are no records to report")
    candidates = [row for row in rows if row.method == PAROATTN] or list(rows)
    distance = min(abs(row.density - SHOWN_DENSITY) for row in candidates)
    near = [row for row in candidates if abs(row.density - SHOWN_DENSITY) < distance + 0.01]
    return min(near, key=lambda row: _bits(row.precision))


def _bits(precision: str) -> float:
    """Orders precisions from low to high."""
    return min(
        (bits for word, bits in (("int4", 4), ("int8", 8), ("fp8", 8), ("bf16", 16)) if word in precision),
        default=math.inf,
    )
