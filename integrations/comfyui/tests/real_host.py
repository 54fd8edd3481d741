"""ComfyUI itself as a host of tests, from the folder COMFYUI_DIR, on a CPU, with tiny models of random weights."""

from __future__ import annotations

import sys
from dataclasses import fields
from importlib import import_module
from types import SimpleNamespace

import torch


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


_CONFIGS = {
    "Wan": {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "num_heads": 2, "num_layers": 2, "ffn_dim": 32,
        "freq_dim": 32, "text_dim": 32, "in_dim": 4, "out_dim": 4, "cross_attn_norm": True, "qk_norm": True,
    },
    "Flux": {
        "image_model": "flux", "in_channels": 4, "out_channels": 4, "vec_in_dim": 32, "context_in_dim": 32,
        "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 3,
        "axes_dim": [4, 4, 8], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
        "txt_ids_dims": [],
    },
    "HunyuanVideo": {
        "image_model": "hunyuan_video", "in_channels": 4, "out_channels": 4, "vec_in_dim": 16, "context_in_dim": 32,
        "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [4, 4, 8], "theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": True,
        "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
        "meanflow_sum": False,
    },
    "Qwen-Image": {
        "image_model": "qwen_image", "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (8, 4, 4),
    },
    "LTX-Video": {
        "image_model": "ltxv", "in_channels": 4, "cross_attention_dim": 32, "attention_head_dim": 16,
        "num_attention_heads": 2, "caption_channels": 32, "num_layers": 2,
    },
}  # fmt: skip
_CONFIGS["Wan VACE"] = {**_CONFIGS["Wan"], "model_type": "vace", "vace_layers": 2, "vace_in_dim": 96}
_PARAMETERS = {
    "Flux": ("comfy.ldm.flux.model", "FluxParams"),
    "HunyuanVideo": ("comfy.ldm.hunyuan_video.model", "HunyuanVideoParams"),
}


class RealHost:
    """As `fake_host.FakeHost`."""

    def __init__(self, folder, models):
        sys.path.insert(0, folder)
        arguments, sys.argv = sys.argv, sys.argv[:1]  # ComfyUI reads its options from there
        try:
            import comfy.cli_args

            comfy.cli_args.args.cpu = True
            import comfy.samplers
            import comfyui_version
            import folder_paths
        finally:
            sys.argv = arguments
        folder_paths.models_dir = models
        self.name = f"ComfyUI {comfyui_version.__version__}"

    def base_model(self, family, dtype=torch.float32):
        from comfy import latent_formats, model_base, supported_models

        kinds = {
            "Wan": (supported_models.WAN21_T2V, model_base.WAN21),
            "Wan VACE": (supported_models.WAN21_Vace, model_base.WAN21_Vace),
            "Flux": (supported_models.Flux, model_base.Flux),
            "HunyuanVideo": (supported_models.HunyuanVideo, model_base.HunyuanVideo),
            "Qwen-Image": (supported_models.QwenImage, model_base.QwenImage),
            "LTX-Video": (supported_models.LTXV, model_base.LTXV),
        }
        config, kind = kinds[family]
        options = dict(_CONFIGS[family])
        if family in _PARAMETERS:  # which of them there are differs from version to version
            module, name = _PARAMETERS[family]
            known = {field.name for field in fields(getattr(import_module(module), name))}
            options = {key: value for key, value in options.items() if key in {*known, "image_model"}}
        own = config(options)
        own.set_inference_dtype(dtype, None)
        model = kind(own)
        model.latent_format = latent_formats.LatentFormat()
        return model

    def patcher(self, family):
        from fake_models import strong

        model = self.base_model(family)
        strong(model.diffusion_model)
        return _patcher_of(model)

    def patcher_of(self, family, transformer):
        from comfy import model_detection

        model = self.base_model(family)
        weights = {name: value.clone() for name, value in transformer.state_dict().items()}  # they are written to
        if family == "Wan":
            weights = {_wan_name(name): value for name, value in weights.items()}
        else:
            weights = model_detection.convert_diffusers_mmdit(weights)
        model.diffusion_model.load_state_dict(weights)
        return _patcher_of(model)

    def in_16_bits(self, family, dtype):
        from fake_models import strong

        model = self.base_model(family, dtype)
        strong(model.diffusion_model)
        return _patcher_of(model)

    def cond(self, family, seed=1, tokens=12, area=None, mask=None, reference=None):
        extra = {}
        if family == "Flux":
            extra |= {"pooled_output": random(seed + 50, 1, 32), "guidance": 3.5}
        if family == "HunyuanVideo":
            extra |= {"pooled_output": random(seed + 50, 1, 16), "guidance": 6.0}
        if family == "LTX-Video":  # of the text, for cross-attention
            extra["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
        if area is not None:
            extra |= {"area": area, "strength": 1.0}
        if mask is not None:
            extra["attention_mask"] = mask
        if reference is not None:
            extra["reference_latents"] = [reference]
        return [[random(seed, 1, tokens, 32), extra]]

    def image_to_video(self):
        from comfy import latent_formats, model_base, supported_models
        from fake_models import strong

        config = supported_models.WAN21_I2V({**_CONFIGS["Wan"], "model_type": "i2v", "in_dim": 12})
        config.set_inference_dtype(torch.float32, None)
        model = model_base.WAN21(config, image_to_video=True)
        model.latent_format = latent_formats.LatentFormat()
        strong(model.diffusion_model)
        return _patcher_of(model)

    def image_cond(self, seed):
        extra = {
            "concat_latent_image": random(9, 1, 4, 6, 12, 12),
            "concat_mask": torch.ones(1, 1, 6, 12, 12),
            "clip_vision_output": SimpleNamespace(penultimate_hidden_states=random(4, 1, 257, 1280)),
        }
        return [[random(seed, 1, 12, 32), extra]]

    def text_side(self, family):
        from comfy.ldm.flux.layers import DoubleStreamBlock

        if family != "HunyuanVideo":
            return "prefix"
        return "suffix" if "flipped_img_txt" in DoubleStreamBlock.__init__.__code__.co_varnames else "prefix"

    def sample(
        self, patcher, noise, sigmas, positive, negative=None, cfg=1.0, second_order=False, batched=True, window=None
    ):
        from comfy import sample, samplers

        if window is not None:
            from comfy.context_windows import (
                ContextFuseMethods,
                ContextSchedules,
                IndexListContextHandler,
                get_matching_context_schedule,
                get_matching_fuse_method,
            )

            patcher = patcher.clone()
            patcher.model_options["context_handler"] = IndexListContextHandler(
                context_schedule=get_matching_context_schedule(ContextSchedules.STATIC_STANDARD),
                fuse_method=get_matching_fuse_method(ContextFuseMethods.PYRAMID),
                context_length=window,
                context_overlap=0,
                dim=2,
            )
        if not batched:  # the two passes do not fit into memory together
            patcher.model.memory_required = lambda *shapes, **others: 1e30
        name = "dpmpp_2s_ancestral" if second_order else "euler"
        options = {"eta": 0.0} if second_order else {}
        sampler = samplers.ksampler(name, options)
        if negative is None:
            cfg, negative = 1.0, positive
        try:
            return sample.sample_custom(
                patcher, noise, cfg, sampler, torch.as_tensor(sigmas), positive, negative, torch.zeros_like(noise),
                disable_pbar=True, seed=0,
            )  # fmt: skip
        finally:
            vars(patcher.model).pop("memory_required", None)


def _patcher_of(model):
    from comfy.model_patcher import ModelPatcher

    return ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


_WAN_NAMES = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("attn1", "self_attn"), ("attn2", "cross_attn"), ("norm2", "norm3"), ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"), ("proj_out", "head.head"),
)  # fmt: skip


def _wan_name(name):
    """ComfyUI's name of a weight of diffusers' Wan."""
    if name == "scale_shift_table":
        return "head.modulation"
    for theirs, ours in _WAN_NAMES:
        name = name.replace(theirs, ours)
    return name.replace("scale_shift_table", "modulation")
