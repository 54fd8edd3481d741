"""Training for a given time on one GPU: rectified flow in stages, from small examples to whole ones."""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rectified_flow import moving_average
from torch import Tensor, nn

from paroattn.files import write_atomically

WARMUP_STEPS = 200
EMA_HORIZON = 600  # steps


@dataclass(frozen=True)
class Stage:
    """Examples of one shape until a share of the time is over; RoPE lets small ones teach what large ones need.

    Attributes:
        size: height and width in pixels.
        frames: 1 for pictures.
        batch: examples per step.
        until: share of the time, 0 to 1.
    """

    size: int
    frames: int
    batch: int
    until: float


def train(
    model: nn.Module,
    loss_of: Callable[[Stage, torch.Generator], Tensor],
    stages: Sequence[Stage],
    *,
    folder: Path,
    seconds: float,
    rate: float,
    seed: int,
) -> None:
    """Train and leave `checkpoint.pt`, float16 weights averaged over the last steps, and `loss.csv` in the folder.

    Args:
        model: a diffusers model is expected as `model.transformer`; its blocks are compiled.
        loss_of: the loss of one batch, drawn from the generator (of the CPU).
        seconds: how long; the learning rate falls over the time that is given.
        rate: highest learning rate.
        seed: of what is drawn from the generator; noise and initial weights come from torch's own.
    """
    device = next(model.parameters()).device
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # torch 2.11's failed on an H100 with an illegal memory access
    generator = torch.Generator().manual_seed(seed)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=moving_average(EMA_HORIZON))
    model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    matrices = [parameter for parameter in model.transformer.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2] + [model.words.weight]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=device.type == "cuda")
    started, step = time.monotonic(), 0
    rows: list[list[str]] = []
    while (share := (time.monotonic() - started) / seconds) < 1:
        stage = next(stage for stage in stages if share < stage.until)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(stage, generator)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / WARMUP_STEPS, max(0.01, 1.25 * (1 - share)), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averaged.update_parameters(model)
        if step % 20 == 0:
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"loss is {loss.item()} at step {step}; lower the rate {rate}")
            shape = [str(stage.size), str(stage.frames)]
            passed = time.monotonic() - started
            rows.append([str(step), *shape, f"{loss.item():.5f}", f"{float(norm):.4f}", f"{passed:.1f}"])
            if step % 500 == 0:
                print(f"step {step}, {passed:.0f} s, {stage}, loss {loss.item():.4f}", flush=True)
        step += 1
    with (folder / "loss.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "size", "frames", "loss", "gradient_norm", "seconds"], *rows])
    state = {"step": step, "averaged": averaged.module.half().state_dict()}
    write_atomically(folder / "checkpoint.pt", lambda path: torch.save(state, path))
    print(f"trained {step} steps", flush=True)


def command_line(description: str, seconds: float) -> argparse.ArgumentParser:
    """The command line of a training script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoint.pt and loss.csv are written")
    parser.add_argument("--seconds", type=float, default=seconds, help="how long to train")
    parser.add_argument("--device", default="cuda", help="device to train on")
    return parser
