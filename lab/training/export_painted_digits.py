"""Turn a training checkpoint into the pipeline folder that the package ships, with sample pictures and loss curve.

python lab/training/export_painted_digits.py --model painted-digits-large --checkpoints checkpoints/painted_digits_large
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from painted_digits import PROMPT_LENGTH, SIZE, WORDS
from paroattn_lab.models import IMAGE_LARGE, folder_of, load_bundled
from paroattn_lab.models.bundled import GENERATION_FILE, VOCABULARY_FILE
from paroattn_lab.models.vocabulary import PromptVocabulary
from PIL import Image
from rectified_flow import NOISE_SHIFT
from train_painted_digits import SHAPES, PromptedTransformer

GENERATION = {
    "settings": {"height": SIZE, "width": SIZE, "num_inference_steps": 8, "guidance_scale": 1.0},
    "calibration_prompts": ["a big white three over the coffee left", "a small green seven over the temple middle"],
    "evaluation_pairs": [
        ["a big red two over the flower bottom", 101],
        ["a small yellow eight over the cat right", 102],
        ["a big green zero over the astronaut top", 103],
        ["a big white five over the rocket left", 104],
        ["a small yellow four over the coffee middle", 105],
        ["a big red six over the temple left", 106],
        ["a small white nine over the flower top", 107],
        ["a big green one over the cat bottom", 108],
    ],
}
SAMPLE_PROMPTS = (
    ("a big red two over the flower left", 1),
    ("a small white eight over the coffee bottom", 2),
    ("a big green six over the astronaut middle", 3),
    ("a big yellow one over the cat right", 4),
    ("a small red seven over the temple top", 5),
    ("a big white three over the rocket right", 6),
)


def export(name: str, checkpoints: Path, folder: Path) -> None:
    state = torch.load(checkpoints / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = PromptedTransformer(name)
    model.load_state_dict(state["averaged"])
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=NOISE_SHIFT),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=model.transformer.half(),
    )
    pipe.save_pretrained(folder)
    PromptVocabulary(WORDS, model.words.weight.detach().float(), PROMPT_LENGTH).save(folder / VOCABULARY_FILE)
    (folder / GENERATION_FILE).write_text(json.dumps(GENERATION, indent=2) + "\n")
    print(f"exported step {state['step']}")


def draw_samples(name: str, path: Path, steps: int) -> None:
    """Two rows of three pictures."""
    model = load_bundled(name, device="cpu", num_inference_steps=steps)
    pictures = [model.generate(prompt, seed)[0] for prompt, seed in SAMPLE_PROMPTS]
    rows = [torch.cat(pictures[start : start + 3], dim=2) for start in (0, 3)]
    pixels = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(path, quality=90)


def draw_loss(log: Path, path: Path) -> None:
    with log.open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for size in sorted({row["size"] for row in rows}, key=int):
        own = [(int(row["step"]), float(row["loss"])) for row in rows if row["size"] == size]
        axes.plot(*zip(*own, strict=True), linewidth=0.8, label=f"{size} x {size} pixels")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SHAPES), default=IMAGE_LARGE, help="which bundled model")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder with checkpoint.pt and loss.csv")
    parser.add_argument("--sample-steps", type=int, default=20, help="denoising steps of the sample picture")
    arguments = parser.parse_args()
    target = folder_of(arguments.model)
    export(arguments.model, arguments.checkpoints, target)
    draw_samples(arguments.model, target / "samples.jpg", arguments.sample_steps)
    draw_loss(arguments.checkpoints / "loss.csv", target / "loss.png")
