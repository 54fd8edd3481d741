"""Paired runs: the same prompts and seeds with full attention and with each variant."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from paroattn.cli.models import GenerativeModel
from paroattn.errors import InputError
from paroattn.integrations.apply import apply
from paroattn.integrations.clock import TransformerClock
from paroattn.integrations.pipeline import Pipeline
from paroattn.plan import Plan
from paroattn_lab.quality.final_latents import FinalLatents
from paroattn_lab.quality.learned_metrics import LearnedMetrics, frechet_distance
from paroattn_lab.quality.metrics import Closeness, compare, finite, standard_error, summary
from paroattn_lab.quality.pair_store import PairStore

Pair = tuple[str, int]  # prompt and seed
FULL, PAROATTN, PAPER = "full attention", "paroattn", "paper"  # methods; others are named where they are made
KEPT_VIDEOS = 8
"""Videos of the first pairs are kept in memory for the report."""


def evaluation_psnr(
    model: GenerativeModel,
    plan: Plan,
    references: Sequence[Tensor],
    pairs: Sequence[Pair] | None = None,
    repair: bool = False,
) -> list[float]:
    """PSNR of pairs (default: a model's own) with a plan, against the frames that full attention made of them."""
    with apply(model.pipe, plan, strict=True, repair=repair):
        frames = [model.generate(*pair) for pair in pairs or model.evaluation_pairs]
    return [compare(one, other).psnr for one, other in zip(frames, references, strict=True)]


@dataclass(frozen=True)
class Variant:
    """Attention to be compared with full attention.

    Attributes:
        method: that chooses the blocks.
        density: asked for, where one was.
        precision: of the products.
        plan: applied to the pipeline; None for mask rules without a plan, which then need `attach`.
        attach: applies something else to a pipeline; the context's value has a `density` measured while running.
        label: a name of its own, of a plan that comes from a file.
        group: of tables of the ablation.
    """

    method: str
    density: float | None = None
    precision: str = "exact"
    plan: Plan | None = None
    attach: Callable[[Any], AbstractContextManager[Any]] | None = None
    label: str | None = None
    group: str = ""

    @classmethod
    def of(cls, plan: Plan, method: str, density: float | None, **others: Any) -> Variant:
        """The variant of a plan; of heads in several precisions INT4 counts."""
        precision = max(map(str, plan.precisions), key=lambda name: "int4" in name)
        return cls(method, density, precision, plan, **others)

    @property
    def name(self) -> str:
        """What tables show."""
        return self.label or variant_name(self.method, self.density, self.precision)

    @property
    def asked(self) -> tuple[float | None, str]:
        """What methods are compared at: density and precision."""
        return self.density, self.precision


def variant_name(method: str, density: float | None, precision: str) -> str:
    """A method with what it was asked for.

    Example:
        >>> variant_name("paroattn", 0.3, "int8"), variant_name("paper", None, "exact")
        ('paroattn 0.3 + int8', 'paper')
    """
    asked = "" if density is None else f" {density:g}"
    return f"{method}{asked}" + ("" if precision == "exact" else f" + {precision}")


@dataclass(frozen=True)
class VariantResult:
    """Closeness of one variant to full attention, and how much faster the transformer was, pair by pair.

    Attributes:
        variant: what was compared.
        closeness, speed_ups: by pair.
        densities: computed blocks over all blocks, by pair.
        fvd: Fréchet distance of features of all videos, where there is a network for it.
    """

    variant: Variant
    closeness: tuple[Closeness, ...]
    speed_ups: tuple[float, ...]
    densities: tuple[float, ...] = ()
    fvd: float | None = None

    @property
    def speed_up(self) -> float:
        """Median over the pairs: seconds in the transformer with full attention over seconds with the variant."""
        return statistics.median(self.speed_ups)

    @property
    def density(self) -> float:
        """The plan's, or the mean of what was measured."""
        return statistics.fmean(self.densities) if self.variant.plan is None else self.variant.plan.density()

    def mean(self, metric: str) -> float:
        return statistics.fmean(self._values(metric))

    def spread(self, metric: str) -> float:
        """Standard deviation over the pairs; 0 for a single pair."""
        values = self._values(metric)
        return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0

    def gain_over(self, other: VariantResult) -> tuple[float, float]:
        """Mean PSNR difference to another variant on the same pairs, and its standard error."""
        differences = [a - b for a, b in zip(self._values("psnr"), other._values("psnr"), strict=True)]
        return statistics.fmean(differences), standard_error(differences)

    def metrics(self) -> list[str]:
        """Names of all figures that some pair has."""
        return list(dict.fromkeys(name for item in self.closeness for name in item.values()))

    def summary(self, metric: str) -> dict[str, float | None]:
        """Mean, standard error, spread and worst case, see `paroattn_lab.quality.metrics.summary`."""
        return summary(metric, self.figures(metric))

    def figures(self, metric: str) -> list[float | None]:
        """By pair; None where it is not defined."""
        return [item.values().get(metric) for item in self.closeness]

    def _values(self, metric: str) -> list[float]:
        return [getattr(item, metric) for item in self.closeness]


@dataclass
class Evaluation:
    """Results of all variants on the pairs that are done, and videos for the report.

    Attributes:
        pairs: prompts and seeds.
        results: one per variant.
        videos: by variant name ("full attention" for the reference), one [F, 3, H, W] for each of the first
            `KEPT_VIDEOS` pairs.
        seconds: by variant name, time in the transformer per pair.
        launch_shares: by variant name, how much of that time the CPU took to launch what the transformer does.
        missing: metrics that could not be computed, and what they need.
    """

    pairs: tuple[Pair, ...]
    results: list[VariantResult] = field(default_factory=list)
    videos: dict[str, list[Tensor]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    launch_shares: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def evaluate_variants(
    model: GenerativeModel, variants: Sequence[Variant], pairs: Sequence[Pair], **how: Any
) -> Evaluation:
    """Generate every pair with full attention and with every variant, one after the other, and compare.

    Args: as `evaluate_pairs`.
    """
    evaluation = Evaluation(pairs=())
    for evaluation in evaluate_pairs(model, variants, pairs, **how):  # noqa: B007 - the last one counts
        pass
    return evaluation


def evaluate_pairs(
    model: GenerativeModel,
    variants: Sequence[Variant],
    pairs: Sequence[Pair],
    *,
    backend: str = "auto",
    learned: LearnedMetrics | None = None,
    store: PairStore | None = None,
    keep_videos: int = KEPT_VIDEOS,
    progress: bool = True,
) -> Iterator[Evaluation]:
    """Generate pair by pair and compare; yields the evaluation of the pairs that are done after each of them.

    Args:
        model: what generates.
        variants: what is compared with full attention.
        pairs: prompts and seeds.
        backend: of the operator.
        learned: metrics that need networks; default: none.
        store: keeps results: those that it has are not computed again. Default: nowhere.
        keep_videos: of how many pairs videos are kept in memory.
        progress: show a bar on stderr.
    """
    store, learned = store or PairStore(), learned or LearnedMetrics()
    contenders = [Variant(FULL), *variants]
    rows: list[list[dict[str, Any]]] = []
    videos: dict[str, list[Tensor]] = {item.name: [] for item in contenders}
    kept = sum(store.load(pair, number) is not None for pair in range(len(pairs)) for number in range(len(contenders)))
    total = len(pairs) * len(contenders)
    with tqdm(total=total, initial=kept, desc="generation", unit="video", disable=not progress) as bar:
        for pair, (prompt, seed) in enumerate(pairs):
            pair_run = _PairRun(model, store, learned, backend, pair, prompt, seed, shown=pair < keep_videos)
            results = []
            for number, variant in enumerate(contenders):
                result = store.load(pair, number)
                if result is None:
                    bar.set_postfix_str(variant.name)
                    result = pair_run.generate(number, variant)
                    bar.update()
                results.append(result)
                if pair < keep_videos:
                    videos[variant.name].append(pair_run.frames(number))
            if pair >= keep_videos:
                store.drop_sample(pair, 0)
            rows.append(results)
            yield _evaluation(contenders, pairs[: pair + 1], rows, videos, learned)


class _PairRun:
    """One pair: generates with full attention, and with variants to compare them with it."""

    def __init__(
        self,
        model: GenerativeModel,
        store: PairStore,
        learned: LearnedMetrics,
        backend: str,
        pair: int,
        prompt: str,
        seed: int,
        shown: bool,
    ):
        self._model, self._store, self._learned, self._backend = model, store, learned, backend
        self._pair, self._prompt, self._seed, self._shown = pair, prompt, seed, shown
        self._samples: dict[int, tuple[Tensor, Tensor | None]] = {}

    def generate(self, number: int, variant: Variant) -> dict[str, Any]:
        """Generate, compare with full attention (contender 0) and keep the result."""
        scheduler = self._model.pipe.scheduler
        with self._applied(variant) as applied:
            with TransformerClock(*Pipeline(self._model.pipe).transformers) as clock, FinalLatents(scheduler) as final:
                frames = self._model.generate(self._prompt, self._seed)
            times = {"seconds": clock.seconds, "launch_seconds": clock.launch_seconds}
            result: dict[str, Any] = {**times, "density": 1.0}
            if number:
                result["density"] = applied.density if variant.plan is None else variant.plan.density()
        if number:
            reference, reference_latents = self._sample(0)
            found = compare(frames, reference, final.latents, reference_latents).values()
            found |= self._learned.compare(frames, reference, self._prompt)
            result["metrics"] = {name: None if value is None else finite(value) for name, value in found.items()}
        result["features"] = self._learned.features(frames)
        self._samples[number] = frames, final.latents
        if number == 0 or self._shown:
            self._store.save_sample(self._pair, number, *self._samples[number], exact=number == 0)
        self._store.write_video(self._pair, variant.name, frames)
        self._store.save(self._pair, number, result)
        if number and not self._shown:
            del self._samples[number]
        return result

    def frames(self, number: int) -> Tensor:
        return self._sample(number)[0]

    def _sample(self, number: int) -> tuple[Tensor, Tensor | None]:
        if number not in self._samples:
            kept = self._store.load_sample(self._pair, number)
            if kept is None:
                raise InputError(f"frames of pair {self._pair + 1} were deleted; delete the whole folder of results")
            self._samples[number] = kept
        return self._samples[number]

    def _applied(self, variant: Variant) -> AbstractContextManager[Any]:
        if variant.attach is not None:
            return variant.attach(self._model.pipe)
        if variant.plan is None:
            return nullcontext()
        return apply(self._model.pipe, variant.plan, strict=True, backend=self._backend)


def _evaluation(
    contenders: Sequence[Variant],
    pairs: Sequence[Pair],
    rows: Sequence[Sequence[Mapping[str, Any]]],
    videos: dict[str, list[Tensor]],
    learned: LearnedMetrics,
) -> Evaluation:
    columns = {variant.name: [row[number] for row in rows] for number, variant in enumerate(contenders)}
    seconds = {name: [result["seconds"] for result in column] for name, column in columns.items()}
    launches = {name: [result.get("launch_seconds", 0.0) for result in column] for name, column in columns.items()}
    shares = {name: sum(launches[name]) / sum(seconds[name]) for name in columns}
    results = []
    for variant in contenders[1:]:
        column = columns[variant.name]
        fvd = None
        if all(result["features"] for result in (*column, *columns[FULL])):
            fvd = frechet_distance([item["features"] for item in column], [item["features"] for item in columns[FULL]])
        results.append(
            VariantResult(
                variant,
                tuple(Closeness.from_values(result["metrics"]) for result in column),
                tuple(full / own for full, own in zip(seconds[FULL], seconds[variant.name], strict=True)),
                tuple(result["density"] for result in column),
                fvd,
            )
        )
    return Evaluation(tuple(pairs), results, videos, seconds, shares, learned.missing)
