"""Random arguments for one forward call of each transformer class, described as data like the models themselves.

A model of `DESCRIPTORS` (integrations/descriptors.py) that is to be timed without weights has an entry here, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paroattn.errors import InputError

_STEP = 500  # of 1000: a timestep in the middle of the schedule


@dataclass(frozen=True)
class Latents:
    """Size of a forward call: what arguments are made from.

    Attributes:
        batch: videos or images at once.
        frames, height, width: of the latents, before patches are cut.
        text_tokens: of the prompt.
        device, dtype: of the model.
    """

    batch: int
    frames: int
    height: int
    width: int
    text_tokens: int
    device: torch.device
    dtype: torch.dtype

    @property
    def box(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    def random(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, device=self.device, dtype=self.dtype)

    def full(self, value: float, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full((self.batch,), value, device=self.device, dtype=dtype or self.dtype)

    def text_mask(self, dtype: torch.dtype) -> Tensor:
        return torch.ones(self.batch, self.text_tokens, device=self.device, dtype=dtype)


def _patch(config: Any) -> tuple[int, int, int]:
    """Frames, height and width of a patch of latents, as configs say it."""
    patch = config.patch_size
    if isinstance(patch, int):
        return getattr(config, "patch_size_t", None) or 1, patch, patch
    frames, height, width = patch
    return frames, height, width


@dataclass(frozen=True)
class CallDescriptor:
    """What a forward call of a transformer class needs; the functions take the model's config.

    Attributes:
        compression: video frames and pixels per latent.
        text_tokens: how many a prompt has.
        arguments: keyword arguments of `forward` for a size. Those that this version of diffusers does not know are
            left out.
        patch: frames, height and width of the latents that become one token.
    """

    compression: Callable[[Any], tuple[int, int]]
    text_tokens: Callable[[Any], int]
    arguments: Callable[[Any, Latents], Mapping[str, Any]]
    patch: Callable[[Any], tuple[int, int, int]] = _patch


def _wan(config: Any, size: Latents) -> dict[str, Any]:
    arguments = {
        "hidden_states": size.random(config.in_channels, *size.box),
        "timestep": size.full(_STEP, torch.long),
        "encoder_hidden_states": size.random(size.text_tokens, config.text_dim),
    }
    if config.image_dim is not None:  # Wan 2.1 image to video: CLIP's tokens of the first frame
        arguments["encoder_hidden_states_image"] = size.random(257, config.image_dim)
    return arguments


def _wan_vace(config: Any, size: Latents) -> dict[str, Any]:
    control = size.random(config.vace_in_channels, *size.box)
    return {**_wan(config, size), "control_hidden_states": control}


def _cogvideox(config: Any, size: Latents) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "hidden_states": size.random(size.frames, config.in_channels, size.height, size.width),
        "timestep": size.full(_STEP, torch.long),
        "encoder_hidden_states": size.random(size.text_tokens, config.text_embed_dim),
    }
    if config.use_rotary_positional_embeddings:
        patch_frames, patch = config.patch_size_t or 1, config.patch_size
        tokens = size.frames // patch_frames * (size.height // patch) * (size.width // patch)
        angles = torch.rand(tokens, config.attention_head_dim, device=size.device)
        arguments["image_rotary_emb"] = (angles.cos(), angles.sin())
    if config.ofs_embed_dim is not None:
        arguments["ofs"] = torch.full((1,), 2.0, device=size.device, dtype=size.dtype)
    return arguments


def _hunyuan(config: Any, size: Latents) -> dict[str, Any]:
    return {
        "hidden_states": size.random(config.in_channels, *size.box),
        "timestep": size.full(_STEP, torch.long),
        "encoder_hidden_states": size.random(size.text_tokens, config.text_embed_dim),
        "encoder_attention_mask": size.text_mask(size.dtype),
        "pooled_projections": size.random(config.pooled_projection_dim),
        "guidance": size.full(6000.0) if config.guidance_embeds else None,
    }


def _ltx(config: Any, size: Latents) -> dict[str, Any]:
    return {
        "hidden_states": size.random(size.frames * size.height * size.width, config.in_channels),
        "timestep": size.full(_STEP, torch.long),
        "encoder_hidden_states": size.random(size.text_tokens, config.caption_channels),
        "encoder_attention_mask": size.text_mask(torch.long),
        "num_frames": size.frames,
        "height": size.height,
        "width": size.width,
        "rope_interpolation_scale": (8 / 25, 32, 32),  # seconds and pixels per latent at 25 frames per second
    }


def _mochi(config: Any, size: Latents) -> dict[str, Any]:
    return {
        "hidden_states": size.random(config.in_channels, *size.box),
        "timestep": size.full(_STEP, torch.long),
        "encoder_hidden_states": size.random(size.text_tokens, config.text_embed_dim),
        "encoder_attention_mask": size.text_mask(torch.bool),
    }


def _flux(config: Any, size: Latents) -> dict[str, Any]:
    height, width = size.height // 2, size.width // 2  # the pipeline packs 2 x 2 latents into a token
    positions = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    ids = torch.cat((torch.zeros(height * width, 1, dtype=torch.long), positions), 1)
    return {
        "hidden_states": size.random(height * width, config.in_channels),
        "timestep": size.full(_STEP / 1000),
        "encoder_hidden_states": size.random(size.text_tokens, config.joint_attention_dim),
        "pooled_projections": size.random(config.pooled_projection_dim),
        "img_ids": ids.to(size.device, size.dtype),
        "txt_ids": torch.zeros(size.text_tokens, 3, device=size.device, dtype=size.dtype),
        "guidance": size.full(3.5, torch.float32) if config.guidance_embeds else None,
    }


def _qwen(config: Any, size: Latents) -> dict[str, Any]:
    height, width = size.height // 2, size.width // 2  # packed like Flux's
    return {
        "hidden_states": size.random(height * width, config.in_channels),
        "timestep": size.full(_STEP / 1000),
        "encoder_hidden_states": size.random(size.text_tokens, config.joint_attention_dim),
        "img_shapes": [[(1, height, width)]] * size.batch,
        "txt_seq_lens": [size.text_tokens] * size.batch,
        "guidance": size.full(4.0) if config.guidance_embeds else None,
    }


def _sd3(config: Any, size: Latents) -> dict[str, Any]:
    return {
        "hidden_states": size.random(config.in_channels, size.height, size.width),
        "timestep": size.full(_STEP, torch.long),
        "encoder_hidden_states": size.random(size.text_tokens, config.joint_attention_dim),
        "pooled_projections": size.random(config.pooled_projection_dim),
    }


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda config: value


def _wan_compression(config: Any) -> tuple[int, int]:
    return (4, 16) if config.in_channels == 48 else (4, 8)  # Wan 2.2 5B has a VAE of its own


CALLS = {
    "WanTransformer3DModel": CallDescriptor(_wan_compression, _always(512), _wan),
    "WanVACETransformer3DModel": CallDescriptor(_always((4, 8)), _always(512), _wan_vace),
    "CogVideoXTransformer3DModel": CallDescriptor(
        _always((4, 8)), lambda config: config.max_text_seq_length, _cogvideox
    ),
    "HunyuanVideoTransformer3DModel": CallDescriptor(_always((4, 8)), _always(256), _hunyuan),
    "LTXVideoTransformer3DModel": CallDescriptor(_always((8, 32)), _always(128), _ltx),
    "MochiTransformer3DModel": CallDescriptor(_always((6, 8)), lambda config: config.max_sequence_length, _mochi),
    # The pipeline packs 2 x 2 latents before the model sees them; the config does not say so.
    "FluxTransformer2DModel": CallDescriptor(_always((1, 8)), _always(512), _flux, _always((1, 2, 2))),
    "QwenImageTransformer2DModel": CallDescriptor(_always((1, 8)), _always(128), _qwen),
    "SD3Transformer2DModel": CallDescriptor(_always((1, 8)), _always(333), _sd3),
}


def forward_arguments(
    transformer: nn.Module,
    size: tuple[int, int, int],
    *,
    batch: int = 1,
    text_tokens: int | None = None,
) -> dict[str, Any]:
    """Random keyword arguments for one forward call of a transformer, on its device and in its dtype.

    Args:
        transformer: of a class in `CALLS`.
        size: frames, height and width in pixels of what would be made; cut to whole latents and patches.
        batch: videos or images at once.
        text_tokens: of the prompt; default: as many as the model's pipeline gives.

    Raises:
        InputError: a size too small for a single token.

    Example:
        >>> transformer(**forward_arguments(transformer, (81, 480, 832)), return_dict=False)  # doctest: +SKIP
    """
    model: Any = transformer
    call, config = CALLS[type(transformer).__name__], model.config
    per_frame, per_pixel = call.compression(config)
    patch_frames, patch_height, patch_width = call.patch(config)
    latents = Latents(
        batch,
        -(-((size[0] - 1) // per_frame + 1) // patch_frames) * patch_frames,  # pipelines pad frames, crop pictures
        size[1] // per_pixel // patch_height * patch_height,
        size[2] // per_pixel // patch_width * patch_width,
        call.text_tokens(config) if text_tokens is None else text_tokens,
        model.device,
        model.dtype,
    )
    if not latents.height or not latents.width:
        raise InputError(
            f"size is {'x'.join(map(str, size))}; expected at least {patch_height * per_pixel} x "
            f"{patch_width * per_pixel} pixels for this model"
        )
    known = inspect.signature(type(transformer).forward).parameters
    return {name: value for name, value in call.arguments(config, latents).items() if name in known}
