"""Models described as data: where their self-attention is, where text stands and how their token grid is found.

A new model is a new entry of `DESCRIPTORS` (docs/models.md shows one).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paroattn.errors import InputError
from paroattn.grid import TokenGrid

Box = tuple[int, int, int]
"""Frames, height and width in tokens."""


@dataclass(frozen=True)
class ModelDescriptor:
    """What paroattn needs to know of a transformer class.

    Attributes:
        self_attention: regular expressions of module names, in the order of the layers; group 1 is the block number.
        box: frames, height and width in tokens, from the model's config and the arguments of a forward call; None if
            the visual tokens are no single box.
        text: whether text tokens stand before ("prefix") or after ("suffix") the visual ones in self-attention, or
            None if they take no part in it.
        timestep_range: the timestep that stands for pure noise: 1000, or 1 for models that are handed a share.
        ascending: timesteps grow while noise falls (Mochi).
    """

    self_attention: tuple[str, ...]
    box: Callable[[Any, Mapping[str, Any]], Box | None]
    text: Literal["prefix", "suffix"] | None = None
    timestep_range: float = 1000.0
    ascending: bool = False

    def grid(self, config: Any, arguments: Mapping[str, Any]) -> TokenGrid | None:
        """The token grid of a forward call, or None if its visual tokens are no single box."""
        box = self.box(config, arguments)
        if box is None:
            return None
        if self.text is None:
            return TokenGrid(*box)
        return TokenGrid(*box, arguments["encoder_hidden_states"].shape[1], self.text)

    def level(self, timestep: Tensor | float) -> Tensor:
        """The noise level of a forward call, a 0-dim float32 tensor where the timestep is: 1 is pure noise.

        A timestep per token, smaller for tokens that are given (image-to-video), counts as its largest.
        """
        share = torch.as_tensor(timestep).float().amax() / self.timestep_range
        return 1 - share if self.ascending else share

    def timestep(self, level: float) -> float:
        """The timestep of a noise level."""
        return (1 - level if self.ascending else level) * self.timestep_range


def latents(*dimensions: int) -> Callable[[Any, Mapping[str, Any]], Box]:
    """The box from the shape of latents: which dimensions of `hidden_states` are (frames,) height and width."""

    def box(config: Any, arguments: Mapping[str, Any]) -> Box:
        patch = config.patch_size
        if isinstance(patch, int):
            patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
        shape = arguments["hidden_states"].shape
        *frames, height, width = (shape[dimension] for dimension in dimensions)
        return (frames[0] // patch[0] if frames else 1), height // patch[1], width // patch[2]

    return box


def _sizes_as_arguments(config: Any, arguments: Mapping[str, Any]) -> Box | None:
    frames, height, width = (arguments.get(name) or 0 for name in ("num_frames", "height", "width"))
    whole = arguments["hidden_states"].shape[1] == frames * height * width
    return (frames, height, width) if whole else None  # LTXConditionPipeline appends tokens of its conditions


def _image_shapes(config: Any, arguments: Mapping[str, Any]) -> Box | None:
    first = arguments["img_shapes"][0]
    shapes = [first] if isinstance(first[0], int) else list(first)
    if len(shapes) != 1:
        return None  # Qwen-Image-Edit appends images
    frames, height, width = shapes[0]
    return frames, height, width


def _position_ids(config: Any, arguments: Mapping[str, Any]) -> Box | None:
    ids: Tensor = arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    height, width = (ids[:, 1:3].amax(0) + 1).long().tolist()
    row_major = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).to(ids.device)
    whole = len(ids) == height * width and bool((ids == row_major).all())
    return (1, height, width) if whole else None  # Flux Kontext appends images, whose first id is not 0


DESCRIPTORS = {
    "WanTransformer3DModel": ModelDescriptor((r"blocks\.(\d+)\.attn1",), latents(2, 3, 4)),
    "WanVACETransformer3DModel": ModelDescriptor(
        (r"blocks\.(\d+)\.attn1", r"vace_blocks\.(\d+)\.attn1"), latents(2, 3, 4)
    ),
    "CogVideoXTransformer3DModel": ModelDescriptor(
        (r"transformer_blocks\.(\d+)\.attn1",), latents(1, 3, 4), text="prefix"
    ),
    "HunyuanVideoTransformer3DModel": ModelDescriptor(
        (r"transformer_blocks\.(\d+)\.attn", r"single_transformer_blocks\.(\d+)\.attn"),
        latents(2, 3, 4),
        text="suffix",
    ),
    "LTXVideoTransformer3DModel": ModelDescriptor((r"transformer_blocks\.(\d+)\.attn1",), _sizes_as_arguments),
    "MochiTransformer3DModel": ModelDescriptor(
        (r"transformer_blocks\.(\d+)\.attn1",), latents(2, 3, 4), text="suffix", ascending=True
    ),
    "FluxTransformer2DModel": ModelDescriptor(
        (r"transformer_blocks\.(\d+)\.attn", r"single_transformer_blocks\.(\d+)\.attn"),
        _position_ids,
        text="prefix",
        timestep_range=1.0,
    ),
    "QwenImageTransformer2DModel": ModelDescriptor(
        (r"transformer_blocks\.(\d+)\.attn",), _image_shapes, text="prefix", timestep_range=1.0
    ),
    "SD3Transformer2DModel": ModelDescriptor(
        (r"transformer_blocks\.(\d+)\.attn", r"transformer_blocks\.(\d+)\.attn2"), latents(2, 3), text="suffix"
    ),
}


def describe(transformer: nn.Module) -> ModelDescriptor:
    """The descriptor of a transformer, or `InputError` naming the classes that have one."""
    return DESCRIPTORS[known_class(transformer)]


def known_class(transformer: nn.Module) -> str:
    """The name of a transformer's class, or of the first that it inherits from, that has a descriptor."""
    for kind in type(transformer).__mro__:
        if kind.__name__ in DESCRIPTORS:
            return kind.__name__
    raise InputError(f"transformer is a {type(transformer).__name__}; paroattn knows {', '.join(DESCRIPTORS)}")


def attention_modules(transformer: nn.Module) -> list[Any]:
    """The self-attention modules of a transformer, in the order of its layers."""
    found = []
    for rank, pattern in enumerate(describe(transformer).self_attention):
        for name, module in transformer.named_modules():
            match = re.fullmatch(pattern, name)
            if match:
                found.append((rank, int(match.group(1)), module))
    return [module for _, _, module in sorted(found, key=lambda item: item[:2])]


def output_projection(attention: Any) -> Any:
    """The module that the heads of a self-attention module go through, or None if a block's other channels do, too."""
    projections = getattr(attention, "to_out", None)
    return None if projections is None else projections[0]
