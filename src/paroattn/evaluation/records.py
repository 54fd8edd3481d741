"""Records of evaluations: one JSON line per variant, with everything needed to read the figures later."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch

import paroattn
from paroattn.evaluation.pairs import FULL, Evaluation, VariantResult
from paroattn.files import write_atomically
from paroattn.integrations.generation import GenerativeModel

METRICS = ("psnr", "ssim", "cosine")


def evaluation_records(model: GenerativeModel, evaluation: Evaluation) -> list[dict[str, Any]]:
    """One record per variant; figures that are not finite become None, since JSON has no infinity."""
    common = {"kind": "evaluation", "model": model.name, "settings": asdict(model.settings), **environment()}
    return [{**_variant_record(result, evaluation), **common} for result in evaluation.results]


def _variant_record(result: VariantResult, evaluation: Evaluation) -> dict[str, Any]:
    plan = result.variant.plan
    figures: dict[str, Any] = {}
    for metric in METRICS:
        figures[metric] = finite(result.mean(metric))
        figures[f"{metric}_spread"] = result.spread(metric)
    pairs = [
        {"prompt": prompt, "seed": seed, **{key: finite(value) for key, value in asdict(item).items()}}
        for (prompt, seed), item in zip(evaluation.pairs, result.closeness, strict=True)
    ]
    return {
        "variant": result.variant.name,
        "density": plan.density(),
        "visual_density": plan.density(visual_only=True),
        "grid": str(plan.grid),
        "orders": list(plan.order_names),
        "precisions": [str(precision) for precision in plan.precisions],
        "calibration": dict(plan.provenance),
        **figures,
        "speed_up": result.speed_up,
        "transformer_seconds": evaluation.seconds[result.variant.name],
        "full_attention_seconds": evaluation.seconds[FULL],
        "pairs": pairs,
    }


def environment() -> dict[str, Any]:
    """Machine, threads, versions and commit; no host name."""
    return {
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


def finite(value: float) -> float | None:
    """None for what JSON cannot hold."""
    return value if math.isfinite(value) else None


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
