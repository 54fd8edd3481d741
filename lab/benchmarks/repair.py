"""What repair by probes gains on the bundled models, and what it takes, as records.

python lab/benchmarks/repair.py [--models moving-digits painted-digits] [--density 0.3] [--output FILE.jsonl]

PSNR of each model's evaluation pairs with a plan alone and repaired, and the operator's time at lengths of models.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paroattn_lab.models.bundled import IMAGE, VIDEO, load_bundled
from paroattn_lab.quality.metrics import standard_error
from paroattn_lab.quality.pairs import evaluation_psnr
from paroattn_lab.records import environment, write_records
from paroattn_lab.speed.random_plan import random_plan
from paroattn_lab.speed.rounds import interleaved, paired_ratio

import paroattn
from paroattn import TokenGrid, prepare
from paroattn.integrations.clock import now
from paroattn.plan import ModelIdentity

SHAPES = ((TokenGrid(1, 64, 72), 128), (TokenGrid(16, 11, 101), 64))
HEADS = 2
TIMED_DENSITY = 0.3


def fidelity(name: str, densities: list[float], device: torch.device) -> list[dict[str, Any]]:
    model = load_bundled(name, device=str(device))
    references = [model.generate(*pair) for pair in model.evaluation_pairs]
    prompts, found = [model.call_arguments(prompt) for prompt in model.calibration_prompts], []
    for density in densities:
        plan = paroattn.calibrate(model.pipe, prompts, density=density, progress=False)
        plain, repaired = (evaluation_psnr(model, plan, references, repair=repair) for repair in (False, True))
        gains = [one - other for one, other in zip(repaired, plain, strict=True)]
        record = {
            "model": name,
            "density": plan.density(),
            "psnr": statistics.fmean(plain),
            "repaired_psnr": statistics.fmean(repaired),
            "gain": statistics.fmean(gains),
            "standard_error": standard_error(gains),
            "pairs": len(gains),
        }
        print(", ".join(f"{key} {value}" for key, value in record.items()), flush=True)
        found.append(record)
    return found


def speed(grid: TokenGrid, head_dim: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Of INT8 with random masks and orders; on a CPU in float32, on a GPU in bfloat16."""
    (plan,) = random_plan(ModelIdentity("random", "", 1, HEADS, head_dim), grid, TIMED_DENSITY, "int8").layers()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tensors = [torch.randn(1, grid.tokens, HEADS, head_dim, device=device, dtype=dtype) for _ in range(3)]
    bucket = torch.tensor(0, device=device)

    def seconds(op: Callable[..., torch.Tensor]) -> float:
        start = now(device)
        op(*tensors, bucket=bucket)
        return now(device) - start

    operators = [
        prepare(plan, device=device, dtype=dtype, tensor_layout="NHD", repair=repair) for repair in (False, True)
    ]
    times = interleaved([functools.partial(seconds, op) for op in operators], rounds, progress=False)
    record = {
        "tokens": grid.tokens,
        "head_dim": head_dim,
        "heads": HEADS,
        "ms": 1000 * statistics.median(times[0]),
        "repaired_ms": 1000 * statistics.median(times[1]),
        "times": paired_ratio(times[1], times[0]),
    }
    print(", ".join(f"{key} {value}" for key, value in record.items()), flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[VIDEO, IMAGE], help="names of bundled models")
    parser.add_argument("--density", action="append", type=float, help="default: 0.3, 0.2, 0.125; may be repeated")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: list[dict[str, Any]] = []
    with torch.no_grad():
        times = [{"kind": "repair speed", **speed(*shape, device, arguments.rounds)} for shape in SHAPES]
        for name in arguments.models:
            rows = fidelity(name, arguments.density or [0.3, 0.2, 0.125], device)
            found += [{"kind": "repair", **row} for row in rows]
            if arguments.output:
                write_records([{**record, **environment(device)} for record in found + times], arguments.output)


if __name__ == "__main__":
    main()
