"""Whole steps of models with random weights and a few layers, eager and compiled, own attention and plans, as records.

python lab/benchmarks/gpu/steps.py --output FILE.jsonl [--config wan-2.1-1.3b-480p] [--rounds 5]

Eager steps with a plan are measured once more with the model's own rotary embedding in place of paroattn's kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from paroattn_lab.models import load_bundled
from paroattn_lab.records import write_records
from paroattn_lab.speed.model_bench import bench_model
from paroattn_lab.speed.subjects import Subject, model_subject, random_subject
from torch import Tensor

from paroattn.integrations import rebind

LAYERS = {"wan-2.1-1.3b-480p": 4, "cogvideox-5b": 3, "hunyuanvideo-720p": 3, "flux.1-dev": 57, "wan-2.1-14b-720p": 1}
BUNDLED = "moving-digits-large"


def subject_of(name: str) -> Subject:
    if name == BUNDLED:
        return model_subject(load_bundled(name, device="cuda"))
    layers, device = LAYERS[name], torch.device("cuda")
    return random_subject(
        name, None, layers=layers, batch=1, text_tokens=None, device=device, dtype=torch.bfloat16, seed=0
    )


def by_the_model(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return function(*args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", choices=[*LAYERS, BUNDLED], help="only this one; may be repeated")
    parser.add_argument("--density", action="append", type=float, help="default: 0.3; may be repeated")
    parser.add_argument("--linears", help="also with linear layers in this format, float8 or int8; compiled only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True, help="write the records to this file")
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    for name in arguments.config or [BUNDLED, *LAYERS]:
        ways = ((False, "kernel"), (False, "the model's"), (True, "the model's"))
        for compiled, rotary in ways[2:] if arguments.linears else ways:
            settings = {"rounds": arguments.rounds, "compiled": compiled, "progress": False}
            settings["linears"] = arguments.linears
            own = mock.patch.object(rebind._Redirected, "_paroattn_rotated", staticmethod(by_the_model))
            with contextlib.nullcontext() if rotary == "kernel" else own:
                found = bench_model(subject_of(name), arguments.density or (0.3,), "int8/fp8", **settings)
            for record in found:
                records.append({**record, "rotary": rotary})
                facts = f"{record['median_ms']:8.2f} ms, {record['times_own']:.2f}x own"
                print(f"{name}, compiled {compiled}, RoPE by {rotary}: {record['method']:14} {facts}", flush=True)
            write_records(records, arguments.output)  # what was measured stays if a later one fails
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
