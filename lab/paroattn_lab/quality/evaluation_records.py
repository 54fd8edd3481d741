"""Records of evaluations: one JSON line per variant, with everything needed to read the figures later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

from paroattn.cli.models import GenerativeModel
from paroattn.plan import Plan
from paroattn_lab.quality.metrics import finite
from paroattn_lab.quality.pairs import FULL, Evaluation, VariantResult
from paroattn_lab.records import environment


def evaluation_records(
    model: GenerativeModel, evaluation: Evaluation, dimensions: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """One record per variant; figures that are not finite become None, since JSON has no infinity.

    Args:
        model: what generated.
        evaluation: its results.
        dimensions: of prompts, as VBench's file has them: figures are also given for each.
    """
    common = {
        "kind": "evaluation",
        "model": model.name,
        "settings": asdict(model.settings),
        "missing": evaluation.missing,
    }
    common |= environment(model.pipe.device)
    return [{**_variant_record(result, evaluation, dimensions), **common} for result in evaluation.results]


def _variant_record(
    result: VariantResult, evaluation: Evaluation, dimensions: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    variant = result.variant
    figures: dict[str, Any] = {"fvd": result.fvd}
    for metric in result.metrics():
        figures |= result.summary(metric)
    pairs = [
        {
            "prompt": prompt,
            "seed": seed,
            **{key: None if value is None else finite(value) for key, value in own.items()},
        }
        for (prompt, seed), own in zip(evaluation.pairs, (item.values() for item in result.closeness), strict=True)
    ]
    return {
        "variant": variant.name,
        "method": variant.method,
        "asked_density": variant.density,
        "precision": variant.precision,
        "density": result.density,
        **(_plan_facts(variant.plan) if variant.plan is not None else {}),
        **figures,
        "speed_up": result.speed_up,
        "transformer_seconds": evaluation.seconds[variant.name],
        "full_attention_seconds": evaluation.seconds[FULL],
        "launch_share": evaluation.launch_shares[variant.name],
        "full_attention_launch_share": evaluation.launch_shares[FULL],
        "by_dimension": _by_dimension(result, evaluation, dimensions),
        "pairs": pairs,
    }


def _by_dimension(
    result: VariantResult, evaluation: Evaluation, dimensions: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    places: dict[str, list[int]] = {}
    for number, (prompt, _) in enumerate(evaluation.pairs):
        for dimension in dimensions.get(prompt, ()):
            places.setdefault(dimension, []).append(number)
    found = {}
    for dimension, numbers in places.items():
        part = replace(result, closeness=tuple(result.closeness[number] for number in numbers))
        found[dimension] = {"pairs": len(numbers), **{name: part.summary(name)[name] for name in part.metrics()}}
    return found


def _plan_facts(plan: Plan) -> dict[str, Any]:
    return {
        "visual_density": plan.density(visual_only=True),
        "grid": str(plan.grid),
        "orders": list(plan.order_names),
        "precisions": [str(precision) for precision in plan.precisions],
        "calibration": dict(plan.provenance),
    }
