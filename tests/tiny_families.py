"""Tiny pipelines of the classes beyond those of `tiny_models`: a line or two of sizes each.

In place of most VAEs stand their sizes, since nothing is decoded.
"""

from __future__ import annotations

import inspect

import diffusers
import PIL.Image
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator
from tiny_models import FLUX, HUNYUAN, LTX, MODELS, QWEN, TinyModel, random
from transformers import BatchFeature

from paroattn import TokenGrid


class Sizes:
    """What pipelines ask of a VAE that neither encodes nor decodes."""

    dtype = torch.float32

    def __init__(self, **sizes):
        self.config = FrozenDict(sizes)
        for name, value in sizes.items():
            setattr(self, name, value)

    def decode(self, latents, **_):
        return (latents,)


def _flow(shift=3.0):
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)


def _pipeline(kind, transformer, **components):
    """A pipeline whose other components are None."""
    needed = [name for name, p in inspect.signature(kind).parameters.items() if p.default is p.empty]
    return kind(**{**dict.fromkeys(needed), "scheduler": _flow(), "transformer": transformer, **components})


def _prompt(tokens=8, channels=32, **arguments):
    return {
        "prompt_embeds": random(1, 1, tokens, channels),
        "negative_prompt_embeds": random(2, 1, tokens, channels),
        **arguments,
    }


_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4,
    "text_dim": 32, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
_WAN_VAE = {"temperal_downsample": [False, True, True], "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
_VIDEO = {"height": 96, "width": 96, "num_frames": 21, "guidance_scale": 3.0}


def _skyreels():
    return _pipeline(
        diffusers.SkyReelsV2Pipeline,
        diffusers.SkyReelsV2Transformer3DModel(**_WAN),
        vae=Sizes(**_WAN_VAE),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )


def _flux2():
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    return _pipeline(diffusers.Flux2Pipeline, transformer, vae=vae)


_LTX2_VAES = {
    "vae": Sizes(
        spatial_compression_ratio=32, temporal_compression_ratio=8, latents_mean=torch.zeros(4),
        latents_std=torch.ones(4), scaling_factor=1.0,
    ),
    "audio_vae": Sizes(
        mel_compression_ratio=4, temporal_compression_ratio=4, sample_rate=16000, mel_hop_length=160, mel_bins=64,
        latent_channels=8, latents_mean=torch.zeros(128), latents_std=torch.ones(128),
    ),
}  # fmt: skip


def _ltx2():
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=2, caption_channels=32, rope_double_precision=False,
    )  # fmt: skip
    return _pipeline(diffusers.LTX2Pipeline, transformer, connectors=_pass_on, **_LTX2_VAES)


def _pass_on(embeds, mask, padding_side):
    """In place of the text connectors: the same embeddings for video and audio."""
    return embeds, embeds, mask


def _ltx2_arguments():
    mask = torch.ones(1, 8, dtype=torch.long)
    return _prompt(
        prompt_attention_mask=mask, negative_prompt_attention_mask=mask, height=256, width=256, num_frames=17,
        stg_scale=0.0, audio_stg_scale=0.0,
    )  # fmt: skip


def _hunyuan15():
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_refiner_layers=1,
        text_embed_dim=32, text_embed_2_dim=16, image_embed_dim=12, rope_axes_dim=(4, 4, 8), target_size=96,
    )  # fmt: skip
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    vae = Sizes(temporal_compression_ratio=4, spatial_compression_ratio=16, latent_channels=4, scaling_factor=1.0)
    pipe = _pipeline(diffusers.HunyuanVideo15Pipeline, transformer, vae=vae, guider=guider)
    pipe.vision_num_semantic_tokens, pipe.vision_states_dim = 6, 12
    return pipe


def _hunyuan15_arguments():
    mask = torch.ones(1, 11, dtype=torch.long)
    mask[:, 7:] = 0
    other = torch.ones(1, 5, dtype=torch.long)
    return _prompt(
        11, prompt_embeds_mask=mask, negative_prompt_embeds_mask=mask, prompt_embeds_2=random(3, 1, 5, 16),
        prompt_embeds_mask_2=other, negative_prompt_embeds_2=random(4, 1, 5, 16), negative_prompt_embeds_mask_2=other,
        height=96, width=96, num_frames=21,
    )  # fmt: skip


def _z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    vae = Sizes(block_out_channels=(4,), latent_channels=4, scaling_factor=1.0, shift_factor=0.0)
    return _pipeline(diffusers.ZImagePipeline, transformer, vae=vae)


def _z_image_arguments():
    return {
        "prompt_embeds": [random(1, 9, 32)],
        "negative_prompt_embeds": [random(2, 40, 32)],
        "height": 20,
        "width": 28,
        "guidance_scale": 3.0,
    }


def _qwen21():
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = Sizes(temperal_downsample=[False], z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return _pipeline(diffusers.QwenImage21Pipeline, transformer, vae=vae, processor=_NoProcessor())


class _NoProcessor:
    """In place of a text encoder's processor, which a pipeline asks how long its template is."""

    @property
    def tokenizer(self):
        return self

    def apply_chat_template(self, *_, **__):
        return [[0]]

    def encode(self, text):
        return [0]


def _qwen21_arguments():
    mask = torch.ones(1, 11, dtype=torch.long)
    mask[:, 8:] = 0
    return _prompt(11, prompt_embeds_mask=mask, height=160, width=224, true_cfg_scale=2.0)


_IMAGE = {"height": 160, "width": 224, "guidance_scale": 3.0}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
_FLUX = {**_HEADS, "in_channels": 16, "num_single_layers": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)}


def _simple(pipeline, transformer, /, vae=None, scheduler=None, more=None, **sizes):
    """How to build a pipeline by the names of its class and of its transformer's."""

    def build():
        components = {
            "vae": vae and Sizes(**vae),
            "scheduler": scheduler() if scheduler else _flow(),
            **(more() if more else {}),
        }
        return _pipeline(getattr(diffusers, pipeline), getattr(diffusers, transformer)(**sizes), **components)

    return build


def _mask(tokens, kept):
    mask = torch.ones(1, tokens, dtype=torch.long)
    mask[:, kept:] = 0
    return mask


def _kandinsky5_arguments():
    prompts = {
        f"{sign}prompt_embeds_{name}": random(seed, *shape)
        for seed, (name, shape) in enumerate({"qwen": (1, 8, 32), "clip": (1, 16)}.items())
        for sign in ("", "negative_")
    }
    lengths = torch.tensor([0, 8], dtype=torch.int32)
    return {**_VIDEO, **prompts, "prompt_cu_seqlens": lengths, "negative_prompt_cu_seqlens": lengths}


class _NoChecker:
    """In place of Cosmos' safety checker, which is a package of its own."""

    def to(self, device):
        return self


_cosmos2 = _simple(
    "Cosmos2TextToImagePipeline", "CosmosTransformer3DModel", **_HEADS, in_channels=4, out_channels=4,
    text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32), extra_pos_embed_type=None, concat_padding_mask=False,
    more=lambda: {"safety_checker": _NoChecker()},
    scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
)  # fmt: skip
_kandinsky5 = _simple(
    "Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel", in_visual_dim=4, out_visual_dim=4, in_text_dim=32,
    in_text_dim2=16, time_dim=16, model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
    visual_cond=False,
)  # fmt: skip
_allegro = _simple(
    "AllegroPipeline", "AllegroTransformer3DModel", **{**_HEADS, "attention_head_dim": 24}, cross_attention_dim=48,
    caption_channels=32, sample_height=12, sample_width=12, sample_frames=6, scheduler=diffusers.DDIMScheduler,
)  # fmt: skip
_latte = _simple(
    "LattePipeline", "LatteTransformer3DModel", **_HEADS, in_channels=4, out_channels=8, patch_size=2, sample_size=24,
    caption_channels=32, cross_attention_dim=32, norm_type="ada_norm_single", num_embeds_ada_norm=1000,
    norm_elementwise_affine=False, video_length=2, attention_bias=True, scheduler=diffusers.DDIMScheduler,
)  # fmt: skip
_easyanimate = _simple(
    "EasyAnimatePipeline", "EasyAnimateTransformer3DModel", **_HEADS, mmdit_layers=1, in_channels=4, out_channels=4,
    patch_size=2, text_embed_dim=32, time_embed_dim=4,
    vae={"spatial_compression_ratio": 8, "temporal_compression_ratio": 4, "latent_channels": 4},
)  # fmt: skip
_motif = _simple(
    "MotifVideoPipeline", "MotifVideoTransformer3DModel", **_HEADS, in_channels=9, out_channels=4, num_single_layers=2,
    text_embed_dim=32, rope_axes_dim=(4, 4, 8),
    vae={**_WAN_VAE, "scale_factor_temporal": 4, "scale_factor_spatial": 8},
    more=lambda: {"guider": diffusers.ClassifierFreeGuidance(guidance_scale=3.0)},
)  # fmt: skip
_helios = _simple(
    "HeliosPipeline", "HeliosTransformer3DModel", **{k: v for k, v in _WAN.items() if k != "rope_max_seq_len"},
    rope_dim=(8, 8, 8), vae={"scale_factor_temporal": 4, "scale_factor_spatial": 8, **_WAN_VAE},
)  # fmt: skip
_chroma = _simple(
    "ChromaPipeline", "ChromaTransformer2DModel", **_FLUX, approximator_num_channels=8, approximator_hidden_dim=16,
    approximator_layers=1,
)  # fmt: skip


def _longcat():
    pipe = _longcat_without_text()
    pipe._encode_prompt = lambda prompt: random(len(prompt[0]), 1, 12, 32)  # it cannot do with embeddings alone
    return pipe


_longcat_without_text = _simple(
    "LongCatImagePipeline", "LongCatImageTransformer2DModel", **{**_FLUX, "in_channels": 64}, pooled_projection_dim=32
)
_ovis = _simple("OvisImagePipeline", "OvisImageTransformer2DModel", **_FLUX, out_channels=16)
_bria = _simple(
    "BriaPipeline", "BriaTransformer2DModel", **_FLUX, vae={"block_out_channels": (1,) * 4, "shift_factor": 0.0}
)
_krea2 = _simple(
    "Krea2Pipeline", "Krea2Transformer2DModel", **_HEADS, in_channels=16, num_key_value_heads=1, intermediate_size=32,
    timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2,
    text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
    axes_dims_rope=(4, 4, 8),
)  # fmt: skip
_prx = _simple(
    "PRXPipeline", "PRXTransformer2DModel", in_channels=4, context_in_dim=32, hidden_size=32, mlp_ratio=1.0,
    num_heads=2, depth=2, axes_dim=[8, 8],
)  # fmt: skip
_hunyuan_image = _simple(
    "HunyuanImagePipeline", "HunyuanImageTransformer2DModel", **_HEADS, in_channels=4, out_channels=4,
    num_single_layers=2, num_refiner_layers=1, text_embed_dim=32, text_embed_2_dim=16, rope_axes_dim=(8, 8),
    more=lambda: {"guider": diffusers.ClassifierFreeGuidance(guidance_scale=3.0)},
)  # fmt: skip
_cogview3 = _simple(
    "CogView3PlusPipeline", "CogView3PlusTransformer2DModel", **_HEADS, in_channels=4, out_channels=4,
    text_embed_dim=32, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=16,
    scheduler=diffusers.CogVideoXDDIMScheduler,
)  # fmt: skip
_cogview4 = _simple(
    "CogView4Pipeline", "CogView4Transformer2DModel", **_HEADS, in_channels=4, out_channels=4, text_embed_dim=32,
    time_embed_dim=8, condition_dim=4,
)  # fmt: skip
_glm = _simple(
    "GlmImagePipeline", "GlmImageTransformer2DModel", **_HEADS, in_channels=4, out_channels=4, text_embed_dim=32,
    time_embed_dim=8, condition_dim=4, prior_vq_quantizer_codebook_size=8,
)  # fmt: skip
_auraflow = _simple(
    "AuraFlowPipeline", "AuraFlowTransformer2DModel", sample_size=16, in_channels=4, num_mmdit_layers=1,
    num_single_dit_layers=1, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=32,
    caption_projection_dim=32, pos_embed_max_size=256,
)  # fmt: skip
_lumina2 = _simple(
    "Lumina2Pipeline", "Lumina2Transformer2DModel", in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
    num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 8), axes_lens=(64, 32, 32),
    cap_feat_dim=32,
)  # fmt: skip
_lumina_next = _simple(
    "LuminaPipeline", "LuminaNextDiT2DModel", sample_size=20, in_channels=4, hidden_size=32, num_layers=2,
    num_attention_heads=2, num_kv_heads=1, multiple_of=16, cross_attention_dim=32,
)  # fmt: skip
_nucleus = _simple(
    "NucleusMoEImagePipeline", "NucleusMoEImageTransformer2DModel", **_HEADS, in_channels=16, out_channels=4,
    num_key_value_heads=1, joint_attention_dim=32, axes_dims_rope=(4, 4, 8), moe_enabled=False, mlp_ratio=1.0,
    capacity_factors=[2.0, 2.0],
)  # fmt: skip
_ernie = _simple(
    "ErnieImagePipeline", "ErnieImageTransformer2DModel", hidden_size=32, num_attention_heads=2, num_layers=2,
    ffn_hidden_size=32, in_channels=16, out_channels=16, text_in_dim=32, rope_axes_dim=(4, 4, 8),
)  # fmt: skip
_pixart = _simple(
    "PixArtSigmaPipeline", "PixArtTransformer2DModel", **_HEADS, in_channels=4, out_channels=8,
    cross_attention_dim=32, caption_channels=32, sample_size=32, scheduler=diffusers.DDIMScheduler,
)  # fmt: skip


def _modular(blocks, **components):
    """A pipeline that diffusers has as blocks only."""
    pipe = blocks().init_pipeline()
    pipe.update_components(**components)
    return pipe


def _minimax():
    from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3CoreDenoiseStep

    transformer = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=32, num_layers=2, num_refiner_layers=1, ffn_dim=32,
        text_dim=32, freq_dim=16, time_embed_hidden_dim=32, time_embed_dim=16, rope_freq_dim=2,
    )  # fmt: skip
    schedulers = {name: diffusers.MiniMaxH3Scheduler() for name in ("scheduler", "audio_scheduler")}
    return _modular(MiniMaxH3CoreDenoiseStep, transformer=transformer, **schedulers)


def _minimax_arguments():
    tags = torch.ones(7, dtype=torch.long)
    return {
        "prompt_embeds": random(1, 1, 7, 32), "text_token_tags": tags, "height": 96, "width": 128, "num_frames": 124,
        "output": "latents",
    }  # fmt: skip


def _flux3():
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3CoreDenoiseStep

    transformer = diffusers.Flux3Transformer2DModel(
        in_channels=128, cond_in_channels=128, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, timestep_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    return _modular(Flux3CoreDenoiseStep, transformer=transformer, scheduler=_flow(), guider=guider)


def _with_wan_vae(pipeline, transformer, /, **sizes):
    def build():
        vae = diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        )  # fmt: skip
        pipe = _pipeline(getattr(diffusers, pipeline), getattr(diffusers, transformer)(**sizes), vae=vae)
        pipe.encode_image = lambda image, device=None: random(3, 1, 5, 16)
        return pipe

    return build


_PICTURE = PIL.Image.new("RGB", (96, 96), (200, 80, 40))

_chronoedit = _with_wan_vae(
    "ChronoEditPipeline", "ChronoEditTransformer3DModel",
    **{**_WAN, "in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 48},
)  # fmt: skip
_wan_animate = _with_wan_vae(
    "WanAnimatePipeline", "WanAnimateTransformer3DModel",
    **{**_WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 16, "added_kv_proj_dim": 48},
    motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4}, motion_encoder_size=16, motion_style_dim=8, motion_dim=4,
    motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2,
)  # fmt: skip
_kandinsky6 = _simple(
    "Kandinsky6TI2VAPipeline", "Kandinsky6Transformer3DModel", in_visual_dim=4, out_visual_dim=4, in_text_dim=32,
    in_text_dim2=16, time_dim=16, model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
    visual_cond=False, in_audio_dim=4, out_audio_dim=4,
)  # fmt: skip


def _hidream():
    pipe = _large_hidream()
    pipe.default_sample_size = 24  # it scales images to this size
    return pipe


_large_hidream = _simple(
    "HiDreamImagePipeline", "HiDreamImageTransformer2DModel", num_layers=1, num_single_layers=1, attention_head_dim=16,
    num_attention_heads=2, patch_size=2, in_channels=4, out_channels=4, caption_channels=[32, 16], text_emb_dim=24,
    num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(4, 4, 8), max_resolution=(20, 28),
    llama_layers=[0, 1],
)  # fmt: skip
_joyimage = _simple(
    "JoyImageEditPipeline", "JoyImageEditTransformer3DModel", in_channels=4, out_channels=4, hidden_size=32,
    num_attention_heads=2, text_dim=32, mlp_width_ratio=1.0, num_layers=2, rope_dim_list=[4, 6, 6],
    vae={**_WAN_VAE, "scale_factor_temporal": 4, "scale_factor_spatial": 32},
)  # fmt: skip
_hunyuan_dit = _simple(
    "HunyuanDiTPipeline", "HunyuanDiT2DModel", num_attention_heads=2, attention_head_dim=16, num_layers=2, patch_size=2,
    in_channels=4, hidden_size=32, mlp_ratio=1.0, cross_attention_dim=32, cross_attention_dim_t5=32,
    pooled_projection_dim=16, text_len=4, text_len_t5=6, sample_size=16, use_style_cond_and_image_meta_size=False,
    scheduler=diffusers.DDPMScheduler,
)  # fmt: skip
_anyflow = _simple(
    "AnyFlowPipeline", "AnyFlowTransformer3DModel", **_WAN,
    scheduler=lambda: diffusers.FlowMapEulerDiscreteScheduler(),
)  # fmt: skip


def _bria_fibo():
    transformer = diffusers.BriaFiboTransformer2DModel(**_FLUX, text_encoder_dim=16)
    vae = Sizes(temperal_downsample=[False] * 4, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    pipe = _pipeline(diffusers.BriaFiboPipeline, transformer, vae=vae)

    def encode(**_):
        layers = [random(seed, 1, 12, 16) for seed in range(3, 7)]
        text = random(1, 1, 12, 32), random(2, 1, 12, 32), torch.zeros(1, 12, 3)
        return (*text, _mask(12, 7), _mask(12, 12), layers, layers)

    pipe.encode_prompt = encode  # it takes no embeddings
    return pipe


def _ideogram():
    def transformer():
        return diffusers.Ideogram4Transformer2DModel(
            **_HEADS, in_channels=16, intermediate_size=32, adaln_dim=8, llm_features_dim=32, mrope_section=(4, 2, 2)
        )

    pipe = _pipeline(diffusers.Ideogram4Pipeline, transformer(), unconditional_transformer=transformer())

    def encode(prompt, grid_h, grid_w, max_sequence_length, device):
        embeds = torch.nn.functional.pad(random(1, 1, max_sequence_length, 32), (0, 0, 0, grid_h * grid_w))
        return (embeds, *pipe._prepare_ids([5], grid_h, grid_w, max_sequence_length, device))

    pipe.encode_prompt = encode  # it takes no embeddings
    return pipe


def _kontext():
    flux = FLUX.build()
    return _pipeline(diffusers.FluxKontextPipeline, flux.transformer, vae=flux.vae)


def _kontext_arguments():
    """With an image to edit, as latents."""
    return {**FLUX.arguments(), "image": random(5, 1, 4, 16, 20), "max_area": 20 * 28}


def _ltx_condition():
    ltx = LTX.build()
    return _pipeline(diffusers.LTXConditionPipeline, ltx.transformer, vae=ltx.vae)


def _ltx_condition_arguments():
    """With a key frame that is not the first one: its tokens are joined to those of the video."""
    image = PIL.Image.new("RGB", (32, 32), "teal")
    return {**LTX.arguments(), "image": [image], "frame_index": [8], "strength": [1.0]}


def _framepack():
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=16, rope_axes_dim=(4, 4, 8), image_proj_dim=12,
        has_image_proj=True, has_clean_x_embedder=True, image_condition_type="latent_concat",
    )  # fmt: skip
    hunyuan = HUNYUAN.build()
    parts = {"vae": hunyuan.vae, "image_encoder": _Vision(), "feature_extractor": _Vision().features}
    return _pipeline(diffusers.HunyuanVideoFramepackPipeline, transformer, scheduler=hunyuan.scheduler, **parts)


class _Vision:
    """In place of an encoder of images."""

    dtype = torch.float32

    def features(self, **_):
        return BatchFeature({})

    def __call__(self):
        return BatchFeature({"last_hidden_state": random(3, 1, 6, 12)})


def _framepack_arguments():
    image, mask = PIL.Image.new("RGB", (96, 96), "teal"), torch.ones(1, 20, dtype=torch.long)
    sizes = {"num_frames": 17, "latent_window_size": 5}
    return {**HUNYUAN.arguments(), **sizes, "prompt_attention_mask": mask, "image": image}


def _omnigen():
    transformer = diffusers.OmniGenTransformer2DModel(
        in_channels=4, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48, num_layers=2,
        pad_token_id=0, vocab_size=64, pos_embed_max_size=16, time_step_dim=32,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1)
    inspect.getmodule(diffusers.OmniGenPipeline).OmniGenMultiModalProcessor = _Prompts  # which asks for torchvision
    vae = Sizes(block_out_channels=(4, 4, 4, 4))
    return _pipeline(diffusers.OmniGenPipeline, transformer, scheduler=scheduler, vae=vae)


class _Prompts:
    """In place of a processor of prompts and images: a prompt is as many tokens as it has words."""

    max_image_size = 1024

    def __init__(self, tokenizer, max_image_size):
        self.collator = OmniGenCollator(pad_token_id=0, hidden_size=32)

    def __call__(self, prompts, images, height, width, **_):
        texts = [list(range(1, 1 + len(prompt.split()))) for prompt in (*prompts, "low quality")]
        asked, negative = ({"input_ids": text, "pixel_values": None, "image_sizes": None} for text in texts)
        return self.collator([(asked, negative, None, [height, width])])


def _qwen_edit():
    qwen = QWEN.build()
    pipe = _pipeline(diffusers.QwenImageEditPlusPipeline, qwen.transformer, vae=qwen.vae)
    inspect.getmodule(type(pipe)).VAE_IMAGE_SIZE = 64 * 64  # in place of 1024 x 1024 pixels
    return pipe


def _qwen_edit_arguments():
    return {**QWEN.arguments(), "image": [PIL.Image.new("RGB", size, "teal") for size in ((32, 32), (64, 32))]}


FAMILIES = (
    TinyModel("ltx2", _ltx2, _ltx2_arguments, TokenGrid(3, 8, 8), layers=2),
    TinyModel(
        "hunyuan1.5", _hunyuan15, _hunyuan15_arguments, TokenGrid(6, 6, 6, 11 + 5 + 6), layers=2, whole_graph=False
    ),
    TinyModel(
        "flux2",
        _flux2,
        lambda: {"prompt_embeds": random(1, 1, 12, 32), "height": 20, "width": 28},
        TokenGrid(1, 10, 14, 12, "prefix"),
        layers=4,
    ),
    TinyModel("z-image", _z_image, _z_image_arguments, TokenGrid(1, 10, 14, 20 + 64), layers=3),
    TinyModel("qwen2.1", _qwen21, _qwen21_arguments, TokenGrid(1, 10, 14, 11, "prefix"), layers=2, whole_graph=False),
    TinyModel("minimax-h3", _minimax, _minimax_arguments, TokenGrid(37, 3, 4, 7 + 414, "prefix"), layers=2),
    TinyModel(
        "flux3",
        _flux3,
        lambda: _prompt(12, height=160, width=224, output="latents"),
        TokenGrid(1, 10, 14, 12, "prefix"),
        layers=3,
    ),
    TinyModel("skyreels", _skyreels, lambda: _prompt(**_VIDEO), TokenGrid(6, 6, 6), layers=2),
    TinyModel("cosmos2", _cosmos2, lambda: _prompt(**_IMAGE), TokenGrid(1, 10, 14), layers=2),
    TinyModel("kandinsky5", _kandinsky5, _kandinsky5_arguments, TokenGrid(6, 6, 6), layers=2),
    TinyModel(
        "allegro",
        _allegro,
        lambda: _prompt(
            negative_prompt=None,
            prompt_attention_mask=_mask(8, 5),
            negative_prompt_attention_mask=_mask(8, 8),
            height=96,
            width=96,
            num_frames=24,
        ),
        TokenGrid(6, 6, 6),
        layers=2,
    ),
    TinyModel(
        "chronoedit",
        _chronoedit,
        lambda: _prompt(512, image=_PICTURE, enable_temporal_reasoning=True, num_temporal_reasoning_steps=99, **_VIDEO),
        TokenGrid(6, 6, 6),
        layers=2,
    ),
    TinyModel(
        "wan-animate",
        _wan_animate,
        lambda: _prompt(
            512,
            image=_PICTURE,
            pose_video=[_PICTURE] * 13,
            face_video=[_PICTURE] * 13,
            segment_frame_length=13,
            height=96,
            width=96,
        ),
        TokenGrid(5, 6, 6),
        layers=2,
    ),
    TinyModel(
        "kandinsky6",
        _kandinsky6,
        lambda: _prompt(
            pooled_prompt_embeds=random(3, 1, 16),
            negative_pooled_prompt_embeds=random(4, 1, 16),
            sample_audio=False,
            **_VIDEO,
        ),
        TokenGrid(6, 6, 6),
        layers=2,
    ),
    TinyModel(
        "hidream",
        _hidream,
        lambda: {
            **_IMAGE,
            "prompt_embeds_t5": random(1, 1, 6, 32),
            "negative_prompt_embeds_t5": random(2, 1, 6, 32),
            "prompt_embeds_llama3": random(3, 2, 1, 5, 16),
            "negative_prompt_embeds_llama3": random(4, 2, 1, 5, 16),
            "pooled_prompt_embeds": random(5, 1, 24),
            "negative_pooled_prompt_embeds": random(6, 1, 24),
        },
        TokenGrid(1, 10, 14, 16),
        layers=2,
        whole_graph=False,
    ),
    TinyModel(
        "joyimage",
        _joyimage,
        lambda: _prompt(
            9, prompt_embeds_mask=_mask(9, 9), negative_prompt_embeds_mask=_mask(9, 9), height=832, width=1152
        ),
        TokenGrid(1, 13, 18, 9),
        layers=2,
    ),
    TinyModel(
        "hunyuan-dit",
        _hunyuan_dit,
        lambda: _prompt(
            4,
            prompt_attention_mask=_mask(4, 3),
            negative_prompt_attention_mask=_mask(4, 4),
            prompt_embeds_2=random(3, 1, 6, 32),
            negative_prompt_embeds_2=random(4, 1, 6, 32),
            prompt_attention_mask_2=_mask(6, 5),
            negative_prompt_attention_mask_2=_mask(6, 6),
            use_resolution_binning=False,
            **_IMAGE,
        ),
        TokenGrid(1, 10, 14),
        layers=2,
    ),
    TinyModel("anyflow", _anyflow, lambda: _prompt(**_VIDEO), TokenGrid(6, 6, 6), layers=2),
    TinyModel(
        "bria-fibo",
        _bria_fibo,
        lambda: {**_IMAGE, "prompt": "{}", "negative_prompt": ""},
        TokenGrid(1, 10, 14, 12, "prefix"),
        layers=4,
        needs_newest=True,
    ),
    TinyModel(
        "ideogram",
        _ideogram,
        lambda: {**_IMAGE, "prompt": "a", "guidance_schedule": None, "max_sequence_length": 9},
        TokenGrid(1, 10, 14, 9, "prefix"),
        layers=2,
    ),
    TinyModel(
        "latte",
        _latte,
        lambda: _prompt(negative_prompt=None, height=192, width=192, video_length=2),
        TokenGrid(1, 12, 12),
        layers=2,
    ),
    TinyModel(
        "easyanimate",
        _easyanimate,
        lambda: _prompt(
            12, prompt_attention_mask=_mask(12, 12), negative_prompt_attention_mask=_mask(12, 12), **_VIDEO
        ),
        TokenGrid(6, 6, 6, 12, "prefix"),
        layers=2,
    ),
    TinyModel(
        "motif",
        _motif,
        lambda: _prompt(
            12,
            prompt_attention_mask=_mask(12, 7),
            negative_prompt_attention_mask=_mask(12, 3),
            height=96,
            width=96,
            num_frames=21,
        ),
        TokenGrid(6, 6, 6, 12),
        layers=4,
    ),
    TinyModel(
        "helios",
        _helios,
        lambda: _prompt(**{**_VIDEO, "num_frames": 13}, history_sizes=[4, 2, 1], num_latent_frames_per_chunk=4),
        TokenGrid(4, 6, 6, 85, "prefix"),
        layers=2,
    ),
    TinyModel(
        "chroma",
        _chroma,
        lambda: _prompt(
            12, prompt_attention_mask=_mask(12, 7).bool(), negative_prompt_attention_mask=_mask(12, 12).bool(), **_IMAGE
        ),
        TokenGrid(1, 10, 14, 12, "prefix"),
        layers=4,
    ),
    TinyModel(
        "longcat",
        _longcat,
        lambda: {**_IMAGE, "prompt": "a", "negative_prompt": "no", "enable_prompt_rewrite": False},
        TokenGrid(1, 10, 14, 12, "prefix"),
        layers=4,
    ),
    TinyModel(
        "ovis", _ovis, lambda: _prompt(12, negative_prompt=None, **_IMAGE), TokenGrid(1, 10, 14, 12, "prefix"), layers=4
    ),
    TinyModel(
        "bria", _bria, lambda: _prompt(12, **{**_IMAGE, "height": 160}), TokenGrid(1, 10, 14, 12, "prefix"), layers=4
    ),
    TinyModel(
        "krea2",
        _krea2,
        lambda: {
            **_IMAGE,
            "prompt_embeds": random(1, 1, 9, 2, 16),
            "negative_prompt_embeds": random(2, 1, 9, 2, 16),
            "prompt_embeds_mask": _mask(9, 6).bool(),
            "negative_prompt_embeds_mask": _mask(9, 9).bool(),
        },
        TokenGrid(1, 10, 14, 9, "prefix"),
        layers=2,
    ),
    TinyModel(
        "prx",
        _prx,
        lambda: _prompt(
            9,
            prompt_attention_mask=_mask(9, 6).bool(),
            negative_prompt_attention_mask=_mask(9, 9).bool(),
            use_resolution_binning=False,
            **_IMAGE,
        ),
        TokenGrid(1, 10, 14, 9, "prefix"),
        layers=2,
        needs_newest=True,
    ),
    TinyModel(
        "hunyuan-image",
        _hunyuan_image,
        lambda: _prompt(
            11,
            prompt_embeds_mask=_mask(11, 7),
            negative_prompt_embeds_mask=_mask(11, 11),
            prompt_embeds_2=random(3, 1, 5, 16),
            prompt_embeds_mask_2=_mask(5, 5),
            negative_prompt_embeds_2=random(4, 1, 5, 16),
            negative_prompt_embeds_mask_2=_mask(5, 5),
            height=320,
            width=448,
        ),
        TokenGrid(1, 10, 14, 16),
        layers=4,
        whole_graph=False,
    ),
    TinyModel("cogview3", _cogview3, lambda: _prompt(12, **_IMAGE), TokenGrid(1, 10, 14, 12, "prefix"), layers=2),
    TinyModel("cogview4", _cogview4, lambda: _prompt(16, **_IMAGE), TokenGrid(1, 10, 14, 16, "prefix"), layers=2),
    TinyModel(
        "glm",
        _glm,
        lambda: _prompt(12, prior_token_ids=torch.arange(140).view(1, 140) % 8, **_IMAGE),
        TokenGrid(1, 10, 14, 12, "prefix"),
        layers=2,
    ),
    TinyModel(
        "auraflow",
        _auraflow,
        lambda: _prompt(
            12, prompt_attention_mask=_mask(12, 12), negative_prompt_attention_mask=_mask(12, 12), **_IMAGE
        ),
        TokenGrid(1, 10, 14, 20, "prefix"),
        layers=2,
    ),
    TinyModel(
        "lumina2",
        _lumina2,
        lambda: _prompt(12, prompt_attention_mask=_mask(12, 7), negative_prompt_attention_mask=_mask(12, 3), **_IMAGE),
        TokenGrid(1, 10, 14, 7, "prefix"),
        layers=3,
        whole_graph=False,
    ),
    TinyModel(
        "lumina-next",
        _lumina_next,
        lambda: _prompt(
            prompt_attention_mask=_mask(8, 5),
            negative_prompt=None,
            negative_prompt_attention_mask=_mask(8, 8),
            **_IMAGE,
        ),
        TokenGrid(1, 10, 14),
        layers=2,
    ),
    TinyModel(
        "nucleus",
        _nucleus,
        lambda: _prompt(12, prompt_embeds_mask=_mask(12, 7), negative_prompt_embeds_mask=_mask(12, 12), **_IMAGE),
        TokenGrid(1, 10, 14, 12),
        layers=2,
    ),
    TinyModel(
        "ernie",
        _ernie,
        lambda: {**_IMAGE, "prompt_embeds": [random(1, 9, 32)], "negative_prompt_embeds": [random(2, 5, 32)]},
        TokenGrid(1, 10, 14, 9),
        layers=2,
    ),
    TinyModel("kontext", _kontext, _kontext_arguments, TokenGrid(1, 10, 14, 12, "prefix", ((1, 8, 10),)), layers=5),
    TinyModel(
        "framepack",
        _framepack,
        _framepack_arguments,
        TokenGrid(5, 6, 6, 26, references=((4, 2, 2), (1, 3, 3), (2, 6, 6)), references_position="before"),
        layers=4,
        whole_graph=None,  # text is cut to a length that is known only when it runs
    ),
    TinyModel(
        "omnigen",
        _omnigen,
        lambda: {"prompt": "a boat on a lake in winter at dawn", **_IMAGE},
        TokenGrid(1, 10, 14, 10, "prefix"),
        layers=2,
        whole_graph=False,
    ),
    TinyModel("ltx-condition", _ltx_condition, _ltx_condition_arguments, TokenGrid(3, 8, 8, 64, "prefix"), layers=2),
    TinyModel(
        "qwen-edit",
        _qwen_edit,
        _qwen_edit_arguments,
        TokenGrid(1, 10, 14, 11, "prefix", ((1, 8, 8), (1, 4, 12))),
        layers=2,
    ),
    TinyModel(
        "pixart",
        _pixart,
        lambda: _prompt(
            negative_prompt=None,
            prompt_attention_mask=_mask(8, 5),
            negative_prompt_attention_mask=_mask(8, 8),
            use_resolution_binning=False,
            **_IMAGE,
        ),
        TokenGrid(1, 10, 14),
        layers=2,
    ),
)

ALL = (*MODELS, *(pytest.param(model, marks=pytest.mark.family) for model in FAMILIES))
