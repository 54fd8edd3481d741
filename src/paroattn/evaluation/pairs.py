"""Paired runs: the same prompts and seeds with full attention and with each variant."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from tqdm.auto import tqdm

from paroattn.calibration.select import CalibrationStatistics, select_plan
from paroattn.evaluation.metrics import Closeness, compare
from paroattn.integrations.apply import apply
from paroattn.integrations.video_model import VideoModel
from paroattn.plan import Plan

Pair = tuple[str, int]  # prompt and seed


@dataclass(frozen=True)
class Variant:
    """A plan to be compared with full attention, under the name that tables show."""

    name: str
    plan: Plan


@dataclass(frozen=True)
class VariantResult:
    """Closeness of one variant to full attention, pair by pair."""

    variant: Variant
    closeness: tuple[Closeness, ...]

    def mean(self, metric: str) -> float:
        return statistics.fmean(self._values(metric))

    def spread(self, metric: str) -> float:
        """Standard deviation over the pairs; 0 for a single pair."""
        values = self._values(metric)
        return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0

    def gain_over(self, other: VariantResult) -> tuple[float, float]:
        """Mean PSNR difference to another variant on the same pairs, and its standard error."""
        differences = [a - b for a, b in zip(self._values("psnr"), other._values("psnr"), strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        return statistics.fmean(differences), error

    def _values(self, metric: str) -> list[float]:
        return [getattr(item, metric) for item in self.closeness]


@dataclass
class Evaluation:
    """Results of all variants, and the videos of all pairs for the report.

    Attributes:
        pairs: prompts and seeds.
        results: one per variant.
        videos: by variant name ("full attention" for the reference), one [F, 3, H, W] per pair.
    """

    pairs: tuple[Pair, ...]
    results: list[VariantResult] = field(default_factory=list)
    videos: dict[str, list[Tensor]] = field(default_factory=dict)


FULL = "full attention"


def evaluate_variants(
    model: VideoModel,
    variants: Sequence[Variant],
    pairs: Sequence[Pair],
    *,
    backend: str = "auto",
    progress: bool = True,
) -> Evaluation:
    """Generate every pair with full attention and with every variant, and compare."""
    evaluation = Evaluation(pairs=tuple(pairs))
    total = len(pairs) * (len(variants) + 1)
    with tqdm(total=total, desc="generation", unit="video", disable=not progress) as bar:

        def generate_all(name: str) -> list[Tensor]:
            videos = []
            for prompt, seed in pairs:
                bar.set_postfix_str(name)
                videos.append(model.generate(prompt, seed))
                bar.update()
            return videos

        evaluation.videos[FULL] = generate_all(FULL)
        for variant in variants:
            with apply(model.pipe, variant.plan, backend=backend):
                videos = generate_all(variant.name)
            closeness = tuple(map(compare, videos, evaluation.videos[FULL]))
            evaluation.videos[variant.name] = videos
            evaluation.results.append(VariantResult(variant, closeness))
    return evaluation


def variants_of(
    reordered: CalibrationStatistics,
    original: CalibrationStatistics,
    densities: Sequence[float],
    without_orders_at: Sequence[float],
    int8_at: Sequence[float],
) -> list[Variant]:
    """The comparison of the paper's parts: with token orders, without them, and with INT8 on top."""
    variants = [Variant(f"PARO {density:g}", select_plan(reordered, density=density)) for density in densities]
    for density in without_orders_at:
        variants.append(Variant(f"without orders {density:g}", select_plan(original, density=density)))
    for density in int8_at:
        plan = select_plan(reordered, density=density, precision="int8")
        variants.append(Variant(f"PARO {density:g} + INT8", plan))
    return variants
