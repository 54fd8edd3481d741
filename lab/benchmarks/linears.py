"""What linear layers in 8 bits do to the bundled models' output, alone and beside a plan, as records.

python lab/benchmarks/linears.py [--models moving-digits painted-digits] [--format int8] --output FILE.jsonl

Needs torchao. PSNR of each model's evaluation pairs against its own attention and weights.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from paroattn_lab.models.bundled import IMAGE, VIDEO, load_bundled
from paroattn_lab.quality.metrics import compare, standard_error
from paroattn_lab.quality.pairs import evaluation_psnr
from paroattn_lab.records import environment, write_records

import paroattn

DENSITY = 0.3


def fidelity(name: str, linears: str, device: torch.device) -> list[dict[str, Any]]:
    model, quantised = (load_bundled(name, device=str(device)) for _ in range(2))
    references = [model.generate(*pair) for pair in model.evaluation_pairs]
    prompts = [model.call_arguments(prompt) for prompt in model.calibration_prompts]
    plan = paroattn.calibrate(model.pipe, prompts, density=DENSITY, progress=False)
    paroattn.quantize_linears(quantised.pipe, linears)
    pairs = zip(model.evaluation_pairs, references, strict=True)
    found = {
        "plan": evaluation_psnr(model, plan, references),
        "linears": [compare(quantised.generate(*pair), frames).psnr for pair, frames in pairs],
        "both": evaluation_psnr(quantised, plan, references),
    }
    records = []
    for what, psnr in found.items():
        gains = [one - other for one, other in zip(psnr, found["plan"], strict=True)]
        records.append(
            {
                "kind": "linears",
                "model": name,
                "format": linears,
                "density": plan.density(),
                "what": what,
                "psnr": statistics.fmean(psnr),
                "gain": statistics.fmean(gains),
                "standard_error": standard_error(gains),
                "pairs": len(psnr),
                **environment(device),
            }
        )
        print(f"{name}, {what}: {records[-1]['psnr']:.2f} dB", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[VIDEO, IMAGE], help="names of bundled models")
    parser.add_argument("--format", default="int8", help="float8 or int8; default: int8")
    parser.add_argument("--output", type=Path, required=True, help="write the records to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: list[dict[str, Any]] = []
    with torch.no_grad():
        for name in arguments.models:
            found += fidelity(name, arguments.format, device)
            write_records(found, arguments.output)


if __name__ == "__main__":
    main()
