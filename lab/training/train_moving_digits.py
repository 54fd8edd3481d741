"""Train the bundled moving-digits model: a small WanTransformer3DModel, rectified flow, two CPU cores.

The network predicts the clean video and the loss is that of the velocity, (noisy - clean) / level. A token folds 192
pixel values into a hidden size of 256: predicting the velocity itself would fill that width with noise to pass on,
and learns more slowly. The sampler's scheduler takes clean predictions with `prediction_type="sample"`.

    python lab/training/train_moving_digits.py --folder checkpoints/moving_digits

Runs the stages below one after the other and writes a checkpoint every 50 steps; started again on the same folder it
goes on where it stopped. `export_moving_digits.py` turns a checkpoint into the pipeline folder that the package ships.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from moving_digits import PROMPT_LENGTH, WORDS, MovingDigits
from paroattn_lab.models.pixels import frames_to_latents
from paroattn_lab.models.vocabulary import PromptVocabulary
from rectified_flow import moving_average, noise_levels, some_without_prompt
from torch import Tensor, nn

from paroattn.files import write_atomically

SEED = 20261123
TEXT_DIM = 64
LEAST_LEVEL = 0.05  # bounds the loss weight of nearly clean inputs
EMA_HORIZON = 200  # steps


BLUR = 3.0  # pixels: photographs out of focus are what a small model can learn in an hour


@dataclass(frozen=True)
class Stage:
    """Steps at one clip length. RoPE lets short clips teach what long ones need; the last stage is the full grid."""

    frames: int
    batch: int
    until_step: int
    blur: float = BLUR


STAGES = (Stage(4, 4, 500, blur=0.0), Stage(4, 4, 800), Stage(8, 2, 1150), Stage(16, 2, 1200))
PEAK_RATE = 1.2e-3
WARMUP_STEPS = 60


def build_transformer(heads: int = 4, layers: int = 4) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=48,
        out_channels=48,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=heads * 256,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


class PromptedTransformer(nn.Module):
    """The transformer with the word vectors it is conditioned on, trained together."""

    def __init__(self, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.transformer = build_transformer(heads, layers)
        self.words = nn.Embedding(len(WORDS), TEXT_DIM)

    def forward(self, latents: Tensor, timestep: Tensor, words: Tensor) -> Tensor:
        return self.transformer(latents, timestep, self.words(words)).sample


def batch_of(data: MovingDigits, stage: Stage, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, word indices, noise and noise levels of one step, a function of the step alone."""
    generator = torch.Generator().manual_seed(SEED + step)
    vocabulary = PromptVocabulary(WORDS, torch.zeros(len(WORDS), 1), PROMPT_LENGTH)
    clips, prompts = data.batch(stage.batch, stage.frames, generator)
    words = [vocabulary.indices(prompt) for prompt in some_without_prompt(prompts, generator)]
    clean = torch.cat([frames_to_latents(clip) for clip in clips])
    noise = torch.randn(clean.shape, generator=generator)
    level = noise_levels(stage.batch, clean.device, generator)
    return clean, torch.stack(words), noise, level


def build_optimizer(model: PromptedTransformer) -> torch.optim.AdamW:
    """AdamW, with weight decay on the matrices inside the blocks only."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if ".blocks." in name and parameter.ndim == 2 else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.97))


def learning_rate(step: int) -> float:
    """Linear warm-up, constant, then a linear fall to 2% over the last 40% of all steps."""
    last = STAGES[-1].until_step
    fall = (last - step) / (0.4 * last)
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS, max(0.02, fall))


def train(folder: Path) -> None:
    torch.manual_seed(SEED)
    model = PromptedTransformer()
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=moving_average(EMA_HORIZON))
    optimizer = build_optimizer(model)
    checkpoint, first_step = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
        _forget_after(folder / "loss.csv", first_step)
        print(f"resumed after step {first_step}", flush=True)

    data = {blur: MovingDigits(blur=blur) for blur in {stage.blur for stage in STAGES}}
    started = time.monotonic()
    for step in range(first_step, STAGES[-1].until_step):
        stage = next(stage for stage in STAGES if step < stage.until_step)
        clean, words, noise, level = batch_of(data[stage.blur], stage, step)
        mix = level.view(-1, 1, 1, 1, 1)
        predicted = model((1 - mix) * clean + mix * noise, level * 1000, words)
        loss = ((predicted - clean) / mix.clamp(min=LEAST_LEVEL)).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averaged.update_parameters(model)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"loss is {loss.item()} at step {step}; lower PEAK_RATE")
        _log(folder / "loss.csv", step, stage.frames, loss.item(), float(norm), time.monotonic() - started)
        if (step + 1) % 50 == 0 or step + 1 == STAGES[-1].until_step:
            state = {
                "step": step + 1,
                "model": model.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            write_atomically(checkpoint, lambda path, state=state: torch.save(state, path))


def _log(path: Path, step: int, frames: int, loss: float, norm: float, seconds: float) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", "frames", "loss", "gradient_norm", "seconds"])
        writer.writerow([step, frames, f"{loss:.5f}", f"{norm:.4f}", f"{seconds:.1f}"])


def _forget_after(path: Path, step: int) -> None:
    """Drop the rows of steps that will be run again."""
    header, *rows = path.read_text().splitlines()
    kept = [row for row in rows if int(row.split(",")[0]) < step]
    write_atomically(path, lambda temporary: temporary.write_text("\n".join([header, *kept]) + "\n"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoint.pt and loss.csv are kept")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    train(folder)
