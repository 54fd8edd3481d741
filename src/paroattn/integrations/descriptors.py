"""Models described as data: where their self-attention is and how their token grid is found."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from paroattn.grid import TokenGrid
from paroattn.plan import ModelIdentity


@dataclass(frozen=True)
class ModelDescriptor:
    """What paroattn needs to know of a transformer class.

    Attributes:
        self_attention: regular expressions of module names, in the order of the layers; group 1 is the block number.
        grid: the token grid from the model's config and the keyword arguments of a forward call.
    """

    self_attention: tuple[str, ...]
    grid: Callable[[Any, Mapping[str, Any]], TokenGrid]


def _wan_grid(config: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    latents: Tensor = arguments["hidden_states"]  # [B, C, F, H, W]
    return TokenGrid(*(size // patch for size, patch in zip(latents.shape[2:], config.patch_size, strict=True)))


DESCRIPTORS = {
    "WanTransformer3DModel": ModelDescriptor(self_attention=(r"blocks\.(\d+)\.attn1",), grid=_wan_grid),
}


def describe(transformer: nn.Module) -> ModelDescriptor:
    """The descriptor of a transformer, or `ValueError` naming the classes that have one."""
    name = type(transformer).__name__
    if name not in DESCRIPTORS:
        raise ValueError(f"transformer is a {name}; paroattn knows {', '.join(DESCRIPTORS)}")
    return DESCRIPTORS[name]


def attention_modules(transformer: nn.Module, descriptor: ModelDescriptor) -> list[nn.Module]:
    """The self-attention modules of a transformer, in the order of its layers."""
    found = []
    for rank, pattern in enumerate(descriptor.self_attention):
        for name, module in transformer.named_modules():
            match = re.fullmatch(pattern, name)
            if match:
                found.append((rank, int(match.group(1)), module))
    return [module for _, _, module in sorted(found, key=lambda item: item[:2])]


def identify(transformer: nn.Module) -> ModelIdentity:
    """The identity that plans are checked against; weights do not count, so fine-tunes can share plans."""
    descriptor = describe(transformer)
    config: Any = transformer.config
    public = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode()).hexdigest()
    return ModelIdentity(
        class_name=type(transformer).__name__,
        config_hash=digest,
        layers=len(attention_modules(transformer, descriptor)),
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
    )
