"""Tiny diffusion models under the class names of ComfyUI's, which call attention as those do.

Wan and Flux run the modules of a diffusers transformer, so that both have the same weights; the others are a block or
two of their own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from fake_comfy import WrapperExecutor, WrappersMP, optimized_attention, wrappers_of
from torch import nn


class _Model(nn.Module):
    """Calls `_forward` within the wrappers of DIFFUSION_MODEL; subclasses say in which place their arguments are."""

    def _wrapped(self, options, *args, **kwargs):
        executor = WrapperExecutor(self._forward, self, wrappers_of(WrappersMP.DIFFUSION_MODEL, options))
        return executor(*args, **kwargs)


def _run_block(options, name, block, arguments, keys):
    """Run a block, or what replaces it; `keys` are what it returns."""
    replacement = options.get("patches_replace", {}).get("dit", {}).get(name)

    def original(given):
        return dict(zip(keys, block(**given), strict=True))

    given = {**arguments, "transformer_options": options}
    found = original(given) if replacement is None else replacement(given, {"original_block": original})
    return [found[key] for key in keys]


def _turned_like_wan(x, rotary):
    cosines, sines = rotary
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cosines[..., 0::2], sines[..., 1::2]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(3).type_as(x)


class WanModel(_Model):
    """Of a `diffusers.WanTransformer3DModel`; `reference_latent` [B, C, H, W] stands before the video, as a frame."""

    def __init__(self, transformer):
        super().__init__()
        config = transformer.config
        self.inner = transformer
        self.patch_size = tuple(config.patch_size)
        self.num_heads = config.num_attention_heads
        self.dim = config.num_attention_heads * config.attention_head_dim
        self.blocks = transformer.blocks

    def forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options=None, **kwargs):
        return self._wrapped(
            transformer_options, x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs
        )

    def _forward(
        self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options=None, reference_latent=None
    ):
        frames, height, width = x.shape[2:]
        if reference_latent is not None:
            x = torch.cat((reference_latent.unsqueeze(2), x), 2)
        height_added, width_added = -height % self.patch_size[1], -width % self.patch_size[2]
        x = F.pad(x, (0, width_added, 0, height_added))
        rotary = self.inner.rope(x)
        patches = self.inner.patch_embedding(x)
        sizes = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2)
        temb, shifts, text, _ = self.inner.condition_embedder(timestep, context, None, timestep_seq_len=None)
        shifts = shifts.unflatten(1, (6, -1))
        options = transformer_options
        for number, block in enumerate(self.blocks):

            def run(img, txt, vec, pe, transformer_options, block=block, number=number):
                return [self._block(number, block, img, txt, vec, pe, transformer_options)]

            arguments = {"img": tokens, "txt": text, "vec": shifts, "pe": rotary}
            (tokens,) = _run_block(options, ("double_block", number), run, arguments, ("img",))
        shift, scale = (self.inner.scale_shift_table + temb.unsqueeze(1)).chunk(2, 1)
        tokens = self.inner.proj_out(self.inner.norm_out(tokens) * (1 + scale) + shift)
        output = tokens.unflatten(1, sizes).unflatten(-1, (*self.patch_size, -1))
        output = output.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return output[:, :, -frames:, :height, :width]

    def _block(self, number, block, x, text, shifts, rotary, options):
        moves = (block.scale_shift_table + shifts).chunk(6, 1)
        x = x + self._attend(block.attn1, block.norm1(x) * (1 + moves[1]) + moves[0], None, rotary, options) * moves[2]
        x = x + self._attend(block.attn2, block.norm2(x), text, None, options)
        return x + block.ffn(block.norm3(x) * (1 + moves[4]) + moves[3]) * moves[5]

    def _attend(self, attention, x, text, rotary, options):
        source = x if text is None else text
        q, k = attention.norm_q(attention.to_q(x)), attention.norm_k(attention.to_k(source))
        if rotary is not None:
            q, k = (_turned_like_wan(y.unflatten(2, (self.num_heads, -1)), rotary).flatten(2) for y in (q, k))
        output = optimized_attention(q, k, attention.to_v(source), heads=self.num_heads, transformer_options=options)
        return attention.to_out[0](output)


class VaceWanModel(WanModel):
    """Runs each block's weights once more on a second stream, outside of the block that patches can replace."""

    def _block(self, number, block, x, text, shifts, rotary, options):
        options["block_index"] = number
        x = super()._block(number, block, x, text, shifts, rotary, options)
        return x + 0.1 * super()._block(number, block, 0.5 * x, text, shifts, rotary, options)


class _ImageBlock(nn.Module):
    """A block of one stream or of two, with attention over both."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, first, second, mask, turn, transformer_options):
        """Attention over the tokens of both streams; the layout is the one of Flux's attention."""
        both = torch.cat((first, second), 1)
        q, k, v = self.qkv(_normed(both)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = q * turn(q), k * turn(k)
        output = optimized_attention(
            q, k, v, self.heads, mask=mask, skip_reshape=True, transformer_options=transformer_options
        )
        both = both + self.out(output)
        return both[:, : first.shape[1]], both[:, first.shape[1] :]


def _normed(x):
    return F.layer_norm(x, x.shape[-1:])


def _turn(x):
    """Something that depends on the position, in place of RoPE: [N, 1]."""
    return 1 + 0.3 * torch.sin(torch.arange(x.shape[2], dtype=x.dtype, device=x.device)).unsqueeze(1)


def _patches(x, patch):
    """[B, C, ..., H, W], padded up, as tokens [B, N, C * patch * patch], and their sizes."""
    height, width = x.shape[-2:]
    x = F.pad(x, (0, -width % patch, 0, -height % patch))
    x = x.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))
    sizes = (*x.shape[2:-4], x.shape[-4], x.shape[-2])
    x = x.movedim(-3, -2).movedim(1, -3)
    return x.flatten(1, -4).flatten(2), sizes


def _unpatched(tokens, sizes, patch, latent):
    x = tokens.unflatten(1, sizes).unflatten(-1, (-1, patch, patch)).movedim(-3, 1)
    x = x.movedim(-2, -3).flatten(-2).flatten(-3, -2)
    return x[..., : latent.shape[-2], : latent.shape[-1]]


class Flux(_Model):
    """Of a `diffusers.FluxTransformer2DModel`; `ref_latents` stand behind the image (Kontext)."""

    def __init__(self, transformer):
        super().__init__()
        config = transformer.config
        self.inner = transformer
        self.patch_size = 2
        self.num_heads = config.num_attention_heads
        self.hidden_size = config.num_attention_heads * config.attention_head_dim
        self.double_blocks = transformer.transformer_blocks
        self.single_blocks = transformer.single_transformer_blocks

    def forward(
        self,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        transformer_options=None,
        **kw,
    ):
        return self._wrapped(
            transformer_options, x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kw
        )

    def _forward(
        self, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None, transformer_options=None,
        attention_mask=None,
    ):  # fmt: skip
        options = dict(transformer_options)
        image, sizes = _patches(x, 2)
        own = image.shape[1]
        ids = [self._ids(0, sizes)]
        for reference in ref_latents or ():
            more, more_sizes = _patches(reference, 2)
            image = torch.cat((image, more), 1)
            ids.append(self._ids(1, more_sizes))
        image, text = self.inner.x_embedder(image), self.inner.context_embedder(context)
        # diffusers multiplies timestep and guidance by 1000 before these embeddings.
        temb = self.inner.time_text_embed(timestep * 1000, guidance * 1000, y)
        rotary = self.inner.pos_embed(torch.cat((torch.zeros(text.shape[1], 3), *ids)))
        for number, block in enumerate(self.double_blocks):

            def run(img, txt, vec, pe, transformer_options, block=block):
                return self._double(block, img, txt, vec, pe, attention_mask, transformer_options)

            arguments = {"img": image, "txt": text, "vec": temb, "pe": rotary}
            image, text = _run_block(options, ("double_block", number), run, arguments, ("img", "txt"))
        both = torch.cat((text, image), 1)
        for number, block in enumerate(self.single_blocks):

            def run(img, vec, pe, transformer_options, block=block):
                return [self._single(block, img, vec, pe, attention_mask, transformer_options)]

            (both,) = _run_block(
                options, ("single_block", number), run, {"img": both, "vec": temb, "pe": rotary}, ("img",)
            )
        output = self.inner.proj_out(self.inner.norm_out(both[:, text.shape[1] :][:, :own], temb))
        return _unpatched(output, sizes, 2, x)

    def _ids(self, number, sizes):
        ids = torch.cartesian_prod(torch.arange(sizes[0]), torch.arange(sizes[1])).float()
        return F.pad(ids, (1, 0), value=float(number))

    def _attend(self, q, k, v, rotary, mask, options):
        """q, k, v [B, N, H, D]."""
        q, k = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return optimized_attention(q, k, v, q.shape[1], skip_reshape=True, mask=mask, transformer_options=options)

    def _heads(self, attention, x, prefix=""):
        names = ("add_q_proj", "add_k_proj", "add_v_proj") if prefix else ("to_q", "to_k", "to_v")
        q, k, v = (getattr(attention, name)(x).unflatten(-1, (self.num_heads, -1)) for name in names)
        norms = ("norm_added_q", "norm_added_k") if prefix else ("norm_q", "norm_k")
        return getattr(attention, norms[0])(q), getattr(attention, norms[1])(k), v

    def _double(self, block, image, text, temb, rotary, mask, options):
        moved, gate, shift, scale, gate_mlp = block.norm1(image, emb=temb)
        moved_text, text_gate, text_shift, text_scale, text_gate_mlp = block.norm1_context(text, emb=temb)
        heads = zip(self._heads(block.attn, moved_text, "add"), self._heads(block.attn, moved), strict=True)
        output = self._attend(*(torch.cat(pair, 1) for pair in heads), rotary, mask, options)
        text_output, output = output.split((text.shape[1], image.shape[1]), 1)
        image = image + gate.unsqueeze(1) * block.attn.to_out[0](output)
        image = image + gate_mlp.unsqueeze(1) * block.ff(block.norm2(image) * (1 + scale[:, None]) + shift[:, None])
        text = text + text_gate.unsqueeze(1) * block.attn.to_add_out(text_output)
        inner = block.norm2_context(text) * (1 + text_scale[:, None]) + text_shift[:, None]
        return image, text + text_gate_mlp.unsqueeze(1) * block.ff_context(inner)

    def _single(self, block, both, temb, rotary, mask, options):
        moved, gate = block.norm(both, emb=temb)
        output = self._attend(*self._heads(block.attn, moved), rotary, mask, options)
        return both + gate.unsqueeze(1) * block.proj_out(torch.cat((output, block.act_mlp(block.proj_mlp(moved))), 2))


class HunyuanVideo(_Model):
    """A text refiner, double and single blocks, text behind the video and a mask of its padding that is added."""

    flipped = True

    def __init__(self, heads=2, head_dim=16, channels=4, text=32):
        super().__init__()
        width = heads * head_dim
        self.patch_size, self.num_heads, self.hidden_size = [1, 2, 2], heads, width
        self.img_in, self.txt_in, self.vec_in = (
            nn.Linear(channels * 4, width),
            nn.Linear(text, width),
            nn.Linear(1, width),
        )
        self.refiner = _ImageBlock(width, heads)
        self.double_blocks = nn.ModuleList(_ImageBlock(width, heads) for _ in range(2))
        for block in self.double_blocks:
            if self.flipped:
                block.flipped_img_txt = True
        self.single_blocks = nn.ModuleList(_ImageBlock(width, heads) for _ in range(2))
        self.final_layer = nn.Linear(width, channels * 4)

    def forward(
        self, x, timestep, context, y=None, txt_byt5=None, guidance=None, attention_mask=None, ref_latent=None,
        control=None, transformer_options=None, **kw,
    ):  # fmt: skip
        return self._wrapped(
            transformer_options, x, timestep, context, y, txt_byt5, guidance, attention_mask, ref_latent, control,
            transformer_options, **kw,
        )  # fmt: skip

    def _forward(
        self, x, timestep, context, y=None, txt_byt5=None, guidance=None, attention_mask=None, ref_latent=None,
        control=None, transformer_options=None,
    ):  # fmt: skip
        options = dict(transformer_options)
        tokens, sizes = _patches(x, 2)
        image = self.img_in(tokens) + self.vec_in(timestep.view(-1, 1, 1) / 1000)
        text = self.txt_in(context)
        mask = attention_mask
        if mask is not None and not mask.is_floating_point():
            mask = (mask - 1).to(x.dtype) * torch.finfo(x.dtype).max
        first, second = self.refiner(text, text[:, :0], None, _turn, options)
        text = torch.cat((first, second), 1)
        whole = None
        if mask is not None:
            whole = torch.zeros(1, 1, image.shape[1] + text.shape[1], dtype=x.dtype)
            place = slice(image.shape[1], None) if self.flipped else slice(text.shape[1])
            whole[:, 0, place] = mask
        for number, block in enumerate(self.double_blocks):

            def run(img, txt, transformer_options, block=block):
                if self.flipped:
                    return block(img, txt, whole, _turn, transformer_options)
                return block(txt, img, whole, _turn, transformer_options)[::-1]

            image, text = _run_block(
                options, ("double_block", number), run, {"img": image, "txt": text}, ("img", "txt")
            )
        count = image.shape[1]
        both = torch.cat((image, text) if self.flipped else (text, image), 1)
        for number, block in enumerate(self.single_blocks):

            def run(img, transformer_options, block=block):
                return [torch.cat(block(img, img[:, :0], whole, _turn, transformer_options), 1)]

            (both,) = _run_block(options, ("single_block", number), run, {"img": both}, ("img",))
        image = both[:, :count] if self.flipped else both[:, -count:]
        return _unpatched(self.final_layer(_normed(image)), sizes, 2, x)


class HunyuanVideoTextFirst(HunyuanVideo):
    """As newer versions of ComfyUI have it."""

    flipped = False


HunyuanVideoTextFirst.__name__ = "HunyuanVideo"


class _QwenAttention(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads = heads


class _QwenBlock(_ImageBlock):
    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.attn = _QwenAttention(heads)


class QwenImageTransformer2DModel(_Model):
    """Text before the image, its length the prompt's; `ref_latents` stand behind the image."""

    def __init__(self, heads=2, head_dim=16, channels=4, text=32):
        super().__init__()
        self.patch_size, self.inner_dim = 2, heads * head_dim
        self.img_in, self.txt_in = nn.Linear(channels * 4, self.inner_dim), nn.Linear(text, self.inner_dim)
        self.vec_in = nn.Linear(1, self.inner_dim)
        self.transformer_blocks = nn.ModuleList(_QwenBlock(self.inner_dim, heads) for _ in range(2))
        self.proj_out = nn.Linear(self.inner_dim, channels * 4)

    def forward(self, x, timestep, context, attention_mask=None, ref_latents=None, transformer_options=None, **kwargs):
        return self._wrapped(
            transformer_options, x, timestep, context, attention_mask, ref_latents, transformer_options, **kwargs
        )

    def _forward(self, x, timesteps, context, attention_mask=None, ref_latents=None, transformer_options=None):
        options = transformer_options
        tokens, sizes = _patches(x, 2)
        count = tokens.shape[1]
        tokens = torch.cat((tokens, *(_patches(reference, 2)[0] for reference in ref_latents or ())), 1)
        image, text = self.img_in(tokens) + self.vec_in(timesteps.view(-1, 1, 1)), self.txt_in(context)
        for number, block in enumerate(self.transformer_blocks):

            def run(img, txt, transformer_options, block=block):
                return block(txt, img, None, _turn, transformer_options)[::-1]

            image, text = _run_block(
                options, ("double_block", number), run, {"img": image, "txt": text}, ("img", "txt")
            )
        return _unpatched(self.proj_out(_normed(image[:, :count])), sizes, 2, x)


class _LtxBlock(nn.Module):
    def __init__(self, width, heads, text):
        super().__init__()
        self.heads = heads
        self.attn1 = nn.ModuleDict({name: nn.Linear(width, width) for name in ("q", "k", "v", "o")})
        self.attn1.heads, self.attn1.dim_head = heads, width // heads
        sizes = {"q": width, "k": text, "v": text, "o": width}
        self.attn2 = nn.ModuleDict({name: nn.Linear(size, width) for name, size in sizes.items()})

    def forward(self, x, text, options):
        for own, source in ((self.attn1, x), (self.attn2, text)):
            source = _normed(source)
            output = optimized_attention(
                own["q"](_normed(x)), own["k"](source), own["v"](source), self.heads, transformer_options=options
            )
            x = x + own["o"](output)
        return x


class LTXVModel(_Model):
    """No text in self-attention; `keyframe_idxs` [N] are tokens of the latent that a guide frame takes the place of."""

    def __init__(self, heads=2, head_dim=16, channels=4, text=32):
        super().__init__()
        self.inner_dim = heads * head_dim
        self.patchify_proj, self.vec_in = nn.Linear(channels, self.inner_dim), nn.Linear(1, self.inner_dim)
        self.transformer_blocks = nn.ModuleList(_LtxBlock(self.inner_dim, heads, text) for _ in range(2))
        self.proj_out = nn.Linear(self.inner_dim, channels)

    def forward(
        self,
        x,
        timestep,
        context,
        attention_mask=None,
        frame_rate=25,
        transformer_options=None,
        keyframe_idxs=None,
        **kw,
    ):
        return self._wrapped(
            transformer_options,
            x,
            timestep,
            context,
            attention_mask,
            frame_rate,
            transformer_options,
            keyframe_idxs,
            **kw,
        )

    def _forward(
        self, x, timestep, context, attention_mask, frame_rate=25, transformer_options=None, keyframe_idxs=None
    ):
        tokens = self.patchify_proj(x.flatten(2).transpose(1, 2)) + self.vec_in(timestep.view(-1, 1, 1))
        if keyframe_idxs is not None:  # as many tokens as before, others
            tokens = torch.cat((tokens[:, len(keyframe_idxs) :], tokens[:, keyframe_idxs] * 0.5), 1)
        tokens = tokens + _turn(tokens.unsqueeze(1))
        for number, block in enumerate(self.transformer_blocks):

            def run(img, txt, transformer_options, block=block):
                return [block(img, txt, transformer_options)]

            arguments = {"img": tokens, "txt": context}
            (tokens,) = _run_block(transformer_options, ("double_block", number), run, arguments, ("img",))
        return self.proj_out(_normed(tokens)).transpose(1, 2).unflatten(2, x.shape[2:])


def strong(model, seed=0):
    """Random weights, large enough that every layer's attention shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 1.5 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.1
        parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)
    return model.eval()
