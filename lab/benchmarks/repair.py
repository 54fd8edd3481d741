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
from tempfile import TemporaryDirectory
from typing import Any

import torch
from paroattn_lab.models.bundled import IMAGE, VIDEO, load_bundled
from paroattn_lab.quality.metrics import standard_error
from paroattn_lab.quality.pairs import evaluation_psnr
from paroattn_lab.records import environment, write_records
from paroattn_lab.speed.random_plan import random_plan
from paroattn_lab.speed.rounds import interleaved, paired_ratio

import paroattn
from paroattn import CostStatistics, TokenGrid, prepare
from paroattn.block_mask import usual_block_q
from paroattn.calibration.budget import select_like
from paroattn.integrations.clock import now
from paroattn.plan import ModelIdentity

SHAPES = (
    (TokenGrid(1, 64, 72), 128, 24),
    (TokenGrid(16, 11, 101), 64, 96),
    (TokenGrid(21, 30, 52), 128, 12),
    (TokenGrid(21, 45, 80), 128, 8),
)
"""Grid, head_dim and heads of Flux, CogVideoX (both passes of guidance), Wan 480p and, some of its heads, Wan 720p."""
CPU_HEADS = 2
TIMED_DENSITY = 0.3
FURTHER_SEEDS = 1000


def fidelity(
    name: str, densities: list[float], precision: str, pair_count: int | None, device: torch.device
) -> list[dict[str, Any]]:
    model = load_bundled(name, device=str(device))
    pairs = [(prompt, seed + more) for more in (0, FURTHER_SEEDS) for prompt, seed in model.evaluation_pairs]
    pairs = pairs[: pair_count or len(model.evaluation_pairs)]
    references = [model.generate(*pair) for pair in pairs]
    prompts, found = [model.call_arguments(prompt) for prompt in model.calibration_prompts], []
    with TemporaryDirectory() as folder:
        kept = Path(folder) / "statistics"
        first = paroattn.calibrate(
            model.pipe, prompts, density=densities[0], precision=precision, keep_statistics=kept, progress=False
        )
        plans = [select_like(first, CostStatistics.load(kept), density) for density in densities]
    for plan in plans:
        plain, repaired = (evaluation_psnr(model, plan, references, pairs, repair) for repair in (False, True))
        gains = [one - other for one, other in zip(repaired, plain, strict=True)]
        record = {
            "model": name,
            "precision": precision,
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


def speed(
    grid: TokenGrid, head_dim: int, heads: int, precision: str, device: torch.device, rounds: int
) -> dict[str, Any]:
    """With random masks and orders; on a CPU in float32, on a GPU in bfloat16."""
    model = ModelIdentity("random", "", 1, heads, head_dim)
    (plan,) = random_plan(model, grid, TIMED_DENSITY, precision, block_q=usual_block_q(grid.tokens)).layers()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tensors = [torch.randn(1, grid.tokens, heads, head_dim, device=device, dtype=dtype) for _ in range(3)]
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
        "heads": heads,
        "precision": precision,
        "ms": 1000 * statistics.median(times[0]),
        "repaired_ms": 1000 * statistics.median(times[1]),
        "times": paired_ratio(times[1], times[0]),
    }
    print(", ".join(f"{key} {value}" for key, value in record.items()), flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="*", default=[VIDEO, IMAGE], help="names of bundled models; none for times only"
    )
    parser.add_argument("--density", action="append", type=float, help="default: 0.3, 0.2, 0.125; may be repeated")
    parser.add_argument("--precision", default="exact", help="of the plans; default: exact")
    parser.add_argument("--pairs", type=int, help="at most twice those of a model; default: those of a model")
    parser.add_argument("--timed", default="int8", help="precision of the operator that is timed; default: int8")
    parser.add_argument("--rounds", type=int, default=15, help="of the operator's time; 0 for none")
    parser.add_argument("--output", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = SHAPES if device.type == "cuda" else [(*shape, CPU_HEADS) for *shape, _ in SHAPES[:2]]
    densities, precision = arguments.density or [0.3, 0.2, 0.125], arguments.precision
    found: list[dict[str, Any]] = []
    with torch.no_grad():
        for shape in shapes if arguments.rounds else ():
            found.append({"kind": "repair speed", **speed(*shape, arguments.timed, device, arguments.rounds)})
        for name in arguments.models:
            rows = fidelity(name, densities, precision, arguments.pairs, device)
            found += [{"kind": "repair", **row} for row in rows]
    if arguments.output:
        write_records([{**record, **environment(device)} for record in found], arguments.output)


if __name__ == "__main__":
    main()
