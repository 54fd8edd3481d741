"""What calibration loses by looking at a part of a pipeline's attention, on the bundled video models.

python lab/benchmarks/gpu/sampling.py [--output FILE.jsonl]

PSNR of each model's evaluation pairs with plans of a quick calibration, paired with those of a thorough one.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from paroattn_lab.models.bundled import VIDEO, VIDEO_LARGE, load_bundled
from paroattn_lab.quality.metrics import compare, standard_error
from paroattn_lab.records import environment, write_records

import paroattn
from paroattn.calibration.budget import select_by_cost
from paroattn.calibration.calibrate import collect_costs
from paroattn.integrations.clock import now

DENSITIES = (0.3, 0.2)
SEEDS = (0, 1, 2)  # of the quick calibrations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records = []
    for name in (VIDEO, VIDEO_LARGE):
        model = load_bundled(name, device=str(device))
        references = [model.generate(*pair) for pair in model.evaluation_pairs]
        prompts = [model.call_arguments(prompt) for prompt in model.calibration_prompts]
        thorough: dict[float, list[float]] = {}
        for how in ({"thorough": True}, *({"seed": seed} for seed in SEEDS)):
            start = now(device)
            costs = collect_costs(model.pipe, prompts, densities=DENSITIES, progress=False, **how)
            seconds = now(device) - start
            for density in DENSITIES:
                with paroattn.apply(model.pipe, select_by_cost(costs, density=density), strict=True):
                    made = [model.generate(*pair) for pair in model.evaluation_pairs]
                found = [compare(one, other).psnr for one, other in zip(made, references, strict=True)]
                thorough.setdefault(density, found)
                gains = [own - whole for own, whole in zip(found, thorough[density], strict=True)]
                record = {
                    "kind": "calibration sampling",
                    "model": name,
                    "thorough": "thorough" in how,
                    "seed": how.get("seed", 0),
                    "density": density,
                    "psnr": statistics.fmean(found),
                    "gain": statistics.fmean(gains),
                    "standard_error": standard_error(gains),
                    "pairs": len(gains),
                    "seconds": seconds,
                    **environment(device),
                }
                records.append(record)
                print(f"{name} {how} {density}: {record['psnr']:.2f} dB ({record['gain']:+.2f}), {seconds:.1f} s")
    if arguments.output:
        write_records(records, arguments.output)


if __name__ == "__main__":
    main()
