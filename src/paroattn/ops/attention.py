"""The operator: validates, chooses the backend, calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from paroattn.block_mask import BlockMask
from paroattn.ops.backend import choose_backend
from paroattn.ops.inputs import (
    AttentionInputs,
    TensorLayout,
    check_layout,
    check_tensors,
    checked_mask,
    checked_scale,
    per_head,
)
from paroattn.order import check_permutation
from paroattn.quantize import Precision


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
        query: [B, H, N, D] ("HND") or [B, N, H, D] ("NHD"); float32, float16 or bfloat16; D from 1 to 256.
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
        InputError: an argument of the wrong shape, dtype or value; the message names it.

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
    compensates = per_head(compensate, heads, "compensate", (bool,))
    inputs = AttentionInputs(
        query,
        key,
        value,
        permutation,
        checked_mask(block_mask, heads, tokens, query.device),
        [Precision.parse(item) for item in per_head(precision, heads, "precision", (str, Precision))],
        torch.tensor(compensates, device=query.device) if any(compensates) else None,
        key_mask,
        checked_scale(scale, head_dim),
    )
    output, lse = choose_backend(backend, inputs.kind).attend(inputs)
    if tensor_layout == "NHD":
        output = output.transpose(1, 2)
    return (output, lse) if return_lse else output
