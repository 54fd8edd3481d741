"""What plans are worth in few steps, as distilled models take them, beside 20 steps.

python lab/benchmarks/few_steps.py [--models moving-digits painted-digits] [--output FILE.jsonl]

PSNR of each model's evaluation pairs against full attention with the same steps: of plans that were calibrated on
these steps, and of plans that were calibrated on 20 and spend their blocks on these. There is no guidance; in some
cases the shift of the noise schedule is larger: so distilled models are used. The bundled ones are not distilled: 4
steps make rough frames.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from paroattn_lab.models.bundled import IMAGE, VIDEO, BundledModel, load_bundled
from paroattn_lab.quality.metrics import standard_error
from paroattn_lab.quality.pairs import evaluation_psnr
from paroattn_lab.records import environment, write_records

from paroattn.calibration.budget import select_by_cost
from paroattn.calibration.calibrate import collect_costs
from paroattn.calibration.cost_statistics import CostStatistics
from paroattn.plan import bucket_lengths

DENSITIES = 0.3, 0.2
CASES = (20, 3.0), (8, 3.0), (4, 3.0), (8, 5.0), (4, 5.0)  # steps and shift; the bundled models' own shift is 3


def sampled(name: str, steps: int, shift: float, device: torch.device) -> BundledModel:
    """A bundled model that takes so many steps, without guidance."""
    model = load_bundled(name, device=str(device), num_inference_steps=steps, guidance_scale=1.0)
    scheduler = model.pipe.scheduler
    key = "flow_shift" if "flow_shift" in scheduler.config else "shift"
    model.pipe.scheduler = type(scheduler).from_config(scheduler.config, **{key: shift})
    return model


def measured(model: BundledModel) -> CostStatistics:
    prompts = [model.call_arguments(prompt) for prompt in model.calibration_prompts]
    return collect_costs(model.pipe, prompts, densities=DENSITIES, progress=False)


def spent_on(costs: CostStatistics, schedule: Sequence[float]) -> CostStatistics:
    """The statistics with as many calls in each step bucket as another schedule has, which starts late ones sooner."""
    plan = select_by_cost(costs, density=1.0)
    counts = torch.tensor([plan.bucket_of(level) for level in schedule]).bincount(minlength=plan.buckets)
    calls = counts / bucket_lengths(costs.bucket_edges)
    return replace(costs, usage=(calls / calls.max()).float().unsqueeze(1).expand_as(costs.usage).contiguous())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[VIDEO, IMAGE], help="names of bundled models")
    parser.add_argument("--output", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records: list[dict[str, Any]] = []
    for name in arguments.models:
        of_twenty = measured(sampled(name, *CASES[0], device))
        for steps, shift in CASES:
            model = sampled(name, steps, shift, device)
            references = [model.generate(*pair) for pair in model.evaluation_pairs]
            own = of_twenty if (steps, shift) == CASES[0] else measured(model)
            both = own, spent_on(of_twenty, own.schedule)
            for density in DENSITIES:
                plans = (select_by_cost(costs, density=density) for costs in both)
                psnr, others = (evaluation_psnr(model, plan, references) for plan in plans)
                gains = [one - other for one, other in zip(psnr, others, strict=True)]
                record = {
                    "kind": "few steps",
                    "model": name,
                    "steps": steps,
                    "shift": shift,
                    "density": density,
                    "psnr": statistics.fmean(psnr),
                    "psnr_of_twenty": statistics.fmean(others),
                    "gain": statistics.fmean(gains),
                    "standard_error": standard_error(gains),
                    "pairs": len(psnr),
                    **environment(device),
                }
                records.append(record)
                print({key: record[key] for key in list(record)[1:9]}, flush=True)
            if arguments.output:
                write_records(records, arguments.output)


if __name__ == "__main__":
    main()
