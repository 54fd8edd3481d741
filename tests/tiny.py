"""A tiny Wan pipeline with random weights: 2 layers of 2 heads, 6 x 4 x 5 tokens, seconds for everything."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from paroattn.block_mask import block_count, pack_bits
from paroattn.grid import TokenGrid
from paroattn.integrations.pipeline import Pipeline
from paroattn.ops import PreparedAttention
from paroattn.order import AXIS_ORDERS
from paroattn.plan import ModelIdentity, Plan
from paroattn.quantize import Precision

GRID = TokenGrid(6, 4, 5)
STEPS = 4
TEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
NEGATIVE = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(2))


def tiny_wan(layers=2, heads=2, channels=4):
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=24,
        in_channels=channels,
        out_channels=channels,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    for parameter in transformer.parameters():  # large enough that every layer's attention shows in the output
        if parameter.ndim > 1:
            parameter.data *= 2
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_whole_wan(folder):
    """A tiny Wan pipeline with text encoder, tokenizer and VAE, saved like those on the Hub."""
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "cat": 3, "dog": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    pipe = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=5, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ).eval(),
        vae=AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_wan(channels=16).transformer,
    )
    pipe.save_pretrained(folder)


def call_arguments(steps=STEPS, guidance_scale=1.0, height=GRID.height * 16, seed=None, callback=None):
    arguments = {
        "prompt_embeds": TEXT,
        "height": height,
        "width": GRID.width * 16,
        "num_frames": (GRID.frames - 1) * 4 + 1,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "output_type": "latent",
    }
    if guidance_scale > 1:
        arguments["negative_prompt_embeds"] = NEGATIVE
    if callback is not None:
        arguments["callback_on_step_end"] = callback
    if seed is not None:
        arguments["generator"] = torch.Generator().manual_seed(seed)
    return arguments


def latents(pipe, **changes):
    return pipe(**call_arguments(**{"seed": 7, **changes})).frames


def schedule_of(steps=STEPS, shift=3.0):
    """Noise levels of the tiny Wan's scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return tuple((scheduler.timesteps / 1000).tolist())


def make_plan(pipe, masks=None, grid=GRID, edges=(0.0,), precision="exact", schedule=None, **identity_changes):
    """Another order for each head; masks bool [buckets, layers, heads, blocks, blocks], default all true.

    The schedule is by default that of `STEPS` steps of the tiny Wan.
    """
    identity = Pipeline(pipe).identity
    layers, heads, blocks = identity.layers, identity.heads, block_count(grid.tokens, 64)
    if masks is None:
        masks = torch.ones(len(edges), layers, heads, blocks, blocks, dtype=torch.bool)
    return Plan(
        model=ModelIdentity(**{**vars(identity), **identity_changes}),
        grid=grid,
        order_names=AXIS_ORDERS,
        order_index=torch.arange(1, 1 + layers * heads, dtype=torch.uint8).view(layers, heads) % 6,
        precisions=(Precision.parse(precision),),
        precision_index=torch.zeros(layers, heads, dtype=torch.uint8),
        schedule=schedule_of() if schedule is None else schedule,
        bucket_edges=edges,
        mask_table=pack_bits(masks).flatten(0, 2),
        mask_index=torch.arange(len(edges) * layers * heads, dtype=torch.int32).view(len(edges), layers, heads),
        compensate=torch.zeros(len(edges), layers, heads, dtype=torch.bool),
        usage=torch.ones(len(edges), layers),
    )


def record_calls(monkeypatch):
    """Every call of a prepared operator: step bucket, inputs, output, operator, key mask."""
    calls, original = [], PreparedAttention.__call__

    def recording(self, query, key, value, *, bucket, key_mask=None):
        output = original(self, query, key, value, bucket=bucket, key_mask=key_mask)
        calls.append((int(bucket), (query, key, value), output, self, key_mask))
        return output

    monkeypatch.setattr(PreparedAttention, "__call__", recording)
    return calls
