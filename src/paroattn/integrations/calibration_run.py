"""Generating from calibration prompts while every attention call is looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import paroattn
from paroattn.calibration.keep import check_density, check_reachable
from paroattn.grid import TokenGrid
from paroattn.integrations.attach import Attachment, transformer_of
from paroattn.integrations.descriptors import identify
from paroattn.integrations.schedule import Schedule

Prompt = str | Mapping[str, Any]
Take = Callable[[int, Schedule, TokenGrid, Tensor, Tensor, Tensor, float], None]
"""Called with layer, schedule, grid, query, key, value [B, N, H, D] and the scale of the logits."""


class CalibrationRun:
    """Generates from all prompts with the model's own attention, handing every attention call to a function."""

    grid: TokenGrid
    num_steps: int

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Prompt],
        densities: Sequence[float],
        seed: int,
        call_arguments: Mapping[str, Any],
        progress: bool,
    ):
        if isinstance(prompts, (str, Mapping)) or not prompts:
            raise ValueError(f"prompts is {prompts!r}; expected a list of at least one prompt")
        for density in densities:
            check_density(density)
        self.pipe = pipe
        self._prompts = prompts
        self._densities = densities
        self._seed = seed
        self._call_arguments = call_arguments
        self._progress = progress

    def generate(self, take: Take, description: str) -> None:
        layers = identify(transformer_of(self.pipe)).layers
        with self.bar(len(self._prompts), description, "prompt") as bar:

            def follow(schedule: Schedule) -> None:
                bar.set_postfix_str(f"step {schedule.step + 1}/{schedule.num_steps}")

            def check_grid(grid: TokenGrid) -> None:
                if getattr(self, "grid", grid) != grid:
                    raise ValueError(f"prompts give different token grids: {self.grid}, then {grid}")
                for density in self._densities:
                    check_reachable(density, grid)
                self.grid = grid
                self.num_steps = attachment.schedule.num_steps

            def intercept(layer: int) -> Any:
                def attend(
                    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dense: Callable[[], Tensor]
                ) -> Tensor:
                    logit_scale = query.shape[-1] ** -0.5 if scale is None else scale
                    take(layer, attachment.schedule, self.grid, query, key, value, logit_scale)
                    return dense()

                return attend

            attachment = Attachment(self.pipe, [intercept(layer) for layer in range(layers)], check_grid, follow)
            try:
                for number in range(len(self._prompts)):
                    self.generate_one(number)
                    bar.update()
            finally:
                attachment.remove()

    def generate_one(self, number: int) -> Tensor:
        """Generate from one prompt with whatever the pipeline has attached; returns the final latents."""
        prompt = self._prompts[number]
        arguments = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        generator = torch.Generator().manual_seed(self._seed + number)
        call = {"output_type": "latent", **self._call_arguments, **arguments, "generator": generator}
        return self.pipe(**call)[0]

    def bar(self, total: int, description: str, unit: str) -> tqdm:
        return tqdm(total=total, desc=description, unit=unit, disable=not self._progress)

    def provenance(self, method: str, prompt_texts: Sequence[str] | None) -> dict[str, Any]:
        """What a plan records of every calibration; `prompt_texts` replace the prompts where those are embeddings."""
        texts = [prompt if isinstance(prompt, str) else prompt.get("prompt") for prompt in self._prompts]
        return {
            "paroattn": paroattn.__version__,
            "method": method,
            "prompts": list(prompt_texts) if prompt_texts else texts,
            "seed": self._seed,
            "num_inference_steps": self.num_steps,
        }


def spread(count: int, total: int) -> list[int]:
    """At most `count` different numbers spread evenly over range(total), ascending.

    Example:
        >>> spread(3, 6)
        [1, 3, 5]
    """
    return sorted({(2 * part + 1) * total // (2 * count) for part in range(count)})
