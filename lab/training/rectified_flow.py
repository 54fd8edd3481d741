"""What training the bundled models has in common: noise levels, prompts left out, averaged weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NOISE_SHIFT = 3.0  # the samplers' schedulers use the same shift
EMPTY_PROMPT_SHARE = 0.1  # so that classifier-free guidance is possible


def noise_levels(count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Levels in (0, 1), logit-normal and shifted as the samplers' schedulers shift."""
    uniform = torch.randn(count, device=device, generator=generator).sigmoid()
    return NOISE_SHIFT * uniform / (1 + (NOISE_SHIFT - 1) * uniform)


def some_without_prompt(prompts: list[str], generator: torch.Generator) -> list[str]:
    """The prompts, a share of them empty."""
    keep = torch.rand(len(prompts), generator=generator) >= EMPTY_PROMPT_SHARE
    return [prompt if kept else "" for prompt, kept in zip(prompts, keep.tolist(), strict=True)]


def moving_average(horizon: int) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """For `AveragedModel`: an exponential moving average whose horizon grows with the steps taken, up to `horizon`."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        weight = 1 / min(horizon, 1 + int(count) / 4)
        torch._foreach_lerp_(averaged, current, weight)

    return update
