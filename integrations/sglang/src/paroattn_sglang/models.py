"""The models of SGLang that a plan can be used with, as data.

A model is here if it gives its attention layers names with numbers, and publishes latents of which the token grid can
be read. In SGLang 0.5.23 Flux, Qwen-Image and Z-Image give none to theirs.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from paroattn.errors import PlanError


class Model(NamedTuple):
    """A model as SGLang runs it.

    Attributes:
        config: SGLang's class of its configuration.
        layers: what the name of a self-attention layer matches; the group is its number in the order of diffusers.
        text: where text tokens stand among those that attend to each other, "prefix" or "suffix", or None.
    """

    config: str
    layers: re.Pattern[str]
    text: str | None

    def layer(self, prefix: str) -> int | None:
        """Number of the layer with a name, or None."""
        found = self.layers.search(prefix)
        return int(found[1]) if found else None


MODELS = {
    "WanTransformer3DModel": Model("WanVideoConfig", re.compile(r"(?:^|\.)blocks\.(\d+)\.attn1\.impl$"), None),
    "HunyuanVideoTransformer3DModel": Model(
        "HunyuanVideoConfig", re.compile(r"(?:^|\.)(?:double|single)_blocks\.(\d+)\.attn\.impl$"), "suffix"
    ),
}


def model_of(class_name: str, config: Any) -> Model:
    """The model that a plan was made for, if it is the one that SGLang runs.

    Args:
        class_name: from the plan.
        config: SGLang's configuration of the transformer.

    Raises:
        PlanError: the plan is for another model, or for one that is not in the list.
    """
    if class_name not in MODELS:
        raise PlanError(
            f"plan is for {class_name}; in SGLang, plans can be used with {', '.join(MODELS)}. Leave paroattn_plan "
            "out of --attention-backend-config."
        )
    model, found = MODELS[class_name], type(config).__name__
    if found != model.config:
        raise PlanError(
            f"plan is for {class_name}, which SGLang runs with a {model.config}; this model has a {found}. Load a "
            "plan that was made for this model."
        )
    return model


def layer_count(config: Any) -> int:
    """Self-attention layers of one transformer."""
    return int(config.num_layers) + int(getattr(config, "num_single_layers", 0))


def transformers(config: Any) -> int:
    """How many transformers take turns, as the two of Wan 2.2."""
    return 1 if getattr(config, "boundary_ratio", None) is None else 2


def patch_of(config: Any) -> tuple[int, int, int]:
    """Frames, height and width of latents that make one token."""
    size = config.patch_size
    if isinstance(size, int):
        return int(getattr(config, "patch_size_t", None) or size), size, size
    frames, height, width = size
    return int(frames), int(height), int(width)
