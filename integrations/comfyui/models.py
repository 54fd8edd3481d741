"""ComfyUI's diffusion models as data: where their blocks are, how their tokens lie, and which of them stay dense.

A new model is a new entry of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor

from paroattn import InputError, TokenGrid

TextSide = Literal["prefix", "suffix"]
"""Whether text tokens stand before or after the visual ones."""


@dataclass(frozen=True)
class Family:
    """What the adapter needs to know of a class of diffusion models.

    Attributes:
        plan_classes: classes of diffusers whose plans fit.
        blocks: attributes with the lists of blocks, in the order of the plan's layers, and the name under which
            ComfyUI lets a patch replace a block of that list. The first attention call of a block is its
            self-attention.
        heads: number of heads of a model.
        width: channels of all heads of a model.
        patch: latent frames, rows and columns of one token: 3 numbers, 2 (of one frame each) or 1.
        text: the side on which text tokens stand in self-attention, or None if they take no part in it.
        refused: names of arguments of a forward call with which calls stay dense, and why.
    """

    plan_classes: tuple[str, ...]
    blocks: tuple[tuple[str, str], ...]
    heads: Callable[[Any], int]
    width: Callable[[Any], int]
    patch: Callable[[Any], int | tuple[int, ...]]
    text: Callable[[Any], TextSide | None]
    refused: Mapping[str, str] = field(default_factory=dict)

    def block_names(self, model: Any) -> list[tuple[str, int]]:
        """The blocks of a model as patches name them, ("double_block", 0) and so on, in the order of the layers."""
        return [(name, number) for attribute, name in self.blocks for number in range(len(getattr(model, attribute)))]

    def grid(self, model: Any, latent: Tensor, context: Tensor | None) -> TokenGrid:
        """The token grid of a forward call.

        Args:
            model: the diffusion model.
            latent: [B, C, H, W] or [B, C, F, H, W]; ComfyUI pads it up to whole tokens.
            context: [B, text tokens, C], or None.
        """
        patch = self.patch(model)
        patch = (patch,) * 2 if isinstance(patch, int) else tuple(patch)
        patch, shape = (1, *patch)[-3:], (1, *latent.shape[2:])[-3:]
        frames, height, width = (-(-size // own) for size, own in zip(shape, patch, strict=True))
        side = self.text(model)
        if side is None:
            return TokenGrid(frames, height, width)
        return TokenGrid(frames, height, width, 0 if context is None else context.shape[1], side)


def _hunyuan_text(model: Any) -> TextSide:
    """The text stood after the video, and the blocks said so, until ComfyUI put it before."""
    return "suffix" if getattr(model.double_blocks[0], "flipped_img_txt", False) else "prefix"


_DOUBLE_AND_SINGLE = (("double_blocks", "double_block"), ("single_blocks", "single_block"))

FAMILIES = {
    "WanModel": Family(
        plan_classes=("WanTransformer3DModel",),
        blocks=(("blocks", "double_block"),),
        heads=attrgetter("num_heads"),
        width=attrgetter("dim"),
        patch=attrgetter("patch_size"),
        text=lambda model: None,
    ),
    "HunyuanVideo": Family(
        plan_classes=("HunyuanVideoTransformer3DModel",),
        blocks=_DOUBLE_AND_SINGLE,
        heads=attrgetter("num_heads"),
        width=attrgetter("hidden_size"),
        patch=attrgetter("patch_size"),
        text=_hunyuan_text,
    ),
    "Flux": Family(
        plan_classes=("FluxTransformer2DModel",),
        blocks=_DOUBLE_AND_SINGLE,
        heads=attrgetter("num_heads"),
        width=attrgetter("hidden_size"),
        patch=attrgetter("patch_size"),
        text=lambda model: "prefix",
    ),
    "QwenImageTransformer2DModel": Family(
        plan_classes=("QwenImageTransformer2DModel",),
        blocks=(("transformer_blocks", "double_block"),),
        heads=lambda model: model.transformer_blocks[0].attn.heads,
        width=attrgetter("inner_dim"),
        patch=attrgetter("patch_size"),
        text=lambda model: "prefix",
    ),
    "LTXVModel": Family(
        plan_classes=("LTXVideoTransformer3DModel",),
        blocks=(("transformer_blocks", "double_block"),),
        heads=lambda model: model.transformer_blocks[0].attn1.heads,
        width=lambda model: model.transformer_blocks[0].attn1.heads * model.transformer_blocks[0].attn1.dim_head,
        patch=lambda model: 1,
        text=lambda model: None,
        # Tokens of the box are taken out and others are put in, which can leave their number as it was.
        refused={"keyframe_idxs": "guide frames take tokens out of the video and stand beside it"},
    ),
}
"""By the class of the diffusion model."""

_OWN_ATTENTION = "it has tokens or attention beside the blocks of Wan, for which no plan is made"

DENSE_CLASSES = {
    "VaceWanModel": "VACE runs blocks of its own under the indices of the main ones, and no plan here is for them",
    "CameraWanModel": _OWN_ATTENTION,
    "WanModel_S2V": _OWN_ATTENTION,
    "HumoWanModel": _OWN_ATTENTION,
    "SCAILWanModel": _OWN_ATTENTION,
    "AnimateWanModel": _OWN_ATTENTION,
    "WanDancerModel": _OWN_ATTENTION,
}
"""Classes that derive from a known one and stay dense as a whole, and why."""


def family_of(model: Any) -> tuple[Family, str | None]:
    """The family of a diffusion model, and why it stays dense as a whole, or None if it need not.

    Raises:
        InputError: a class that is in neither list. Nothing is guessed from what it derives from: a model that adds
            attention of its own does so, too.
    """
    name = type(model).__name__
    if name in FAMILIES:
        return FAMILIES[name], None
    if name in DENSE_CLASSES:
        base = next(kind.__name__ for kind in type(model).__mro__ if kind.__name__ in FAMILIES)
        return FAMILIES[base], f"{name}: {DENSE_CLASSES[name]}"
    raise InputError(f"model is a {name}; this node knows {', '.join(FAMILIES)}. Take the node out for this model.")
