"""Tiny pipelines with random weights of every model class that paroattn knows, and calls of them.

Each is a `TinyModel`: how to build the pipeline, what to call it with, and what grid that gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import PIL.Image
import pytest
import torch
from packaging.version import Version

import paroattn
from paroattn import TokenGrid

STEPS = 3


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


NEWEST = "0.42"  # the diffusers that has all models


@dataclass(frozen=True)
class TinyModel:
    name: str
    build: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    grid: TokenGrid
    layers: int
    # The unmodified transformer compiles without graph breaks; None: but not with a plan.
    whole_graph: bool | None = True
    needs_newest: bool = False  # masks of older diffusers hide more than keys there

    def pipe(self):
        torch.manual_seed(0)
        is_old = Version(diffusers.__version__) < Version(NEWEST)
        if is_old and self.needs_newest:
            pytest.skip("attention stays dense with this diffusers")
        torch.use_deterministic_algorithms(True, warn_only=True)  # parameters that nobody initialises are NaN then
        try:
            pipe = self.build()
        except (AttributeError, ModuleNotFoundError) as error:
            if not is_old:
                raise
            pytest.skip(f"this diffusers does not have it: {error}")
        finally:
            torch.use_deterministic_algorithms(False)
        for transformer in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            if transformer is not None:
                for parameter in transformer.eval().parameters():
                    if parameter.isnan().any():
                        parameter.data.normal_(std=0.2)
                    elif parameter.ndim > 1:  # large enough that every layer's attention shows in the output
                        parameter.data *= 2
                        if not parameter.any():  # gates that open in training
                            parameter.data.normal_(std=0.2)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def latents(self, pipe, steps=STEPS, seed=7, **changes):
        generator = torch.Generator().manual_seed(seed)
        call = {**self.call(steps), "generator": generator, **changes}
        found = pipe(**call)
        while not isinstance(found, torch.Tensor):
            found = found[0]
        return found

    def schedule(self, pipe, **changes):
        """Noise levels of a generation."""
        levels = []
        with paroattn.observe(pipe, lambda call: None, on_step=lambda schedule: levels.append(schedule.level)):
            self.latents(pipe, **changes)
        return tuple(levels)

    def call(self, steps=STEPS):
        return {**self.arguments(), "num_inference_steps": steps, "output_type": "latent"}


def _flow(shift=3.0):
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)


def _wan_transformer(channels=4):
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=channels,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def _wan22():
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=_flow(),
        transformer=_wan_transformer(),
        transformer_2=_wan_transformer(),
        boundary_ratio=0.8,
    )


def _wan_arguments():
    return {
        "prompt_embeds": random(1, 1, 8, 32),
        "negative_prompt_embeds": random(2, 1, 8, 32),
        "height": 96,
        "width": 96,
        "num_frames": 21,
        "guidance_scale": 3.0,
    }


def _wan_image_to_video():
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return diffusers.WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=_flow(),
        transformer=_wan_transformer(channels=12),
        transformer_2=_wan_transformer(channels=12),
        boundary_ratio=0.8,
    )


def _wan_image_arguments():
    picture = PIL.Image.new("RGB", (96, 96), (200, 80, 40))
    return {**_wan_arguments(), "image": picture}


def _cogvideox():
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=16,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def _cogvideox_arguments():
    return {
        "prompt_embeds": random(1, 1, 16, 32),
        "negative_prompt_embeds": random(2, 1, 16, 32),
        "height": 96,
        "width": 128,
        "num_frames": 13,
        "guidance_scale": 6.0,
    }


def _hunyuan():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=32,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 4, 8),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=vae,
        transformer=transformer,
        scheduler=_flow(7.0),
    )


def _hunyuan_arguments():
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[:, 13:] = 0
    return {
        "prompt_embeds": random(1, 1, 20, 32),
        "pooled_prompt_embeds": random(2, 1, 16),
        "prompt_attention_mask": mask,
        "height": 96,
        "width": 96,
        "num_frames": 21,
        "guidance_scale": 6.0,
    }


def _flux_transformer():
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )


def _image_vae(channels=4):
    return diffusers.AutoencoderKL(
        sample_size=32,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5,
    )


def _flux():
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=_image_vae(),
        transformer=_flux_transformer(),
    )


def _flux_arguments():
    return {
        "prompt_embeds": random(1, 1, 12, 32),
        "pooled_prompt_embeds": random(2, 1, 32),
        "height": 20,
        "width": 28,
        "guidance_scale": 3.5,
    }


def _ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        patch_size=1,
        patch_size_t=1,
    )
    return diffusers.LTXPipeline(scheduler=_flow(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)


def _ltx_arguments():
    return {
        "prompt_embeds": random(1, 1, 8, 32),
        "prompt_attention_mask": torch.ones(1, 8),
        "negative_prompt_embeds": random(2, 1, 8, 32),
        "negative_prompt_attention_mask": torch.ones(1, 8),
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "guidance_scale": 3.0,
    }


def _mochi():
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=4,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


def _mochi_arguments():
    mask, negative = torch.ones(1, 16, dtype=torch.bool), torch.ones(1, 16, dtype=torch.bool)
    mask[:, 9:] = False
    negative[:, 3:] = False
    return {
        "prompt_embeds": random(1, 1, 16, 32),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": random(2, 1, 16, 32),
        "negative_prompt_attention_mask": negative,
        "height": 80,
        "width": 96,
        "num_frames": 25,
        "guidance_scale": 4.0,
    }


def _qwen():
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


def _qwen_arguments():
    # The negative prompt is shorter than the prompt: two numbers of text tokens in one generation.
    return {
        "prompt_embeds": random(1, 1, 11, 32),
        "prompt_embeds_mask": torch.ones(1, 11, dtype=torch.long),
        "negative_prompt_embeds": random(2, 1, 7, 32),
        "negative_prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long),
        "height": 80,
        "width": 112,
        "true_cfg_scale": 2.0,
    }


def _sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=32,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        scheduler=_flow(),
        transformer=transformer,
        vae=_image_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _sd3_arguments():
    return {
        "prompt_embeds": random(1, 1, 13, 32),
        "negative_prompt_embeds": random(2, 1, 13, 32),
        "pooled_prompt_embeds": random(3, 1, 64),
        "negative_pooled_prompt_embeds": random(4, 1, 64),
        "height": 20,
        "width": 28,
        "guidance_scale": 3.0,
    }


WAN22 = TinyModel("wan2.2", _wan22, _wan_arguments, TokenGrid(6, 6, 6), layers=4)
WAN22_IMAGE = TinyModel("wan2.2-i2v", _wan_image_to_video, _wan_image_arguments, TokenGrid(6, 6, 6), layers=4)
COGVIDEOX = TinyModel("cogvideox", _cogvideox, _cogvideox_arguments, TokenGrid(4, 6, 8, 16, "prefix"), layers=2)
HUNYUAN = TinyModel("hunyuan", _hunyuan, _hunyuan_arguments, TokenGrid(6, 6, 6, 20), layers=4)
FLUX = TinyModel("flux", _flux, _flux_arguments, TokenGrid(1, 10, 14, 12, "prefix"), layers=5)
LTX = TinyModel("ltx", _ltx, _ltx_arguments, TokenGrid(3, 8, 8, 0, "prefix"), layers=2)
MOCHI = TinyModel("mochi", _mochi, _mochi_arguments, TokenGrid(5, 5, 6, 16), layers=2)
QWEN = TinyModel("qwen", _qwen, _qwen_arguments, TokenGrid(1, 10, 14, 11, "prefix"), layers=2)
SD3 = TinyModel("sd3", _sd3, _sd3_arguments, TokenGrid(1, 10, 14, 13), layers=5)
MODELS = (WAN22, WAN22_IMAGE, COGVIDEOX, HUNYUAN, FLUX, LTX, MOCHI, QWEN, SD3)
