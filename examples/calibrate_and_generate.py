"""Calibrate a pipeline once, keep the plan, and generate with it.

    python examples/calibrate_and_generate.py

With the bundled video model at a small size. For another model, load its diffusers pipeline (docs/models.md) and give
`paroattn.calibrate` its prompts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from paroattn_lab.quality.metrics import compare

import paroattn
from paroattn.cli.frames import save_frames
from paroattn.cli.models import load_model


def main(folder: Path) -> None:
    model = load_model("moving-digits", device="cpu", height=64, width=64, num_frames=4, num_inference_steps=2)

    arguments = model.call_arguments("a slow red two over the cat")  # other models: the prompt itself
    plan = paroattn.calibrate(model.pipe, [arguments], density=0.5, precision="int8")
    plan.save(folder / "digits.safetensors")

    prompt, seed = "a fast white six over the flower", 7
    full = model.generate(prompt, seed)
    with paroattn.apply(model.pipe, paroattn.Plan.load(folder / "digits.safetensors")):
        fast = model.generate(prompt, seed)

    save_frames(fast, folder / "six.mp4", fps=8)
    print(f"density {plan.density():.2f}: PSNR {compare(fast, full).psnr:.1f} dB against full attention")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
