"""What plans lose on the bundled video models that are made of a part of attention, or beside one request.

python lab/benchmarks/gpu/sampling.py [--output FILE.jsonl]

PSNR of each model's evaluation pairs, paired with that of plans from a thorough calibration.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from paroattn_lab.models.bundled import VIDEO, VIDEO_LARGE, BundledModel, load_bundled
from paroattn_lab.quality.metrics import compare, standard_error
from paroattn_lab.records import environment, write_records

import paroattn
from paroattn.calibration.budget import select_by_cost
from paroattn.calibration.calibrate import collect_costs
from paroattn.integrations.clock import now
from paroattn.plan import Plan

DENSITIES = (0.3, 0.2)
SEEDS = (0, 1, 2)  # of the quick calibrations

Plans = Callable[[float], Plan]


def ways(model: BundledModel, device: torch.device) -> Iterator[tuple[str, float, Plans]]:
    """How plans are made, the seconds that it took and the plans by density; a thorough calibration comes first."""
    prompts = [model.call_arguments(prompt) for prompt in model.calibration_prompts]
    settings: dict[str, dict[str, Any]] = {"thorough": {"thorough": True}}
    settings |= {f"quick, seed {seed}": {"seed": seed} for seed in SEEDS}
    for name, how in settings.items():
        start = now(device)
        costs = collect_costs(model.pipe, prompts, densities=DENSITIES, progress=False, **how)
        yield name, now(device) - start, lambda density, costs=costs: select_by_cost(costs, density=density)
    for number, prompt in enumerate(model.calibration_prompts):
        start = now(device)
        model.generate(prompt, number)
        dense = now(device) - start
        plans = {}
        start = now(device)
        for density in DENSITIES:
            with (
                tempfile.TemporaryDirectory() as folder,
                paroattn.apply(model.pipe, density=density, cache=folder, progress=False) as handle,
            ):
                model.generate(prompt, number)
                plans[density] = handle.plan
        yield f"beside a request, prompt {number}", (now(device) - start) / len(DENSITIES) - dense, plans.__getitem__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records = []
    for name in (VIDEO, VIDEO_LARGE):
        model = load_bundled(name, device=str(device))
        references = [model.generate(*pair) for pair in model.evaluation_pairs]
        thorough: dict[float, list[float]] = {}
        for way, seconds, plan_of in ways(model, device):
            for density in DENSITIES:
                with paroattn.apply(model.pipe, plan_of(density), strict=True):
                    made = [model.generate(*pair) for pair in model.evaluation_pairs]
                found = [compare(one, other).psnr for one, other in zip(made, references, strict=True)]
                thorough.setdefault(density, found)
                gains = [own - whole for own, whole in zip(found, thorough[density], strict=True)]
                record = {
                    "kind": "calibration sampling",
                    "model": name,
                    "way": way,
                    "density": density,
                    "psnr": statistics.fmean(found),
                    "gain": statistics.fmean(gains),
                    "standard_error": standard_error(gains),
                    "pairs": len(gains),
                    "seconds": seconds,
                    **environment(device),
                }
                records.append(record)
                print(f"{name}, {way}, {density}: {record['psnr']:.2f} dB ({record['gain']:+.2f}), {seconds:.1f} s")
    if arguments.output:
        write_records(records, arguments.output)


if __name__ == "__main__":
    main()
