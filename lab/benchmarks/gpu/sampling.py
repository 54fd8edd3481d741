"""What plans lose on the bundled video models that are made of a part of attention, or beside requests.

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
from paroattn_lab.quality.metrics import standard_error
from paroattn_lab.quality.pairs import evaluation_psnr
from paroattn_lab.records import environment, write_records

import paroattn
from paroattn.calibration.budget import select_by_cost
from paroattn.calibration.calibrate import collect_costs
from paroattn.integrations.clock import now
from paroattn.plan import Plan

DENSITIES = (0.3, 0.2)
SEEDS = (0, 1, 2)  # of the quick calibrations
THIRD_PROMPT = "a slow green four over the rocket camera up"  # of the requests; those for calibration are the others

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
    for first in range(len(model.calibration_prompts)):
        yield from beside_requests(model, device, first)


def beside_requests(model: BundledModel, device: torch.device, first: int) -> Iterator[tuple[str, float, Plans]]:
    """Plans after one request, two and three; the seconds that the request took longer than a dense one."""
    requests = [*model.calibration_prompts[first:], *model.calibration_prompts[:first], THIRD_PROMPT]
    start = now(device)
    model.generate(requests[0], first)
    dense = now(device) - start
    plans: list[dict[float, Plan]] = [{} for _ in requests]
    seconds = [0.0 for _ in requests]
    for density in DENSITIES:
        with (
            tempfile.TemporaryDirectory() as folder,
            paroattn.apply(model.pipe, density=density, requests=len(requests), cache=folder, progress=False) as handle,
        ):
            for number, prompt in enumerate(requests):
                start = now(device)
                model.generate(prompt, first + number)
                seconds[number] += (now(device) - start - dense) / len(DENSITIES)
                plans[number][density] = handle.plan
    for number, made in enumerate(plans):
        yield f"beside {number + 1} of the requests from prompt {first}", seconds[number], made.__getitem__


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
                found = evaluation_psnr(model, plan_of(density), references)
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
