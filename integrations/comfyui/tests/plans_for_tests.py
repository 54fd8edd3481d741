"""Plans of the tiny models with other masks and orders for each head, and what they compute, by another way."""

from __future__ import annotations

from dataclasses import replace

import torch

import paroattn
from paroattn import Plan, Precision, TokenGrid
from paroattn.block_mask import block_count, pack_bits, text_blocks
from paroattn.order import AXIS_ORDERS
from paroattn.plan_header import ModelIdentity

SIGMAS = (1.0, 0.9, 0.7, 0.4, 0.0)
SCHEDULE = SIGMAS[:-1]

LATENTS = {
    "Wan": (4, 6, 12, 12),
    "Wan VACE": (4, 6, 12, 12),
    "HunyuanVideo": (4, 6, 12, 12),
    "HunyuanVideo, text first": (4, 6, 12, 12),
    "Flux": (4, 27, 28),  # a row of half tokens is padded
    "Qwen-Image": (4, 1, 24, 28),
    "LTX-Video": (4, 6, 6, 6),
}
TEXT = 12
_MODELS = {  # class of diffusers, layers, heads, head_dim, grid, where diffusers has the text
    "Wan": ("WanTransformer3DModel", 2, 2, 24, (6, 6, 6), None),
    "Wan VACE": ("WanTransformer3DModel", 2, 2, 24, (6, 6, 6), None),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", 4, 2, 16, (6, 6, 6), "suffix"),
    "HunyuanVideo, text first": ("HunyuanVideoTransformer3DModel", 4, 2, 16, (6, 6, 6), "suffix"),
    "Flux": ("FluxTransformer2DModel", 5, 2, 16, (1, 14, 14), "prefix"),
    "Qwen-Image": ("QwenImageTransformer2DModel", 2, 2, 16, (1, 12, 14), "prefix"),
    "LTX-Video": ("LTXVideoTransformer3DModel", 2, 2, 16, (6, 6, 6), None),
}
FAMILIES = tuple(_MODELS)


def latent(family, seed=3, sizes=None):
    shape = LATENTS[family] if sizes is None else (LATENTS[family][0], *sizes)
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def grid_of(family, text=TEXT):
    *_, sizes, side = _MODELS[family]
    return TokenGrid(*sizes) if side is None else TokenGrid(*sizes, text, side)


def plan_for(family, *, precision="exact", edges=(0.0, 0.5), times=1, density=0.5, usage=None, **identity):
    """A plan with random masks; `times` 2 is for two models, the layers of the second after those of the first."""
    name, layers, heads, head_dim, _, _ = _MODELS[family]
    layers, grid = layers * times, grid_of(family)
    generator = torch.Generator().manual_seed(5)
    blocks = block_count(grid.tokens, 64)
    masks = torch.rand(len(edges), layers, heads, blocks, blocks, generator=generator) < density
    masks |= torch.eye(blocks, dtype=torch.bool) | text_blocks(grid, 64)
    model = {"class_name": name, "config_hash": "", "layers": layers, "heads": heads, "head_dim": head_dim}
    return Plan(
        model=ModelIdentity(**{**model, **identity}),
        grid=grid,
        order_names=AXIS_ORDERS,
        order_index=torch.arange(1, 1 + layers * heads, dtype=torch.uint8).view(layers, heads) % 6,
        precisions=(Precision.parse(precision),),
        precision_index=torch.zeros(layers, heads, dtype=torch.uint8),
        schedule=SCHEDULE,
        bucket_edges=edges,
        mask_table=pack_bits(masks).flatten(0, 2),
        mask_index=torch.arange(len(edges) * layers * heads, dtype=torch.int32).view(len(edges), layers, heads),
        compensate=torch.arange(len(edges) * layers * heads).view(len(edges), layers, heads) % 3 == 0,
        usage=torch.ones(len(edges), layers) if usage is None else usage,
    )


class Oracle:
    """An override that does by the operator and a count of calls what the node is to do.

    It knows a block's self-attention by its number of tokens alone, in a model whose other calls have others.

    Args:
        plan: as diffusers has it.
        side: where the model's text stands; the plan's orders are for where diffusers has it.
    """

    def __init__(self, plan, side):
        self.plan, self.side, self.calls = plan, side, 0

    def put_on(self, patcher):
        clone = patcher.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = self
        return clone

    def __call__(self, func, *args, **kwargs):
        q, k, v, heads = (args[i] if i < len(args) else kwargs[n] for i, n in enumerate(("q", "k", "v", "heads")))
        apart = kwargs.get("skip_reshape", False)
        tokens = q.shape[2 if apart else 1]
        plan = self.plan
        if q.shape != k.shape or tokens < plan.grid.visual_tokens:
            return func(*args, **kwargs)
        text = tokens - plan.grid.visual_tokens
        if text != plan.grid.text_tokens:
            raise AssertionError("the oracle knows one number of text tokens")
        layer, self.calls = self.calls % plan.model.layers, self.calls + 1
        bucket = plan.bucket_of(float(kwargs["transformer_options"]["sigmas"].max()))
        q, k, v = (x if apart else x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = args[4] if len(args) > 4 else kwargs.get("mask")
        key_mask = None if mask is None else (mask.reshape(-1, tokens) == 0).expand(len(q), tokens)
        turn = text if self.side == "prefix" and plan.grid.text_position == "suffix" else 0
        q, k, v = (x.roll(-turn, 2) for x in (q, k, v))
        output = paroattn.attention(
            q, k, v,
            permutation=plan.layer(layer).permutation,
            block_mask=plan.mask(bucket, layer),
            precision=plan.precisions[0],
            compensate=plan.compensate[bucket, layer].tolist(),
            key_mask=None if key_mask is None else key_mask.roll(-turn, 1),
            backend="reference" if str(plan.precisions[0]) == "exact" else "auto",  # which says how it rounds
        )  # fmt: skip
        return output.roll(turn, 2).transpose(1, 2).flatten(2)


def with_layers(plan, layers):
    """The plan of some of its layers, made by hand."""
    rows = torch.tensor(list(layers))
    return replace(
        plan,
        model=replace(plan.model, layers=len(rows)),
        order_index=plan.order_index[rows],
        precision_index=plan.precision_index[rows],
        mask_index=plan.mask_index[:, rows],
        compensate=plan.compensate[:, rows],
        usage=plan.usage[:, rows],
    )
