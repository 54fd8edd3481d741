"""What plans of other sizes are worth on the tiny bundled models, beside calibrated ones and plans of positions alone.

python lab/benchmarks/transfer.py [--density 0.3] [--output FILE.jsonl]

PSNR of each model's evaluation pairs. Plans are calibrated at another size and adapted to the model's own.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from paroattn_lab.models.bundled import IMAGE, VIDEO, BundledModel, load_bundled
from paroattn_lab.quality.metrics import compare, standard_error
from paroattn_lab.records import environment, write_records

import paroattn
from paroattn import Plan

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    VIDEO: {
        "half the frames": {"num_frames": 29},
        "half the height and width": {"height": 128, "width": 128},
        "another aspect ratio": {"height": 192, "width": 320},
    },
    IMAGE: {
        "half the height and width": {"height": 0.5, "width": 0.5},
        "another aspect ratio": {"height": 0.75, "width": 1.25},
    },
}


def plans(model: BundledModel, density: float) -> dict[str, Plan]:
    """Plans for the model's own size by how they were made."""
    prompts = [model.call_arguments(prompt) for prompt in model.calibration_prompts]
    own = paroattn.calibrate(model.pipe, prompts, density=density, progress=False)
    found = {"positions alone": Plan.default(paroattn.identify(model.pipe), own.grid, density), "calibrated": own}
    for name, changes in SIZES[model.name].items():
        sizes = {key: int(value * prompts[0][key]) if value < 2 else value for key, value in changes.items()}
        there = paroattn.calibrate(
            model.pipe, [{**prompt, **sizes} for prompt in prompts], density=density, progress=False
        )
        found[f"from {name} ({there.grid.frames}x{there.grid.height}x{there.grid.width})"] = there.adapt(own.grid)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--output", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records = []
    for name in SIZES:
        model = load_bundled(name, device=str(device))
        references = [model.generate(*pair) for pair in model.evaluation_pairs]
        made, psnr = plans(model, arguments.density), {}
        for way, plan in made.items():
            with paroattn.apply(model.pipe, plan, strict=True):
                frames = [model.generate(*pair) for pair in model.evaluation_pairs]
            psnr[way] = [compare(one, other).psnr for one, other in zip(frames, references, strict=True)]
        least, most = (statistics.fmean(psnr[way]) for way in ("positions alone", "calibrated"))
        for way, plan in made.items():
            found, gains = statistics.fmean(psnr[way]), None
            if way != "calibrated":
                gains = [one - other for one, other in zip(psnr[way], psnr["calibrated"], strict=True)]
            record = {
                "kind": "plan transfer",
                "model": name,
                "way": way,
                "density": plan.density(),
                "psnr": found,
                "gain": gains and statistics.fmean(gains),
                "standard_error": gains and standard_error(gains),
                "gap_closed": (found - least) / (most - least),
                "pairs": len(psnr[way]),
                **environment(device),
            }
            records.append(record)
            print(f"{name}, {way}: {found:.2f} dB, {record['gap_closed']:.0%} of the gap", flush=True)
    if arguments.output:
        write_records(records, arguments.output)


if __name__ == "__main__":
    main()
