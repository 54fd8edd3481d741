"""Turn a training checkpoint into the pipeline folder that the package ships, with sample pictures and loss curve.

python lab/training/export_moving_digits.py --model moving-digits-large --checkpoints checkpoints/moving_digits_large
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from moving_digits import PROMPT_LENGTH, WORDS
from paroattn_lab.models import VIDEO, VIDEO_LARGE, folder_of, load_bundled
from paroattn_lab.models.bundled import GENERATION_FILE, VOCABULARY_FILE
from paroattn_lab.models.vocabulary import PromptVocabulary
from PIL import Image
from rectified_flow import NOISE_SHIFT
from train_moving_digits import PromptedTransformer
from train_moving_digits_large import HEADS, LAYERS

GENERATION = {
    "settings": {
        "height": 128,
        "width": 128,
        "num_frames": 16,
        "num_inference_steps": 6,
        "guidance_scale": 1.0,
        "fps": 8,
    },
    "calibration_prompts": [
        "a slow white three over the coffee camera left",
        "a fast green seven over the temple camera still",
    ],
    "evaluation_pairs": [
        ["a fast red two over the flower camera down", 101],
        ["a slow yellow eight over the cat camera right", 102],
        ["a slow green zero over the astronaut camera still", 103],
        ["a fast white five over the rocket camera up", 104],
        ["a fast yellow four over the coffee camera right", 105],
        ["a slow red six over the temple camera left", 106],
        ["a fast white nine over the flower camera still", 107],
        ["a slow green one over the cat camera up", 108],
    ],
}
LARGER = {"height": 256, "width": 256, "num_inference_steps": 10}  # what moving-digits-large sets otherwise
SAMPLE_PROMPTS = (
    ("a slow red two over the flower camera left", 1),
    ("a fast white eight over the coffee camera down", 2),
    ("a fast green six over the astronaut camera still", 3),
    ("a slow yellow one over the cat camera right", 4),
)


def load_checkpoint(name: str, path: Path) -> tuple[PromptedTransformer, int]:
    """The averaged weights and the number of steps."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if name == VIDEO_LARGE:
        model = PromptedTransformer(HEADS, LAYERS)
        model.load_state_dict(state["averaged"])
        return model, state["step"]
    averaged = torch.optim.swa_utils.AveragedModel(PromptedTransformer())
    averaged.load_state_dict(state["averaged"])
    return averaged.module, state["step"]


def export(name: str, checkpoints: Path, folder: Path) -> None:
    model, steps = load_checkpoint(name, checkpoints / "checkpoint.pt")
    scheduler = UniPCMultistepScheduler(prediction_type="sample", use_flow_sigmas=True, flow_shift=NOISE_SHIFT)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=model.transformer.half()
    )
    pipe.save_pretrained(folder)
    PromptVocabulary(WORDS, model.words.weight.detach(), PROMPT_LENGTH).save(folder / VOCABULARY_FILE)
    settings = GENERATION["settings"] | (LARGER if name == VIDEO_LARGE else {})
    (folder / GENERATION_FILE).write_text(json.dumps(GENERATION | {"settings": settings}, indent=2) + "\n")
    print(f"exported step {steps}")


def draw_samples(name: str, path: Path, steps: int) -> None:
    """Every third frame of some videos, one video per row."""
    model = load_bundled(name, num_inference_steps=steps)
    rows = [torch.cat(list(model.generate(prompt, seed)[::3]), dim=2) for prompt, seed in SAMPLE_PROMPTS]
    pixels = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(path, quality=90)


def draw_loss(log: Path, path: Path) -> None:
    """The loss that was written down, smoothed, by the number of frames."""
    with log.open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for frames in sorted({row["frames"] for row in rows}, key=int):
        own = [(int(row["step"]), float(row["loss"])) for row in rows if row["frames"] == frames]
        steps, losses = zip(*own, strict=True)
        smooth = torch.nn.functional.avg_pool1d(torch.tensor([losses]), 25, 1, 12, count_include_pad=False)[0]
        (line,) = axes.plot(steps, smooth.tolist(), label=f"{frames} frames" if frames != "1" else "1 frame")
        axes.plot(steps, losses, linewidth=0.4, alpha=0.3, color=line.get_color())
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(VIDEO, VIDEO_LARGE), default=VIDEO, help="which bundled model")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder with checkpoint.pt and loss.csv")
    parser.add_argument("--sample-steps", type=int, default=20, help="denoising steps of the sample picture")
    arguments = parser.parse_args()
    target = folder_of(arguments.model)
    export(arguments.model, arguments.checkpoints, target)
    draw_samples(arguments.model, target / "samples.jpg", arguments.sample_steps)
    draw_loss(arguments.checkpoints / "loss.csv", target / "loss.png")
