"""Models described as data: where their self-attention is, where text stands and how their token grid is found.

A new model is a new entry of `DESCRIPTORS` (docs/models.md shows one).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paroattn.errors import InputError
from paroattn.grid import MOST_REFERENCES, Boxes, TokenGrid
from paroattn.integrations.positions import (
    box_of_positions,
    common_sum,
    count_at_end,
    first_of,
    images_of_positions,
    last_video_of_positions,
)

Arguments = Mapping[str, Any]
"""Arguments of a forward call of a transformer, by name."""


def lengths(*names: str) -> Callable[[Any, Arguments], int]:
    """How many tokens the arguments of these names hold together; those that are not given hold none."""

    def count(config: Any, arguments: Arguments) -> int:
        given = (arguments.get(name) for name in names)
        return sum(tokens.shape[1] for tokens in given if tokens is not None)

    return count


@dataclass(frozen=True)
class ModelDescriptor:
    """What paroattn needs to know of a transformer class.

    Attributes:
        self_attention: regular expressions of module names, in the order of the layers; group 1 is the block number.
        boxes: frames, height and width in tokens of each box of visual tokens, from the model's config and the
            arguments of a forward call; None if visual tokens form no boxes.
        references_position: whether the boxes after the first stand "after" or "before" it.
        text: whether text tokens, and what else is not of the box, stand before ("prefix") or after ("suffix") the
            visual ones in self-attention, or None if they take no part in it.
        text_tokens: how many there are, from the model's config and the arguments of a forward call; None where that is
            what `hidden_states` [B, N, C] has beside the boxes.
        text_asks: text tokens are queries, too; False where they are keys only.
        pair_masks: masks are [B, 1 or H, N, N], and their rows are the same for all visual tokens and heads.
        text_masks: they are added, 0 for what is seen, and have rows of their own for text (causal text of OmniGen).
        splits: what context parallelism splits over ranks: "all" tokens as one sequence, "parts": visual tokens and
            text tokens, each by itself, or "visual" tokens only; None where it is not known.
        timestep_range: the timestep that stands for pure noise: 1000, or 1 for models that are handed a share.
        ascending: timesteps grow while noise falls (Mochi, Z-Image).
        latents_of, timestep_of: find the latents, a tensor or a list, and the timestep among the arguments.
    """

    self_attention: tuple[str, ...]
    boxes: Callable[[Any, Arguments], Boxes | None]
    references_position: Literal["before", "after"] = "after"
    text: Literal["prefix", "suffix"] | None = None
    text_tokens: Callable[[Any, Arguments], int] | None = lengths("encoder_hidden_states")
    text_asks: bool = True
    pair_masks: bool = False
    text_masks: bool = False
    splits: Literal["all", "parts", "visual"] | None = None
    timestep_range: float = 1000.0
    ascending: bool = False
    latents_of: Callable[[Arguments], Any] = itemgetter("hidden_states")
    timestep_of: Callable[[Arguments], Any] = itemgetter("timestep")

    def grid(self, config: Any, arguments: Arguments) -> TokenGrid | None:
        """The token grid of a forward call, or None if its visual tokens form no boxes."""
        boxes = self.boxes(config, arguments)
        if boxes is None or len(boxes) > 1 + MOST_REFERENCES:
            return None
        grid = TokenGrid(*boxes[0], references=boxes[1:], references_position=self.references_position)
        if self.text is None:
            return grid
        if self.text_tokens is None:
            text_tokens = arguments["hidden_states"].shape[1] - grid.visual_tokens
        else:
            text_tokens = self.text_tokens(config, arguments)
        return replace(grid, text_tokens=text_tokens, text_position=self.text)

    def level(self, timestep: Tensor | float) -> Tensor:
        """The noise level of a forward call, a 0-dim float32 tensor where the timestep is: 1 is pure noise.

        A timestep per token, smaller for tokens that are given (image-to-video), counts as its largest.
        """
        share = torch.as_tensor(timestep).float().amax() / self.timestep_range
        return 1 - share if self.ascending else share

    def timestep(self, level: float) -> float:
        """The timestep of a noise level."""
        return (1 - level if self.ascending else level) * self.timestep_range


def latents(*dimensions: int) -> Callable[[Any, Arguments], Boxes]:
    """One box from the shape of latents: which dimensions of `hidden_states` are (frames,) height and width."""

    def boxes(config: Any, arguments: Arguments) -> Boxes:
        patch = config.patch_size
        if isinstance(patch, int):
            patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
        patch = (1, *patch)[-3:]
        shape = arguments["hidden_states"].shape
        *frames, height, width = (shape[dimension] for dimension in dimensions)
        return (((frames[0] // patch[0] if frames else 1), height // patch[1], width // patch[2]),)

    return boxes


def _ltx_video(config: Any, arguments: Arguments) -> Boxes | None:
    """Of LTX, from sizes or, with conditions that stand before the video, from coordinates [B, 3, N]."""
    there, coordinates = arguments["hidden_states"].shape[1], arguments.get("video_coords")
    frames, height, width = (arguments.get(name) or 0 for name in ("num_frames", "height", "width"))
    if frames or coordinates is None:
        return ((frames, height, width),) if 0 < frames * height * width <= there else None
    return last_video_of_positions(coordinates[0].T)


def _image_shapes(config: Any, arguments: Arguments) -> Boxes:
    first = arguments["img_shapes"][0]
    return ((*first,),) if isinstance(first[0], int) else tuple(map(tuple, first))  # Qwen-Image-Edit appends images


def _last_image_shape(config: Any, arguments: Arguments) -> Boxes:
    """Of Qwen-Image 2.1: what is generated comes last."""
    frames, height, width = arguments["img_shapes"][0][-1]
    return ((frames, height, width),)


def _text_and_conditions(config: Any, arguments: Arguments) -> int:
    """Of Qwen-Image 2.1: each token of text that stands for a part of a condition image becomes four."""
    conditions = sum(map(math.prod, arguments["img_shapes"][0][:-1]))
    return lengths("encoder_hidden_states")(config, arguments) + 3 * conditions // 4


def _position_ids(config: Any, arguments: Arguments) -> Boxes | None:
    if arguments.get("image_cond_hidden_states") is not None:  # of Flux 3
        return None
    ids: Tensor = arguments["img_ids"]
    return images_of_positions(ids[0] if ids.ndim == 3 else ids)


def _positions_of_all(config: Any, arguments: Arguments) -> Boxes | None:
    """Of one packed sequence, with the image's tokens behind the text's."""
    return images_of_positions(arguments["position_ids"][arguments["encoder_hidden_states"].shape[1] :])


def _positions_of_indicated(config: Any, arguments: Arguments) -> Boxes | None:
    """Of one packed sequence of Ideogram, in which an indicator tells the image's tokens: the same in every sample."""
    count = count_at_end(arguments["indicator"])
    return None if count is None else images_of_positions(arguments["position_ids"][0, -count:])


def _those_not_indicated(config: Any, arguments: Arguments) -> int:
    indicator: Tensor = arguments["indicator"]
    return indicator.shape[1] - (count_at_end(indicator) or 0)


def _positions_of_video(config: Any, arguments: Arguments) -> Boxes | None:
    """Of one packed sequence of MiniMax-H3, with the video's tokens at its end; references are video tokens, too."""
    video, ids = arguments["video_indices"], arguments["position_ids"]
    at_end = first_of(video) == len(ids) - len(video)
    box = box_of_positions(ids[-len(video) :]) if at_end else None
    return None if box is None else (box,)


def _list_of_latents(config: Any, arguments: Arguments) -> Boxes | None:
    """Of Z-Image, which is handed a list of [C, F, H, W]; its omni mode a list of lists."""
    latents, patch = arguments["x"], arguments.get("patch_size", 2)
    if not isinstance(latents[0], Tensor) or len({item.shape for item in latents}) != 1:
        return None
    _, frames, height, width = latents[0].shape
    return ((frames // arguments.get("f_patch_size", 1), height // patch, width // patch),)


def _captions_and_padding(config: Any, arguments: Arguments) -> int:
    """Of Z-Image: image and captions are both padded to multiples of 32; the image's padding stands behind it."""
    boxes = _list_of_latents(config, arguments)
    image = 0 if boxes is None else -math.prod(boxes[0]) % 32
    return image + max(-(-len(caption) // 32) * 32 for caption in arguments["cap_feats"])


def _one_prompt_length(config: Any, arguments: Arguments) -> Boxes | None:
    """Of Lumina 2, whose image's tokens begin where those of each sample's prompt end."""
    return None if common_sum(arguments["encoder_attention_mask"]) is None else latents(2, 3)(config, arguments)


def _all_items(config: Any, arguments: Arguments) -> Boxes:
    """Of JoyImage, where items of one size [B, items, C, F, H, W] follow each other like frames."""
    shape = arguments["hidden_states"].shape
    items = shape[1] if len(shape) == 6 else 1
    patch = config.patch_size
    return ((items * shape[-3] // patch[0], shape[-2] // patch[1], shape[-1] // patch[2]),)


def _history(config: Any, arguments: Arguments) -> int:
    """Tokens of Helios' history, which is coarser the older it is."""
    count = 0
    for name, factor in (("short", 1), ("mid", 2), ("long", 4)):
        past = arguments.get(f"latents_history_{name}")
        if past is not None:
            count += math.prod(
                -(-size // (factor * patch)) for size, patch in zip(past.shape[2:], config.patch_size, strict=True)
            )
    return count


def _video_and_history(config: Any, arguments: Arguments) -> Boxes:
    """Of HunyuanVideo Framepack: the history from the oldest and coarsest part on, and the video."""
    found = list(latents(2, 3, 4)(config, arguments))
    for name, factor in (("history_4x", 4), ("history_2x", 2), ("clean", 1)):
        past = arguments.get(f"latents_{name}")
        if past is not None:
            frames, height, width = past.shape[2:]
            found.append((-(-frames // factor), -(-height // (2 * factor)), -(-width // (2 * factor))))
    return tuple(found)


_DOUBLE_AND_SINGLE = (r"transformer_blocks\.(\d+)\.attn", r"single_transformer_blocks\.(\d+)\.attn")
_WAN = ModelDescriptor((r"blocks\.(\d+)\.attn1",), latents(2, 3, 4), splits="all")
_FLUX = ModelDescriptor(_DOUBLE_AND_SINGLE, _position_ids, text="prefix", splits="parts", timestep_range=1.0)
_COGVIDEOX = ModelDescriptor((r"transformer_blocks\.(\d+)\.attn1",), latents(1, 3, 4), text="prefix", splits="visual")
_LTX = ModelDescriptor(
    (r"transformer_blocks\.(\d+)\.attn1",), _ltx_video, text="prefix", text_tokens=None, splits="all"
)
_COGVIEW = replace(_COGVIDEOX, boxes=latents(2, 3))

DESCRIPTORS = {
    # Video
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": replace(_WAN, self_attention=(r"blocks\.(\d+)\.attn1", r"vace_blocks\.(\d+)\.attn1")),
    "WanAnimateTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "AnyFlowTransformer3DModel": replace(_WAN, boxes=latents(1, 3, 4)),
    "HeliosTransformer3DModel": replace(_WAN, text="prefix", text_tokens=_history),
    "CogVideoXTransformer3DModel": _COGVIDEOX,
    "EasyAnimateTransformer3DModel": replace(
        _COGVIDEOX,
        boxes=latents(2, 3, 4),
        text_tokens=lengths("encoder_hidden_states", "encoder_hidden_states_t5"),
    ),
    "HunyuanVideoTransformer3DModel": ModelDescriptor(
        _DOUBLE_AND_SINGLE, latents(2, 3, 4), text="suffix", splits="visual"
    ),
    "HunyuanVideoFramepackTransformer3DModel": ModelDescriptor(
        _DOUBLE_AND_SINGLE,
        _video_and_history,
        references_position="before",
        text="suffix",
        text_tokens=lengths("encoder_hidden_states", "image_embeds"),
    ),
    "HunyuanVideo15Transformer3DModel": ModelDescriptor(
        (r"transformer_blocks\.(\d+)\.attn",),
        latents(2, 3, 4),
        text="suffix",
        text_tokens=lengths("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"),
        pair_masks=True,
        splits="visual",
    ),
    "MotifVideoTransformer3DModel": ModelDescriptor(
        _DOUBLE_AND_SINGLE,
        latents(2, 3, 4),
        text="suffix",
        text_tokens=lengths("encoder_hidden_states", "image_embeds"),
    ),
    "LTXVideoTransformer3DModel": _LTX,
    "LTX2VideoTransformer3DModel": replace(_LTX, text="suffix"),
    "MiniMaxH3Transformer3DModel": ModelDescriptor(
        (r"transformer_blocks\.(\d+)\.attn",),
        _positions_of_video,
        text="prefix",
        text_tokens=lambda config, arguments: len(arguments["position_ids"]) - len(arguments["video_indices"]),
        splits="all",
        timestep_range=1.0,
        ascending=True,
        timestep_of=lambda arguments: arguments["timestep"][arguments["timestep_indices"][-1]],
    ),
    "MochiTransformer3DModel": ModelDescriptor(
        (r"transformer_blocks\.(\d+)\.attn1",), latents(2, 3, 4), text="suffix", splits="visual", ascending=True
    ),
    "AllegroTransformer3DModel": ModelDescriptor((r"transformer_blocks\.(\d+)\.attn1",), latents(2, 3, 4)),
    "CosmosTransformer3DModel": ModelDescriptor(
        (r"transformer_blocks\.(\d+)\.attn1",), latents(2, 3, 4), timestep_range=1.0
    ),
    "LatteTransformer3DModel": ModelDescriptor((r"transformer_blocks\.(\d+)\.attn1",), latents(3, 4)),
    "Kandinsky5Transformer3DModel": ModelDescriptor(
        (r"visual_transformer_blocks\.(\d+)\.self_attention",), latents(1, 2, 3)
    ),
    "Kandinsky6Transformer3DModel": ModelDescriptor(
        (r"visual_transformer_blocks\.(\d+)\.video_dec_block\.self_attention",), latents(1, 2, 3)
    ),
    # Images
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX,
    "Flux3Transformer2DModel": replace(
        _FLUX, self_attention=(r"mode_blocks\.image\.(\d+)\.attn", r"single_transformer_blocks\.(\d+)\.attn")
    ),
    "ChromaTransformer2DModel": replace(_FLUX, pair_masks=True),
    "LongCatImageTransformer2DModel": _FLUX,
    "OvisImageTransformer2DModel": _FLUX,
    "BriaTransformer2DModel": replace(_FLUX, timestep_range=1000.0),
    "BriaFiboTransformer2DModel": replace(_FLUX, timestep_range=1000.0),
    "Krea2Transformer2DModel": replace(
        _FLUX, self_attention=(r"transformer_blocks\.(\d+)\.attn",), boxes=_positions_of_all
    ),
    "Ideogram4Transformer2DModel": ModelDescriptor(
        (r"layers\.(\d+)\.attention",),
        _positions_of_indicated,
        text="prefix",
        text_tokens=_those_not_indicated,
        pair_masks=True,
        timestep_range=1.0,
        ascending=True,
    ),
    "QwenImageTransformer2DModel": ModelDescriptor(
        (r"transformer_blocks\.(\d+)\.attn",), _image_shapes, text="prefix", splits="parts", timestep_range=1.0
    ),
    "QwenImage21Transformer2DModel": ModelDescriptor(
        (r"transformer_blocks\.(\d+)\.attn",),
        _last_image_shape,
        text="prefix",
        text_tokens=_text_and_conditions,
        text_asks=False,
        timestep_range=1.0,
    ),
    "NucleusMoEImageTransformer2DModel": ModelDescriptor(
        (r"transformer_blocks\.(\d+)\.attn",), _image_shapes, text="suffix", text_asks=False, timestep_range=1.0
    ),
    "PRXTransformer2DModel": ModelDescriptor(
        (r"blocks\.(\d+)\.attention",), latents(2, 3), text="prefix", text_asks=False, timestep_range=1.0
    ),
    "SD3Transformer2DModel": ModelDescriptor(
        (r"transformer_blocks\.(\d+)\.attn", r"transformer_blocks\.(\d+)\.attn2"),
        latents(2, 3),
        text="suffix",
        splits="visual",
    ),
    "HunyuanImageTransformer2DModel": ModelDescriptor(
        _DOUBLE_AND_SINGLE,
        lambda config, arguments: latents(*range(2, arguments["hidden_states"].ndim))(config, arguments),
        text="suffix",
        text_tokens=lengths("encoder_hidden_states", "encoder_hidden_states_2"),
    ),
    "HiDreamImageTransformer2DModel": ModelDescriptor(
        (r"double_stream_blocks\.(\d+)\.block\.attn1", r"single_stream_blocks\.(\d+)\.block\.attn1"),
        latents(2, 3),
        text="suffix",
        text_tokens=lambda config, arguments: (
            arguments["encoder_hidden_states_t5"].shape[1] + 2 * arguments["encoder_hidden_states_llama3"].shape[-2]
        ),
        timestep_of=itemgetter("timesteps"),
    ),
    "ZImageTransformer2DModel": ModelDescriptor(
        (r"noise_refiner\.(\d+)\.attention", r"layers\.(\d+)\.attention"),
        _list_of_latents,
        text="suffix",
        text_tokens=_captions_and_padding,
        timestep_range=1.0,
        ascending=True,
        latents_of=itemgetter("x"),
        timestep_of=itemgetter("t"),
    ),
    "OmniGenTransformer2DModel": ModelDescriptor(
        (r"layers\.(\d+)\.self_attn",),
        latents(2, 3),
        text="prefix",
        text_tokens=lambda config, arguments: 1 + lengths("input_ids")(config, arguments),  # a token of time
        text_masks=True,
        timestep_range=1.0,
        ascending=True,
    ),
    "ErnieImageTransformer2DModel": ModelDescriptor(
        (r"layers\.(\d+)\.self_attention",), latents(2, 3), text="suffix", text_tokens=lengths("text_bth")
    ),
    "JoyImageEditTransformer3DModel": ModelDescriptor((r"double_blocks\.(\d+)\.attn",), _all_items, text="suffix"),
    "CogView3PlusTransformer2DModel": _COGVIEW,
    "CogView4Transformer2DModel": _COGVIEW,
    "GlmImageTransformer2DModel": replace(_COGVIEW, timestep_of=lambda arguments: arguments["timestep"] + 1),
    "AuraFlowTransformer2DModel": ModelDescriptor(
        (r"joint_transformer_blocks\.(\d+)\.attn", r"single_transformer_blocks\.(\d+)\.attn"),
        latents(2, 3),
        text="prefix",
        text_tokens=lambda config, arguments: arguments["encoder_hidden_states"].shape[1] + 8,  # registers
        timestep_range=1.0,
    ),
    "Lumina2Transformer2DModel": ModelDescriptor(
        (r"noise_refiner\.(\d+)\.attn", r"layers\.(\d+)\.attn"),
        _one_prompt_length,
        text="prefix",
        text_tokens=lambda config, arguments: common_sum(arguments["encoder_attention_mask"]) or 0,
        timestep_range=1.0,
        ascending=True,
    ),
    "LuminaNextDiT2DModel": ModelDescriptor(
        (r"layers\.(\d+)\.attn1",), latents(2, 3), pair_masks=True, timestep_range=1.0, ascending=True
    ),
    "HunyuanDiT2DModel": ModelDescriptor((r"blocks\.(\d+)\.attn1",), latents(2, 3)),
    "PixArtTransformer2DModel": ModelDescriptor((r"transformer_blocks\.(\d+)\.attn1",), latents(2, 3)),
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
    """The self-attention modules of a transformer, in the order of its layers.

    Raises:
        InputError: an unknown class, or a subclass of a known one whose attention is elsewhere or not a processor's.
    """
    found = []
    for rank, pattern in enumerate(describe(transformer).self_attention):
        for name, module in transformer.named_modules():
            match = re.fullmatch(pattern, name)
            if match:
                found.append((rank, int(match.group(1)), name, module))
    like = f"{type(transformer).__name__} is not like {known_class(transformer)}"
    if not found:
        patterns = " or ".join(describe(transformer).self_attention)
        raise InputError(f"{like}: it has no attention modules named {patterns}")
    for _, _, name, module in found:
        if not hasattr(module, "processor"):
            raise InputError(f"{like}: its {name} is a {type(module).__name__} without a processor")
    return [module for *_, module in sorted(found, key=lambda item: item[:2])]


def head_shape(attention: Any) -> tuple[int, int]:
    """Number of heads and head_dim of a self-attention module."""
    heads = getattr(attention, "heads", None) or attention.num_heads
    head_dim = getattr(attention, "head_dim", None)
    if head_dim is not None:
        return heads, head_dim
    projections = (getattr(attention, name, None) for name in ("to_q", "to_query"))
    width = getattr(attention, "inner_dim", None) or next(item.out_features for item in projections if item is not None)
    return heads, width // heads


def output_projection(attention: Any) -> Any:
    """The module that the heads of a self-attention module go through, or None if a block's other channels do, too."""
    found = getattr(attention, "to_out", getattr(attention, "out_layer", None))
    if isinstance(found, nn.ModuleList | nn.Sequential):
        return found[0]
    heads, head_dim = head_shape(attention)
    return found if getattr(found, "in_features", None) == heads * head_dim else None
