"""A server of small transformers' layers, calls of them, and a plan."""

from types import SimpleNamespace

import torch
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata, VideoTokenLayout
from vllm_omni.diffusion.attention.selector import _cached_get_backend_cls
from vllm_omni.diffusion.config import set_current_diffusion_config
from vllm_omni.diffusion.forward_context import ForwardContext, override_forward_context

from paroattn import Plan, Precision, TokenGrid, attention
from paroattn.block_mask import block_count, pack_bits
from paroattn.order import AXIS_ORDERS
from paroattn.plan import ModelIdentity

GRID = TokenGrid(4, 6, 8)  # 192 tokens: 3 blocks
LAYERS, HEADS, HEAD_DIM = 2, 4, 16


def make_plan(layers=LAYERS, class_name="WanTransformer3DModel", **changes):
    """Another order and mask for each layer, head and step bucket; buckets change at noise level 0.5."""
    blocks, places = block_count(GRID.tokens, 64), (2, layers, HEADS)
    masks = torch.rand(*places, blocks, blocks, generator=torch.Generator().manual_seed(7)) < 0.4
    masks |= torch.eye(blocks, dtype=torch.bool)
    count = masks[..., 0, 0].numel()
    parts = {
        "model": ModelIdentity(class_name, "abc", layers, HEADS, HEAD_DIM),
        "grid": GRID,
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


def server(path, *, boundary_ratio=None, additional_config=None, transformer=None, **degrees):
    """vLLM-Omni's configuration of a model, with a plan."""
    known = {"_class_name": "WanTransformer3DModel", "num_layers": LAYERS}
    return SimpleNamespace(
        additional_config={"paroattn_plan": str(path)} if additional_config is None else additional_config,
        boundary_ratio=boundary_ratio,
        tf_model_config=known if transformer is None else transformer,
        parallel_config=SimpleNamespace(**{"ulysses_degree": 1, "ring_degree": 1, "allgather_degree": 1, **degrees}),
    )


def build(config, *prefixes, heads=HEADS, head_dim=HEAD_DIM, **arguments):
    """What attention layers of vLLM-Omni make when their model is built, in 16 bits; one for one name."""
    given = {"causal": False, "num_kv_heads": heads, "qkv_layout": "BSND", "backend_kwargs": {"sparsity": 0.8}}
    given |= {"role": "self", "backend_explicit": True, **arguments}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_diffusion_config(config), torch.device("meta"):
            made = [
                _cached_get_backend_cls("RAINFUSION_ATTN", head_dim).get_impl_cls()(
                    num_heads=heads, head_size=head_dim, softmax_scale=head_dim**-0.5, prefix=prefix, **given
                )
                for prefix in prefixes
            ]
    finally:
        torch.set_default_dtype(torch.float32)
    return made[0] if len(made) == 1 else made


def published(**changes):
    """What Wan hands over with a call."""
    parts = {"video_layout": VideoTokenLayout(0, GRID.size, GRID.visual_tokens), **changes}
    return AttentionMetadata(**parts)


def run(layer, given, level=1.0, metadata=None, **context):
    """A call of a layer at a noise level."""
    if isinstance(level, float | None):
        context = {"denoise_step_idx": 0, "denoise_timestep": level, **context}
    with override_forward_context(ForwardContext(**context)):
        return layer.forward(*given, published() if metadata is None else metadata)


def some_tensors(tokens=GRID.tokens, heads=HEADS):
    """Query, key and value [1, N, H, D]."""
    return torch.randn(3, 1, tokens, heads, HEAD_DIM).unbind(0)


def planned(plan, layer, bucket, query, key, value, key_mask=None):
    """What a plan's layer attends to, by paroattn's public function."""
    return attention(
        query,
        key,
        value,
        permutation=plan.layer(layer).permutation,
        block_mask=plan.mask(bucket, layer).to_dense(),
        tensor_layout="NHD",
        key_mask=key_mask,
    )
