"""What plans of other sizes are worth on the bundled models, adapted or as the start of a calibration.

python lab/benchmarks/transfer.py [--density 0.3] [--models moving-digits painted-digits] [--output FILE.jsonl]

PSNR of each model's evaluation pairs, beside that of calibrated plans and of plans of positions alone. Plans are
calibrated at another size, then adapted to the model's own, or a calibration there starts from them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from paroattn_lab.models.bundled import IMAGE, VIDEO, BundledModel, load_bundled
from paroattn_lab.quality.metrics import standard_error
from paroattn_lab.quality.pairs import evaluation_psnr
from paroattn_lab.records import environment, write_records

import paroattn
from paroattn import Plan
from paroattn.calibration.budget import select_by_cost
from paroattn.calibration.calibrate import collect_costs
from paroattn.integrations.clock import now

SIZES = {  # shares of the model's own frames, height and width
    "half the frames": (0.5, 1.0, 1.0),
    "half the height and width": (1.0, 0.5, 0.5),
    "another aspect ratio": (1.0, 0.75, 1.25),
}


def changed(call: Mapping[str, Any], shares: tuple[float, float, float]) -> dict[str, Any]:
    """Arguments of a call at another size; a latent frame is four frames, after the first."""
    frames, height, width = shares
    sizes = {"height": int(call["height"] * height), "width": int(call["width"] * width)}
    if "num_frames" in call:
        sizes["num_frames"] = int((call["num_frames"] - 1) * frames) // 4 * 4 + 1
    return {**call, **sizes}


def plans(model: BundledModel, density: float, device: torch.device) -> Iterator[tuple[str, Plan, float | None]]:
    """How a plan for the model's own size was made, the plan, and the seconds that it took to calibrate there."""
    prompts = [model.call_arguments(prompt) for prompt in model.calibration_prompts]

    def calibrated(**given: Any) -> tuple[Plan, float]:
        start = now(device)
        plan = paroattn.calibrate(model.pipe, prompts, density=density, progress=False, **given)
        return plan, now(device) - start

    own, seconds = calibrated()
    yield "calibrated", own, seconds
    yield "calibrated, blocks of 128 queries", *calibrated(block_q=128)
    yield "positions alone", Plan.default(paroattn.identify(model.pipe), own.grid, density), None
    for name, shares in SIZES.items():
        if own.grid.frames == 1 and shares[0] != 1:
            continue
        smaller = [changed(prompt, shares) for prompt in prompts]
        there = collect_costs(model.pipe, smaller, densities=(density,), progress=False)
        size = f"{name} ({there.grid.frames}x{there.grid.height}x{there.grid.width})"
        plan = select_by_cost(there, density=density)
        yield f"from {size}", plan.adapt(own.grid), None
        yield f"calibrated, from the plan of {size}", *calibrated(start=plan)
        yield f"calibrated, from the statistics of {size}", *calibrated(start=there)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--models", nargs="+", default=[VIDEO, IMAGE], help="names of bundled models")
    parser.add_argument("--output", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records = []
    for name in arguments.models:
        model = load_bundled(name, device=str(device))
        references = [model.generate(*pair) for pair in model.evaluation_pairs]
        made, psnr = list(plans(model, arguments.density, device)), {}
        for way, plan, _ in made:
            psnr[way] = evaluation_psnr(model, plan, references)
        least, most = (statistics.fmean(psnr[way]) for way in ("positions alone", "calibrated"))
        for way, plan, seconds in made:
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
                "seconds": seconds,
                **environment(device),
            }
            records.append(record)
            print(f"{name}, {way}: {found:.2f} dB, {record['gap_closed']:.0%} of the gap", flush=True)
        if arguments.output:
            write_records(records, arguments.output)


if __name__ == "__main__":
    main()
