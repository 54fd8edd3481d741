"""The public door of the operator: validates, chooses the backend, calls it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK, BlockMask
from paroattn.ops.backend import choose_backend
from paroattn.order import check_permutation
from paroattn.quantize import Precision

TensorLayout = Literal["HND", "NHD"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    permutation: Tensor | None = None,
    block_mask: Tensor | BlockMask | None = None,
    precision: str | Precision | Sequence[str | Precision] = "exact",
    compensate: bool | Sequence[bool] = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    tensor_layout: TensorLayout = "HND",
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    permutation: Tensor | None = None,
    block_mask: Tensor | BlockMask | None = None,
    precision: str | Precision | Sequence[str | Precision] = "exact",
    compensate: bool | Sequence[bool] = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    tensor_layout: TensorLayout = "HND",
    backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    permutation: Tensor | None = None,
    block_mask: Tensor | BlockMask | None = None,
    precision: str | Precision | Sequence[str | Precision] = "exact",
    compensate: bool | Sequence[bool] = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    tensor_layout: TensorLayout = "HND",
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with reordered tokens, skipped blocks and low precision (paper, sections 4.1 to 4.3).

    Args:
        query: [B, H, N, D] ("HND") or [B, N, H, D] ("NHD"); float32, float16 or bfloat16; D from 1 to 128.
        key, value: like query, with H or H_kv heads where H is a multiple of H_kv (grouped queries).
        permutation: int32 or int64 [N] or [H, N], a gather index: position i of the reordered sequence holds token
            `permutation[i]`. Applied to query, key and value; the output is in the input's order. Default: none.
        block_mask: bool [H, ceil(N/64), ceil(N/64)] or [1, ...], or a `BlockMask`, over the reordered sequence;
            True blocks are computed. Default: all.
        precision: "exact", "bf16", "int8", "int4" or a `Precision`; one for all heads or one per head.
        compensate: approximate each skipped block by its mean key and mean value instead of dropping it; one for all
            heads or one per head.
        key_mask: bool [B, N] in the input's order, False for keys to ignore (padding of text). Default: none.
        scale: factor of the logits; default 1 / sqrt(D).
        tensor_layout: "HND" or "NHD".
        backend: "auto" or a backend's name; a named backend runs or raises, it never falls back.
        return_lse: also return the natural log of the sum of exp(logits) over what was computed.

    Returns:
        The output, shaped and typed like query; with `return_lse` also lse, float32 [B, H, N].

    Raises:
        ValueError: an argument of the wrong shape, dtype or value; the message names it.

    Example:
        >>> query = key = value = torch.randn(1, 2, 128, 64)
        >>> diagonal = torch.eye(2, dtype=torch.bool).expand(2, 2, 2)
        >>> attention(query, key, value, block_mask=diagonal, precision="int8").shape
        torch.Size([1, 2, 128, 64])
    """
    check_layout(tensor_layout)
    if tensor_layout == "NHD":
        query, key, value = (x.transpose(1, 2) if x.ndim == 4 else x for x in (query, key, value))
    check_tensors(query, key, value, key_mask)
    _, heads, tokens, head_dim = query.shape
    if permutation is not None:
        check_permutation(permutation, heads, tokens)
        permutation = permutation.to(query.device).expand(heads, tokens)
    block_mask = _checked_mask(block_mask, heads, tokens, query.device)
    precisions = [Precision.parse(item) for item in per_head(precision, heads, "precision", (str, Precision))]
    compensates = per_head(compensate, heads, "compensate", (bool,))
    chosen = choose_backend(
        backend,
        precisions,
        device=query.device,
        dtype=query.dtype,
        block_shape=(BLOCK, BLOCK) if block_mask is None else (block_mask.block_q, block_mask.block_kv),
    )
    output, lse = chosen.attend(
        query,
        key,
        value,
        permutation=permutation,
        block_mask=block_mask,
        precisions=precisions,
        compensate=torch.tensor(compensates, device=query.device) if any(compensates) else None,
        key_mask=key_mask,
        scale=checked_scale(scale, head_dim),
    )
    if tensor_layout == "NHD":
        output = output.transpose(1, 2)
    return (output, lse) if return_lse else output


def check_layout(tensor_layout: str) -> None:
    if tensor_layout not in ("HND", "NHD"):
        raise ValueError(f"tensor_layout is {tensor_layout!r}; expected 'HND' or 'NHD'")


def check_tensors(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> None:
    """Raise `ValueError` for query, key, value ("HND") and key_mask that no backend can take."""
    named = {"query": query, "key": key, "value": value}
    for name, x in named.items():
        if x.ndim != 4:
            raise ValueError(f"{name} has {x.ndim} dimensions, shape {list(x.shape)}; expected 4")
        if x.dtype not in DTYPES or x.dtype != query.dtype:
            raise ValueError(
                f"{name} is {x.dtype} and query is {query.dtype}; expected one of float32, float16, bfloat16 for all"
            )
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device} and query on {query.device}; move them to one device")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad; paroattn is for inference: call it under torch.no_grad()")
    batch, heads, tokens, head_dim = query.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM or tokens < 1:
        raise ValueError(
            f"query has {tokens} tokens of head_dim {head_dim}; expected at least 1 token and head_dim 1 to 128"
        )
    key_heads = key.shape[1]
    if key.shape != (batch, key_heads, tokens, head_dim) or value.shape != key.shape:
        raise ValueError(
            f"key is {list(key.shape)} and value {list(value.shape)} (as [B, H, N, D]); expected both "
            f"[{batch}, heads, {tokens}, {head_dim}] to go with query"
        )
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"key has {key_heads} heads and query {heads}; expected a divisor of query's")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (batch, tokens)):
        raise ValueError(
            f"key_mask is {key_mask.dtype} {list(key_mask.shape)}; expected torch.bool [{batch}, {tokens}]"
        )


def per_head(value: object, heads: int, name: str, types: tuple[type, ...]) -> list:
    """One value per head from a single value or a sequence of them."""
    values = [value] * heads if isinstance(value, types) else list(value) if isinstance(value, Sequence) else []
    if len(values) != heads or not all(isinstance(item, types) for item in values):
        names = " or ".join(kind.__name__ for kind in types)
        raise ValueError(f"{name} is {value!r}; expected one {names}, or {heads} of them, one per head")
    return values


def checked_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; expected a finite number")
    return float(scale)


def _checked_mask(
    block_mask: Tensor | BlockMask | None, heads: int, tokens: int, device: torch.device
) -> BlockMask | None:
    if block_mask is None:
        return None
    if isinstance(block_mask, Tensor):
        block_mask = BlockMask.from_dense(block_mask, tokens, BLOCK, BLOCK)
    if block_mask.tokens != tokens or block_mask.heads not in (1, heads):
        raise ValueError(
            f"block_mask is for {block_mask.heads} heads and {block_mask.tokens} tokens; "
            f"query has {heads} heads and {tokens} tokens"
        )
    bits = block_mask.bits.to(device).expand(heads, -1, -1)
    return BlockMask(bits, tokens, block_mask.block_q, block_mask.block_kv)
