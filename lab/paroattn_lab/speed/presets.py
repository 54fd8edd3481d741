"""Published transformers at the sizes they are used at: `paroattn bench model` builds them with random weights.

A new model is a new entry of `PRESETS`: its `transformer/config.json` and the size of what it makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A transformer and the size of what it makes.

    Attributes:
        config: as in the model's `transformer/config.json`, with `_class_name`.
        size: frames, height and width in pixels; one frame for an image.
    """

    config: Mapping[str, Any]
    size: tuple[int, int, int]


_WAN: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
_WAN_1_3B = {**_WAN, "ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30}
_WAN_14B = {**_WAN, "ffn_dim": 13824, "num_attention_heads": 40, "num_layers": 40}

_COGVIDEOX_5B: dict[str, Any] = {
    "_class_name": "CogVideoXTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 16,
    "max_text_seq_length": 226,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "num_attention_heads": 48,
    "num_layers": 42,
    "out_channels": 16,
    "patch_size": 2,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "timestep_activation_fn": "silu",
    "use_learned_positional_embeddings": False,
    "use_rotary_positional_embeddings": True,
}

_HUNYUAN: dict[str, Any] = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 16,
    "mlp_ratio": 4.0,
    "num_attention_heads": 24,
    "num_layers": 20,
    "num_refiner_layers": 2,
    "num_single_layers": 40,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
    "pooled_projection_dim": 768,
    "qk_norm": "rms_norm",
    "rope_axes_dim": [16, 56, 56],
    "rope_theta": 256.0,
    "text_embed_dim": 4096,
}

_FLUX_DEV: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}

PRESETS = {
    "wan-2.1-1.3b-480p": Preset(_WAN_1_3B, (81, 480, 832)),
    "wan-2.1-14b-720p": Preset(_WAN_14B, (81, 720, 1280)),
    "wan-2.2-14b-720p": Preset(_WAN_14B, (81, 720, 1280)),  # of its two transformers, which are alike, a step runs one
    "cogvideox-5b": Preset(_COGVIDEOX_5B, (49, 480, 720)),
    "hunyuanvideo-720p": Preset(_HUNYUAN, (129, 720, 1280)),
    "flux.1-dev": Preset(_FLUX_DEV, (1, 1024, 1024)),
}
