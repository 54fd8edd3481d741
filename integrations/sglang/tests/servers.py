"""A server of two small transformers' layers, requests, and a plan for them."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from sglang.multimodal_gen.runtime.layers.attention.selector import (
    component_attn_backend_context_manager,
    get_attn_backend,
)
from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context
from sglang.multimodal_gen.runtime.server_args import set_global_server_args

from paroattn import Plan, Precision, TokenGrid, attention
from paroattn.block_mask import block_count, pack_bits, text_blocks
from paroattn.order import AXIS_ORDERS
from paroattn.plan import ModelIdentity

GRID = TokenGrid(4, 6, 8)  # 192 tokens: 3 blocks
LAYERS, HEADS, HEAD_DIM, TIMESTEPS = 2, 4, 16, (1000.0, 750.0, 400.0, 100.0)


@dataclass
class WanVideoConfig:
    """As SGLang's of that name."""

    num_layers: int = LAYERS
    patch_size: tuple[int, int, int] = (1, 2, 2)
    boundary_ratio: float | None = None


@dataclass
class HunyuanVideoConfig:
    """As SGLang's of that name."""

    num_layers: int = 1
    num_single_layers: int = 1
    patch_size: int = 2
    patch_size_t: int = 1
    boundary_ratio: float | None = None


@dataclass
class FluxConfig:
    """As SGLang's of that name."""

    num_layers: int = LAYERS
    patch_size: int = 1


@dataclass
class Request:
    """As SGLang's `Req`."""

    raw_latent_shape: tuple[int, ...] | None = (1, 16, 4, 12, 16)
    timesteps: torch.Tensor | None = field(default_factory=lambda: torch.tensor(TIMESTEPS))
    scheduler: object = field(default_factory=lambda: SimpleNamespace(num_train_timesteps=1000))


def make_plan(layers=LAYERS, text=0, class_name="WanTransformer3DModel", **changes):
    """Another order and mask for each layer, head and step bucket; buckets change at noise level 0.5."""
    grid = TokenGrid(*GRID.size, text_tokens=text)
    blocks, places = block_count(grid.tokens, 64), (2, layers, HEADS)
    masks = torch.rand(*places, blocks, blocks, generator=torch.Generator().manual_seed(7)) < 0.4
    masks |= torch.eye(blocks, dtype=torch.bool) | text_blocks(grid)
    count = masks[..., 0, 0].numel()
    parts = {
        "model": ModelIdentity(class_name, "abc", layers, HEADS, HEAD_DIM),
        "grid": grid,
        "order_names": AXIS_ORDERS,
        "order_index": (torch.arange(layers * HEADS, dtype=torch.uint8) % 6).view(layers, HEADS),
        "precisions": (Precision(),),
        "precision_index": torch.zeros(layers, HEADS, dtype=torch.uint8),
        "schedule": (1.0, 0.75, 0.25, 0.1),
        "bucket_edges": (0.0, 0.5),
        "mask_table": pack_bits(masks).flatten(0, 2),
        "mask_index": torch.arange(count, dtype=torch.int32).view(places),
        "compensate": torch.zeros(places, dtype=torch.bool),
        "usage": torch.ones(2, layers),
    }
    return Plan(**{**parts, **changes})


def start(path, config=None, backend="sparge_attn", components=None, setting=None, **pipeline):
    """Start SGLang with a plan."""
    settings = {"paroattn_plan": str(path)} if setting is None else setting
    pipeline = {"dmd_denoising_steps": None, "warp_denoising_step": False, **pipeline}
    set_global_server_args(
        SimpleNamespace(
            attention_backend=backend,
            attention_backend_config=settings,
            component_attention_backends=components or {},
            pipeline_config=SimpleNamespace(dit_config=config or WanVideoConfig(), **pipeline),
        )
    )


def build(prefix, component="transformer", heads=HEADS, cross=False, lenient=False, **arguments):
    """What an attention layer of SGLang makes when its model is built, on the meta device and in 16 bits."""
    given = {"softmax_scale": HEAD_DIM**-0.5, "causal": False, "num_kv_heads": heads, **arguments}
    context = component_attn_backend_context_manager(None, component, allow_global_backend_fallback=lenient)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with context, torch.device("meta"):
            backend = get_attn_backend(HEAD_DIM, torch.bfloat16, is_cross_attention=cross)
            return backend.get_impl_cls()(
                num_heads=heads, head_size=HEAD_DIM, prefix=f"{prefix}.impl", is_cross_attention=cross, **given
            )
    finally:
        torch.set_default_dtype(torch.float32)


def run(layer, tensors, step=0, request=None):
    """A call of a layer in a step of a request."""
    with set_forward_context(step, None, request or Request()):
        return layer.forward(*tensors, None)


def tensors(tokens=GRID.tokens, heads=HEADS):
    """Query, key and value [1, N, H, D]."""
    return torch.randn(3, 1, tokens, heads, HEAD_DIM).unbind(0)


def planned(plan, layer, bucket, query, key, value, heads=range(HEADS)):
    """What heads of a plan's layer attend to, by paroattn's public function."""
    part = plan.layer(layer)
    return attention(
        query,
        key,
        value,
        permutation=part.permutation[list(heads)],
        block_mask=plan.mask(bucket, layer).to_dense()[list(heads)],
        tensor_layout="NHD",
    )
