"""Records of evaluations: one JSON line per variant, with everything needed to read the figures later."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch

import paroattn
from paroattn.evaluation.metrics import finite
from paroattn.evaluation.pairs import FULL, Evaluation, VariantResult
from paroattn.files import write_atomically
from paroattn.integrations.generation import GenerativeModel
from paroattn.plan import Plan


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
    plan = result.variant.plan
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
        "variant": result.variant.name,
        "density": result.density,
        **(_plan_facts(plan) if plan is not None else {}),
        **figures,
        "speed_up": result.speed_up,
        "transformer_seconds": evaluation.seconds[result.variant.name],
        "full_attention_seconds": evaluation.seconds[FULL],
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


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Machine, threads, versions and commit, and the GPU if the device is one; no host name."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device is not None and device.type == "cuda" else {}
    return {
        **gpu,
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "paroattn": paroattn.__version__,
        },
        "commit": COMMIT,
    }


def write_records(records: list[dict[str, Any]], path: Path) -> None:
    """Write records as JSON lines, whole or not at all; a file that exists is replaced."""
    lines = "".join(json.dumps(record, sort_keys=True, allow_nan=False) + "\n" for record in records)
    write_atomically(path, lambda temporary: temporary.write_text(lines))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that this package is imported from, if it is one."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:  # git is not installed
        return None
    return answer.stdout.strip() or None


COMMIT = _commit()  # when the code was loaded: a long run may outlive the state of the checkout
