"""Paired runs: the same prompts and seeds with full attention and with each variant."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor
from tqdm.auto import tqdm

from paroattn.calibration.budget import CostStatistics, select_by_cost
from paroattn.calibration.select import CalibrationStatistics, select_plan
from paroattn.evaluation.metrics import Closeness, compare
from paroattn.integrations.apply import apply
from paroattn.integrations.clock import TransformerClock
from paroattn.integrations.descriptors import transformers_of
from paroattn.integrations.generation import GenerativeModel
from paroattn.plan import Plan

Pair = tuple[str, int]  # prompt and seed


@dataclass(frozen=True)
class Variant:
    """A plan to be compared with full attention, under the name that tables show."""

    name: str
    plan: Plan


@dataclass(frozen=True)
class VariantResult:
    """Closeness of one variant to full attention, and how much faster the transformer was, pair by pair."""

    variant: Variant
    closeness: tuple[Closeness, ...]
    speed_ups: tuple[float, ...]

    @property
    def speed_up(self) -> float:
        """Median over the pairs: seconds in the transformer with full attention over seconds with the variant."""
        return statistics.median(self.speed_ups)

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
        seconds: by variant name, time in the transformer per pair.
    """

    pairs: tuple[Pair, ...]
    results: list[VariantResult] = field(default_factory=list)
    videos: dict[str, list[Tensor]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)


FULL = "full attention"


def evaluate_variants(
    model: GenerativeModel,
    variants: Sequence[Variant],
    pairs: Sequence[Pair],
    *,
    backend: str = "auto",
    progress: bool = True,
) -> Evaluation:
    """Generate every pair with full attention and with every variant, one after the other, and compare."""
    evaluation = Evaluation(pairs=tuple(pairs))
    contenders = [(FULL, None), *((variant.name, variant.plan) for variant in variants)]
    evaluation.videos = {name: [] for name, _ in contenders}
    evaluation.seconds = {name: [] for name, _ in contenders}
    with tqdm(total=len(pairs) * len(contenders), desc="generation", unit="video", disable=not progress) as bar:
        for prompt, seed in pairs:
            for name, plan in contenders:
                bar.set_postfix_str(name)
                applied = nullcontext() if plan is None else apply(model.pipe, plan, strict=True, backend=backend)
                with applied, TransformerClock(*transformers_of(model.pipe)) as clock:
                    evaluation.videos[name].append(model.generate(prompt, seed))
                evaluation.seconds[name].append(clock.seconds)
                bar.update()
    for variant in variants:
        closeness = tuple(map(compare, evaluation.videos[variant.name], evaluation.videos[FULL]))
        seconds = zip(evaluation.seconds[FULL], evaluation.seconds[variant.name], strict=True)
        evaluation.results.append(VariantResult(variant, closeness, tuple(full / own for full, own in seconds)))
    return evaluation


def variants_of(
    costs: CostStatistics,
    paper: CalibrationStatistics,
    densities: Sequence[float],
    paper_at: Sequence[float],
    int8_at: Sequence[float],
) -> list[Variant]:
    """Plans of paroattn, of the paper's method, and paroattn's with INT8 on top."""
    variants = [Variant(f"paroattn {density:g}", select_by_cost(costs, density=density)) for density in densities]
    for density in paper_at:
        variants.append(Variant(f"paper {density:g}", select_plan(paper, density=density)))
    for density in int8_at:
        plan = select_by_cost(costs, density=density, precision="int8")
        variants.append(Variant(f"paroattn {density:g} + INT8", plan))
    return variants
