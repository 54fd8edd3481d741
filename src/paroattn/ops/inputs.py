"""What a call of attention brings: checked by the public functions, then handed to a backend as one object."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from paroattn.block_mask import BLOCK, BlockMask
from paroattn.errors import InputError
from paroattn.quantize import HEAD_WIDTHS, Precision

TensorLayout = Literal["HND", "NHD"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = HEAD_WIDTHS[-1]
MOST_ON_GPU = 2**28  # bytes of masks that a GPU keeps; larger tables stay in the host's memory, where kernels read them


@dataclass(frozen=True)
class CallKind:
    """What decides which backend does a call; no device or dtype means that the tensors are not known yet."""

    precisions: Sequence[Precision]
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    block_shape: tuple[int, int] = (BLOCK, BLOCK)


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """A call that was checked, in "HND" layout: what every backend's `attend` takes.

    A planned call may bring the tables of its layer and where to look them up, so that nothing of a table is copied: a
    backend with a `repeater` reads them itself, the others get `looked_up()`.

    Attributes:
        query: [B, H, N, D]; key, value: [B, H_kv, N, D].
        permutation: int32 or int64 [H, N], or None; with order_index [orders, N].
        block_mask: with H heads, or None for all blocks; with mask_index, a table of masks.
        precisions: one per head.
        compensate: bool [H] on query's device, or None for no head; with a bucket [step buckets, H].
        key_mask: bool [B, N] in the input's order, or None.
        scale: factor of the logits.
        order_index: int32 [H] into permutation, or None.
        mask_index: int32 [step buckets, H] into block_mask, or None.
        bucket: int64 [1], the step bucket, or None where nothing depends on it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    permutation: Tensor | None
    block_mask: BlockMask | None
    precisions: Sequence[Precision]
    compensate: Tensor | None
    key_mask: Tensor | None
    scale: float
    order_index: Tensor | None = None
    mask_index: Tensor | None = None
    bucket: Tensor | None = None

    def looked_up(self) -> AttentionInputs:
        """The same with an order, a mask and a flag per head instead of tables."""
        permutation, mask, compensate, bucket = self.permutation, self.block_mask, self.compensate, self.bucket
        if permutation is not None and self.order_index is not None:
            permutation = permutation.index_select(0, self.order_index)
        # index_select reads the bucket on the device; indexing would ask for its value here.
        if mask is not None and self.mask_index is not None and bucket is not None:
            bits = mask.bits.index_select(0, self.mask_index.index_select(0, bucket)[0])
            mask = BlockMask(bits, mask.tokens, mask.block_q, mask.block_kv)
        if compensate is not None and bucket is not None:
            compensate = compensate.index_select(0, bucket)[0]
        return replace(
            self,
            permutation=permutation,
            block_mask=mask,
            compensate=compensate,
            order_index=None,
            mask_index=None,
            bucket=None,
        )

    @property
    def block_shape(self) -> tuple[int, int]:
        return (BLOCK, BLOCK) if self.block_mask is None else (self.block_mask.block_q, self.block_mask.block_kv)

    @property
    def kind(self) -> CallKind:
        return CallKind(self.precisions, self.query.device, self.query.dtype, self.block_shape)

    def readable(self) -> AttentionInputs:
        """The same as kernels read it: without gradients, every tensor's channels side by side in memory."""
        query, key, value = (with_adjacent_channels(x.detach()) for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)

    def flat(self) -> tuple[Any, ...]:
        """As operators of torch take it (`FLAT_SCHEMA`), every tensor's channels side by side in memory."""
        readable = self.readable()
        return (
            readable.query,
            readable.key,
            readable.value,
            self.permutation,
            None if self.block_mask is None else self.block_mask.bits,
            list(self.block_shape),
            self.compensate,
            self.key_mask,
            ",".join(f"{precision.qk}/{precision.pv}" for precision in self.precisions),
            self.scale,
        )


Repeat = Callable[..., Tensor | None]
"""Attends with other tensors of the same kinds: query, key, value, bucket, key_mask, and the tables of the layer
(orders, order_index, masks, mask_index, compensate). None where that has to be done anew."""

FLAT_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? permutation, Tensor? mask_bits, int[] block_shape, "
    "Tensor? compensate, Tensor? key_mask, str precisions, float scale"
)


def from_flat(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    permutation: Tensor | None,
    mask_bits: Tensor | None,
    block_shape: list[int],
    compensate: Tensor | None,
    key_mask: Tensor | None,
    precisions: str,
    scale: float,
) -> AttentionInputs:
    """Undo `AttentionInputs.flat`."""
    block_mask = None if mask_bits is None else BlockMask(mask_bits, query.shape[2], *block_shape)
    chosen = parsed_precisions(precisions)
    return AttentionInputs(query, key, value, permutation, block_mask, chosen, compensate, key_mask, scale)


@functools.lru_cache
def parsed_precisions(precisions: str) -> tuple[Precision, ...]:
    """The heads' precisions from one string with commas, read once and not in every call."""
    return tuple(Precision.parse(item) for item in precisions.split(","))


def with_adjacent_channels(x: Tensor) -> Tensor:
    """The tensor with its channels side by side in memory, copied if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def is_traced(x: Tensor) -> bool:
    """Whether somebody looks at what is done with a tensor, and needs an operator of torch.

    Otherwise backends do without one: its way through the dispatcher takes a tenth of a millisecond.
    """
    return torch.compiler.is_compiling() or type(x) is not Tensor or _get_current_dispatch_mode() is not None


def check_layout(tensor_layout: str) -> None:
    if tensor_layout not in ("HND", "NHD"):
        raise InputError(f"tensor_layout is {tensor_layout!r}; expected 'HND' or 'NHD'")


def check_no_gradients(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise `InputError` where gradients of a call would be lost; also while compiled code is made."""
    if torch.is_grad_enabled():
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.requires_grad:
                raise InputError(f"{name} requires grad; paroattn is for inference: call it under torch.no_grad()")


def check_tensors(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> None:
    """Raise `InputError` for query, key, value ("HND") and key_mask that no backend can take."""
    named = {"query": query, "key": key, "value": value}
    for name, x in named.items():
        if x.ndim != 4:
            raise InputError(f"{name} has {x.ndim} dimensions, shape {list(x.shape)}; expected 4")
        if x.dtype not in DTYPES or x.dtype != query.dtype:
            raise InputError(
                f"{name} is {x.dtype} and query is {query.dtype}; expected one of float32, float16, bfloat16 for all"
            )
        if x.device != query.device:
            raise InputError(f"{name} is on {x.device} and query on {query.device}; move them to one device")
    check_no_gradients(query, key, value)
    batch, heads, tokens, head_dim = query.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM or tokens < 1:
        raise InputError(
            f"query has {tokens} tokens of head_dim {head_dim}; "
            f"expected at least 1 token and head_dim 1 to {MAX_HEAD_DIM}"
        )
    key_heads = key.shape[1]
    if key.shape != (batch, key_heads, tokens, head_dim) or value.shape != key.shape:
        raise InputError(
            f"key is {list(key.shape)} and value {list(value.shape)} (as [B, H, N, D]); expected both "
            f"[{batch}, heads, {tokens}, {head_dim}] to go with query"
        )
    if key_heads < 1 or heads % key_heads:
        raise InputError(f"key has {key_heads} heads and query {heads}; expected a divisor of query's")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (batch, tokens)):
        raise InputError(
            f"key_mask is {key_mask.dtype} {list(key_mask.shape)}; expected torch.bool [{batch}, {tokens}]"
        )


def per_head(value: object, heads: int, name: str, types: tuple[type, ...]) -> list:
    """One value per head from a single value or a sequence of them."""
    values = [value] * heads if isinstance(value, types) else list(value) if isinstance(value, Sequence) else []
    if len(values) != heads or not all(isinstance(item, types) for item in values):
        names = " or ".join(kind.__name__ for kind in types)
        raise InputError(f"{name} is {value!r}; expected one {names}, or {heads} of them, one per head")
    return values


def checked_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not math.isfinite(scale):
        raise InputError(f"scale is {scale}; expected a finite number")
    return float(scale)


def checked_mask(
    block_mask: Tensor | BlockMask | None, heads: int, tokens: int, device: torch.device
) -> BlockMask | None:
    if block_mask is None:
        return None
    if isinstance(block_mask, Tensor):
        block_mask = BlockMask.from_dense(block_mask, tokens, BLOCK, BLOCK)
    if block_mask.tokens != tokens or block_mask.heads not in (1, heads):
        raise InputError(
            f"block_mask is for {block_mask.heads} heads and {block_mask.tokens} tokens; "
            f"query has {heads} heads and {tokens} tokens"
        )
    bits = block_mask.bits.to(device).expand(heads, -1, -1)
    return BlockMask(bits, tokens, block_mask.block_q, block_mask.block_kv)
