"""Train the bundled painted-digits model: a small FluxTransformer2DModel, rectified flow, on one GPU.

    python training/train_painted_digits.py --folder checkpoints/painted_digits --seconds 420

Small pictures first, then whole ones; the learning rate falls over the time that is given. At the end the folder holds
`checkpoint.pt`, weights averaged over the last steps, and `loss.csv`. `export_painted_digits.py` turns it into the
pipeline folder that the package ships.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from painted_digits import PROMPT_LENGTH, WORDS, PaintedDigits
from torch import Tensor, nn

from paroattn.files import write_atomically
from paroattn.models.pixels import FOLD, fold_pixels

SEED = 20261125
TEXT_DIM = 64
NOISE_SHIFT = 3.0  # the sampler's scheduler uses the same shift
EMPTY_PROMPT_SHARE = 0.1  # so that classifier-free guidance is possible
PEAK_RATE = 1e-3
WARMUP_STEPS = 200
EMA_HORIZON = 600  # steps


@dataclass(frozen=True)
class Stage:
    """Pictures of one size until a share of the time is over; RoPE lets small ones teach what large ones need."""

    size: int
    batch: int
    until: float


STAGES = (Stage(128, 96, 0.4), Stage(256, 32, 1.0))


def build_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=3 * FOLD**2,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )


def position_ids(height: int, width: int) -> Tensor:
    """As FluxPipeline makes them: [height * width, 3], image number, row and column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), -1).flatten(0, 1).float()


class PromptedTransformer(nn.Module):
    """The transformer with the word vectors it is conditioned on, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.words = nn.Embedding(len(WORDS), TEXT_DIM)

    def forward(self, tokens: Tensor, level: Tensor, words: Tensor, side: int) -> Tensor:
        embeds = self.words(words)
        return self.transformer(
            hidden_states=tokens,
            timestep=level,
            encoder_hidden_states=embeds,
            pooled_projections=embeds.mean(1),
            img_ids=position_ids(side, side).to(tokens.device),
            txt_ids=torch.zeros(PROMPT_LENGTH, 3, device=tokens.device),
        ).sample


def train(folder: Path, seconds: float, device: torch.device) -> None:
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # torch 2.11's failed on an H100 with an illegal memory access
    generator = torch.Generator().manual_seed(SEED)
    model = PromptedTransformer().to(device)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=_ema_update)
    matrices = [parameter for parameter in model.transformer.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2] + [model.words.weight]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    data = PaintedDigits(device)
    started = time.monotonic()
    rows: list[list[str]] = []
    step = 0
    while (share := (time.monotonic() - started) / seconds) < 1:
        stage = next(stage for stage in STAGES if share < stage.until)
        pictures, prompts = data.batch(stage.batch, stage.size, generator)
        keep = torch.rand(stage.batch, generator=generator) >= EMPTY_PROMPT_SHARE
        words = data.indices([prompt if kept else "" for prompt, kept in zip(prompts, keep.tolist(), strict=True)])
        clean = fold_pixels(pictures)
        noise = torch.randn(clean.shape, device=device)
        uniform = torch.randn(stage.batch, device=device).sigmoid()
        level = NOISE_SHIFT * uniform / (1 + (NOISE_SHIFT - 1) * uniform)
        mix = level.view(-1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model((1 - mix) * clean + mix * noise, level, words, stage.size // FOLD)
        loss = (predicted.float() - (noise - clean)).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min((step + 1) / WARMUP_STEPS, max(0.01, 1.25 * (1 - share)), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averaged.update_parameters(model)
        if step % 20 == 0:
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"loss is {loss.item()} at step {step}; lower PEAK_RATE")
            passed = time.monotonic() - started
            rows.append([str(step), str(stage.size), f"{loss.item():.5f}", f"{float(norm):.4f}", f"{passed:.1f}"])
            if step % 500 == 0:
                print(f"step {step}, {passed:.0f} s, loss {loss.item():.4f}", flush=True)
        step += 1
    with (folder / "loss.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "size", "loss", "gradient_norm", "seconds"], *rows])
    state = {"step": step, "averaged": averaged.module.half().state_dict()}
    write_atomically(folder / "checkpoint.pt", lambda path: torch.save(state, path))
    print(f"trained {step} steps", flush=True)


@torch.no_grad()
def _ema_update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
    """Exponential moving average whose horizon grows with the steps taken, up to EMA_HORIZON."""
    weight = 1 / min(EMA_HORIZON, 1 + int(count) / 4)
    torch._foreach_lerp_(averaged, current, weight)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoint.pt and loss.csv are written")
    parser.add_argument("--seconds", type=float, default=420.0, help="how long to train")
    parser.add_argument("--device", default="cuda", help="device to train on")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    train(arguments.folder, arguments.seconds, torch.device(arguments.device))
