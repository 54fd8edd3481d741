"""Inputs of attention for tests, and outputs that show what a kernel leaves unwritten."""

import oracles
import torch

from paroattn.block_mask import BlockMask
from paroattn.ops.inputs import AttentionInputs
from paroattn.quantize import Precision


def inputs(tokens, heads=2, head_dim=16, batch=1, key_heads=None, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, count, tokens, head_dim) for count in (heads, key_heads or heads, key_heads or heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def masks(heads, tokens, seed=0, block_q=64, block_kv=64):
    rows, columns = -(-tokens // block_q), -(-tokens // block_kv)
    mask = torch.rand(heads, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask.scatter_(2, torch.randint(columns, (heads, rows, 1), generator=torch.Generator().manual_seed(seed)), True)
    return mask


def permutations(heads, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(tokens, generator=generator) for _ in range(heads)])


def call_of(tensors, precision="exact", mask=None, order=None, compensate=None, key_mask=None, scale=None, block_q=64):
    """What a backend gets; mask bool [H, rows, columns], compensate a bool per head, precision one or one per head."""
    query, (heads, tokens, head_dim) = tensors[0], tensors[0].shape[1:]
    return AttentionInputs(
        *tensors,
        order,
        None if mask is None else BlockMask.from_dense(mask, tokens, block_q),
        [Precision.parse(item) for item in ([precision] * heads if isinstance(precision, str) else precision)],
        None if compensate is None else torch.tensor(compensate, device=query.device),
        key_mask,
        head_dim**-0.5 if scale is None else scale,
    )


def exact_attention(call):
    """The oracle's output and lse of a backend's inputs."""
    mask = None if call.block_mask is None else call.block_mask.to_dense()
    tensors, shape = (call.query, call.key, call.value), call.block_shape
    return oracles.sparse_attention(
        *tensors, mask, call.permutation, call.key_mask, call.compensate, call.scale, *shape
    )


def over_nan(run, call):
    """Output and lse that `run(output, lse, call)` writes over NaN."""
    output = torch.full_like(call.query, torch.nan)
    lse = torch.full(output.shape[:3], torch.nan, device=output.device)
    run(output, lse, call)
    return output, lse
