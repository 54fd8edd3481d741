"""Calibration of a model at full size with random weights and few layers and steps: how long each part takes.

python lab/benchmarks/gpu/calibrate_model.py [--preset wan-2.1-1.3b-480p] [--layers 2] [--steps 4]
    [--observed-steps 10] [--compiled] [--output FILE.jsonl]

Random weights make attention without structure: the plan is of no use, its making takes as long as a real one's.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from paroattn_lab.records import environment, write_records
from paroattn_lab.speed.presets import PRESETS
from paroattn_lab.speed.subjects import random_subject

import paroattn
from paroattn.calibration import calibrate as parts
from paroattn.integrations.clock import now

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
_USUAL_STEPS = 50  # of a generation that a calibration is compared with


def pipeline(preset: str, layers: int) -> tuple[Any, dict[str, Any]]:
    """A pipeline without text encoder and VAE, and what to call it with: two passes per step, for guidance."""
    config, (frames, height, width) = dict(PRESETS[preset].config), PRESETS[preset].size
    transformer = random_subject(preset, layers=layers, device=DEVICE, dtype=DTYPE).transformer
    common = {"tokenizer": None, "text_encoder": None, "vae": None, "transformer": transformer}
    size = {"num_frames": frames, "height": height, "width": width}
    if config["_class_name"] == "WanTransformer3DModel":
        pipe = diffusers.WanPipeline(**common, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
        text = (1, 512, config["text_dim"])
    else:
        pipe = diffusers.CogVideoXPipeline(**common, scheduler=diffusers.CogVideoXDDIMScheduler())
        text = (1, config["max_text_seq_length"], config["text_embed_dim"])
    pipe.set_progress_bar_config(disable=True)
    embeddings = {name: torch.randn(text, device=DEVICE, dtype=DTYPE) for name in ("", "negative_")}
    return pipe, {**size, **{f"{name}prompt_embeds": value for name, value in embeddings.items()}}


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = now(DEVICE)
    yield
    seconds[name] = now(DEVICE) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=[name for name in PRESETS if name.startswith(("wan", "cog"))])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--observed-steps", type=int, help="also time requests of so many steps that are observed")
    parser.add_argument("--compiled", action="store_true", help="also time a generation of the compiled transformer")
    parser.add_argument("--output", type=Path, help="write the record to this file")
    arguments = parser.parse_args()
    preset = arguments.preset or "wan-2.1-1.3b-480p"
    pipe, call = pipeline(preset, arguments.layers)
    seconds: dict[str, float] = {}
    with timed(seconds, "first generation"):  # kernels are loaded, memory is reserved
        pipe(**call, num_inference_steps=1, output_type="latent")
    with timed(seconds, "generation"):
        pipe(**call, num_inference_steps=arguments.steps, output_type="latent")

    parts_of_calibration = {"_choose_orders": "orders", "measure_effects": "effects"}
    originals = {name: getattr(parts, name) for name in parts_of_calibration}

    def wrapped(name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with timed(seconds, parts_of_calibration[name]):
                return originals[name](*args, **kwargs)

        return run

    for name in originals:
        setattr(parts, name, wrapped(name))
    torch.cuda.reset_peak_memory_stats()
    with timed(seconds, "calibration"):
        plan = paroattn.calibrate(
            pipe, [call], num_inference_steps=arguments.steps, precision="int8", prompt_texts=["random"], progress=False
        )
    host_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if arguments.observed_steps:
        request = {**call, "num_inference_steps": arguments.observed_steps, "output_type": "latent"}
        with timed(seconds, "dense request"):
            pipe(**request)
        with (
            tempfile.TemporaryDirectory() as folder,
            paroattn.apply(pipe, density=0.3, precision="int8", requests=2, cache=folder),
        ):
            for name in ("observed request", "observed planned request", "planned request"):
                with timed(seconds, name):
                    pipe(**request)
    with paroattn.apply(pipe, plan, strict=True), timed(seconds, "planned generation"):
        pipe(**call, num_inference_steps=arguments.steps, output_type="latent")
    if arguments.compiled:
        for block in getattr(pipe.transformer, "blocks", None) or pipe.transformer.transformer_blocks:
            block.compile()  # one graph serves all of them, so that it takes seconds
        pipe(**call, num_inference_steps=1, output_type="latent")
        with timed(seconds, "compiled generation"):
            pipe(**call, num_inference_steps=arguments.steps, output_type="latent")
    heads = plan.model.heads * arguments.layers * arguments.steps * 2
    seconds["costs"] = seconds["calibration"] - seconds["orders"] - seconds["effects"]
    record = {
        "kind": "gpu model calibration",
        "preset": preset,
        "tokens": plan.grid.tokens,
        "layers": arguments.layers,
        "steps": arguments.steps,
        "observed_steps": arguments.observed_steps,
        "passes": 2,
        "seconds": seconds,
        "costs_ms_per_head": 1000 * seconds["costs"] / heads,
        "host_gb": host_gb,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "density": plan.density(),
        **environment(torch.device("cuda")),
    }
    print(f"{preset}: {arguments.layers} layers, {arguments.steps} steps, plan of density {plan.density():.3f}")
    for name, value in seconds.items():
        print(f"  {name:24} {value:8.2f} s")
    print(f"  costs per head and call {record['costs_ms_per_head']:.2f} ms; peak {record['peak_gib']:.1f} GiB")
    if arguments.compiled:
        usual = seconds["compiled generation"] / arguments.steps * _USUAL_STEPS
        print(f"  a compiled generation of {_USUAL_STEPS} steps takes {usual:.1f} s")
    if arguments.output:
        write_records([record], arguments.output)


if __name__ == "__main__":
    main()
