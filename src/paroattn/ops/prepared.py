"""Attention prepared once for a layer of a plan, then called with tensors only."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paroattn.block_mask import BlockMask, block_count, pack_bits, text_blocks, unpack_bits
from paroattn.errors import InputError
from paroattn.grid import TokenGrid
from paroattn.ops.backend import backend_named, name_of_choice
from paroattn.ops.inputs import (
    MOST_ON_GPU,
    AttentionInputs,
    CallKind,
    Repeat,
    TensorLayout,
    check_layout,
    check_no_gradients,
    check_tensors,
    checked_scale,
    parsed_precisions,
)
from paroattn.ops.opaque import opaque
from paroattn.ops.repair import repaired
from paroattn.order import check_permutation
from paroattn.plan import LayerPlan

_MOST_KINDS = 256  # of calls that are remembered
_TENSORS = 10  # of a planned call, which come first


def prepare(
    layer_plan: LayerPlan,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    tensor_layout: TensorLayout = "HND",
    scale: float | None = None,
    backend: str = "auto",
    repair: bool = False,
) -> PreparedAttention:
    """Move a layer's part of a plan to a device and check it there, once.

    Args:
        layer_plan: from `Plan.layer`.
        device, dtype: of the tensors that calls will bring.
        tensor_layout: "HND" [B, H, N, D] or "NHD" [B, N, H, D].
        scale: factor of the logits; default 1 / sqrt(D).
        backend: "auto" or a backend's name.
        repair: bring outputs closer to attention over all keys by 64 rows of each call that attend to them
            (`paroattn.ops.repair`).

    Returns:
        An operator: `op(query, key, value, bucket=bucket)`.

    Raises:
        InputError: an unknown layout or backend, or a precision the backend does not have.

    Example:
        >>> op = prepare(LayerPlan(precisions=(Precision(),) * 2), device="cpu", dtype=torch.float32)
        >>> query = torch.randn(1, 2, 100, 64)
        >>> op(query, query, query, bucket=torch.tensor(0)).shape
        torch.Size([1, 2, 100, 64])
    """
    _check_parts(layer_plan)
    return PreparedAttention(layer_plan, torch.device(device), dtype, tensor_layout, scale, backend, repair)


class PreparedAttention:
    """The operator that `prepare` returns; made directly of a layer of a `Plan`, whose parts are known to fit.

    In compiled code each call is one opaque node.
    """

    def __init__(
        self,
        layer_plan: LayerPlan,
        device: torch.device,
        dtype: torch.dtype,
        tensor_layout: TensorLayout,
        scale: float | None,
        backend: str,
        repair: bool = False,
    ):
        check_layout(tensor_layout)
        self.layer_plan = layer_plan
        self.device = device
        self.dtype = dtype
        self.tensor_layout = tensor_layout
        self.scale = scale
        self.repair = repair
        self.backend = name_of_choice(backend, kind_of_calls(layer_plan, device, dtype))
        orders, order_index = layer_plan.orders, layer_plan.order_index
        if orders is not None and order_index is None and orders.numel() == orders.shape[-1]:  # one for all heads
            orders, order_index = orders.view(1, -1), torch.zeros(layer_plan.heads)
        compensate, grid = layer_plan.compensate, layer_plan.grid
        # As an operator takes them: frames, height and width do not matter here.
        tokens = [-1, 0, 0] if layer_plan.tokens is None else [layer_plan.tokens, 0, 0]
        if grid is not None:
            tokens = [grid.visual_tokens, grid.text_tokens, 1 if grid.text_position == "prefix" else 2]
        # What `planned_attention` takes after a call's own tensors.
        self._layer: tuple[Any, ...] = (
            _moved(orders, device, torch.int32),
            _moved(order_index, device, torch.int32),
            _moved(layer_plan.mask_table, device),
            _moved(layer_plan.mask_index, device, torch.int32),
            None if compensate is None or not compensate.any() else _moved(compensate, device),
            tokens,
            [layer_plan.block_q, layer_plan.block_kv],
            ",".join(map(str, layer_plan.precisions)),
            scale,
            self.backend,
        )

    @property
    def kind(self) -> tuple[Any, ...]:
        """What decides which kernels its calls need: precisions of the heads, and the tables that its plan has."""
        return self.layer_plan.precisions, *(x is None for x in self._layer[:5])

    def fits(self, query: Tensor, scale: float | None) -> bool:
        """Whether it was prepared for queries like this one."""
        return query.dtype == self.dtype and query.device == self.device and scale == self.scale

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, bucket: Tensor, key_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query, key, value: [B, H, N, D] ("HND") or [B, N, H, D] ("NHD"), of the prepared dtype and device.
            bucket: 0-dim integer tensor on that device: the step bucket (`Plan.bucket_of`), which selects the masks
                and the heads with compensation.
            key_mask: bool [B, N] in input order, False for padding.

        Returns:
            The output, shaped like query.

        Raises:
            InputError: tensors that the operator was not prepared for.
        """
        if query.dtype != self.dtype:
            raise InputError(f"query is {query.dtype}; this operator was prepared for {self.dtype}")
        check_no_gradients(query, key, value)
        if self.tensor_layout == "NHD":
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        attend = planned_attention if torch.compiler.is_compiling() else _attend
        output = attend(query, key, value, bucket, key_mask, *self._layer_at(bucket))
        if self.repair:
            first, count = self._approximated(query.shape[2])
            repair = repair_in_place if torch.compiler.is_compiling() else _repair
            repair(output, query, key, value, key_mask, first, count, self.scale)
        return output.transpose(1, 2) if self.tensor_layout == "NHD" else output

    def _layer_at(self, bucket: Tensor) -> tuple[Any, ...]:
        """The layer's part of a call, with the orders of a step bucket where they differ by it."""
        orders, index, *others = self._layer
        if index is None or index.ndim == 1:
            return self._layer
        return orders, index.index_select(0, bucket.reshape(1)).view(-1), *others

    def _approximated(self, tokens: int) -> tuple[int, int]:
        """First and number of the rows of a call that may lack blocks: all but those of text, which have all."""
        grid = self.layer_plan.grid
        if grid is None:
            return 0, tokens
        visual = grid.visual_tokens
        return (tokens - visual if grid.text_position == "prefix" else 0), visual


def _inputs_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bucket: Tensor,
    key_mask: Tensor | None,
    orders: Tensor | None,
    order_index: Tensor | None,
    mask_table: Tensor | None,
    mask_index: Tensor | None,
    compensate: Tensor | None,
    planned_tokens: list[int],
    block_shape: list[int],
    precisions: str,
    scale: float | None,
    backend: str,
) -> AttentionInputs:
    """What a backend gets of a planned call in types that operators may take, query, key, value [B, H, N, D].

    planned_tokens: [N or -1 for any, 0, 0], or with a grid [visual tokens, text tokens, 1 (prefix) or 2 (suffix)]:
    then a call may have any number of text tokens. Tables and indices as in `LayerPlan`; precisions with commas;
    backend: the name of one that does such calls.
    """
    check_tensors(query, key, value, key_mask)
    chosen = parsed_precisions(precisions)
    _check_shape(query, len(chosen), planned_tokens)
    tokens = query.shape[2]
    visual, text, position = planned_tokens
    inputs = AttentionInputs(
        query,
        key,
        value,
        orders,
        None if mask_table is None else BlockMask(mask_table, tokens, *block_shape),
        chosen,
        compensate,
        key_mask,
        checked_scale(scale, query.shape[3]),
        order_index if orders is not None else None,
        mask_index if mask_table is not None else None,
        bucket.reshape(1).long(),
    )
    other_text = bool(position) and tokens != visual + text
    # A table that is in the host's memory would be read more than once.
    in_host_memory = mask_table is not None and mask_table.nbytes > MOST_ON_GPU
    if other_text or in_host_memory or backend_named(backend).repeater is None:
        inputs = inputs.looked_up()
    if other_text:
        inputs = _with_text(inputs, TokenGrid(1, 1, visual, text, "prefix" if position == 1 else "suffix"))
    return inputs


_repeats: dict[tuple[Any, ...], Repeat | None] = {}
"""Of the kinds of planned calls seen."""


def _attend(*given: Any) -> Tensor:
    """The output of a planned call, given as in `_inputs_of`; what calls of a kind share is worked out once."""
    tensors, (tokens, block_shape, *others) = given[:_TENSORS], given[_TENSORS:]
    kind = tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors)
    kind = (*kind, tuple(tokens), tuple(block_shape), *others)
    repeat = _repeats.get(kind)
    output = None if repeat is None else repeat(*tensors)
    if output is not None:
        return output
    inputs, module = _inputs_of(*given), backend_named(given[-1])
    output = module.attend(inputs)[0]
    if module.repeater is not None:
        if len(_repeats) >= _MOST_KINDS:
            _repeats.clear()
        _repeats[kind] = module.repeater(inputs)
    return output


def _repair(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    first: int,
    count: int,
    scale: float | None,
) -> None:
    repaired(output, query, key, value, first=first, count=count, key_mask=key_mask, scale=scale)


repair_in_place = opaque(
    "repair(Tensor(a!) output, Tensor query, Tensor key, Tensor value, Tensor? key_mask, int first, int count, "
    "float? scale) -> ()",
    _repair,
    lambda *_: None,
)
planned_attention = opaque(
    "planned_attention(Tensor query, Tensor key, Tensor value, Tensor bucket, Tensor? key_mask, Tensor? orders, "
    "Tensor? order_index, Tensor? mask_table, Tensor? mask_index, Tensor? compensate, int[] planned_tokens, "
    "int[] block_shape, str precisions, float? scale, str backend) -> Tensor",
    _attend,
    lambda query, *_: torch.empty_like(query),
)


def kind_of_calls(
    layer_plan: LayerPlan, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> CallKind:
    """What calls of a layer are, for `choose_backend`; without a device, what can be known before a call."""
    return CallKind(layer_plan.precisions, device, dtype, (layer_plan.block_q, layer_plan.block_kv))


def _with_text(inputs: AttentionInputs, grid: TokenGrid) -> AttentionInputs:
    """The looked-up inputs of a call that has other text tokens than the planned grid."""
    text = inputs.query.shape[2] - grid.visual_tokens
    permutation, mask = inputs.permutation, inputs.block_mask
    if mask is not None:
        bits = _masks_for(mask.bits, grid, text, mask.block_q, mask.block_kv)
        mask = BlockMask(bits, mask.tokens, mask.block_q, mask.block_kv)
    return replace(
        inputs, permutation=None if permutation is None else _orders_for(permutation, grid, text), block_mask=mask
    )


def _orders_for(orders: Tensor, grid: TokenGrid, text_tokens: int) -> Tensor:
    """Gather indices [orders, N] for `text_tokens` instead of the grid's own number; visual tokens come first."""
    if text_tokens == grid.text_tokens:
        return orders
    changed = replace(grid, text_tokens=text_tokens)
    visual = orders[:, : grid.visual_tokens] + (changed.visual_start - grid.visual_start)
    start = grid.visual_tokens if grid.text_position == "suffix" else 0
    text = torch.arange(start, start + text_tokens, dtype=orders.dtype, device=orders.device)
    return torch.cat((visual, text.expand(len(orders), -1)), 1)


def _masks_for(bits: Tensor, grid: TokenGrid, text_tokens: int, block_q: int, block_kv: int) -> Tensor:
    """Packed masks [masks, q blocks, bytes] for `text_tokens` instead of the grid's own number.

    Visual blocks stay, as visual tokens come first in every order; blocks that touch text are computed.
    """
    if text_tokens == grid.text_tokens:
        return bits
    text, everything = _text_bits(replace(grid, text_tokens=text_tokens), block_q, block_kv, bits.device)
    rows, size = (min(a, b) for a, b in zip(text.shape, bits.shape[1:], strict=True))
    changed = bits.new_zeros(len(bits), *text.shape)
    changed[:, :rows, :size] = bits[:, :rows, :size]
    return (changed | text) & everything


@functools.lru_cache(maxsize=64)
def _text_bits(grid: TokenGrid, block_q: int, block_kv: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Packed masks of the blocks that touch text, and of all blocks."""
    text = text_blocks(grid, block_q, block_kv)
    return pack_bits(text).to(device), pack_bits(torch.ones_like(text)).to(device)


def _check_shape(query: Tensor, heads: int, planned_tokens: list[int]) -> None:
    tokens, _, with_text = planned_tokens
    fits = tokens in (-1, query.shape[2]) or (with_text and query.shape[2] > tokens)
    if query.shape[1] != heads or not fits:
        expected = "any number of" if tokens == -1 else f"{'at least ' if with_text else ''}{tokens:,}"
        raise InputError(
            f"query has {query.shape[1]} heads and {query.shape[2]:,} tokens; this operator was prepared for "
            f"{heads} heads and {expected} tokens"
        )


def _check_parts(plan: LayerPlan) -> None:
    """Raise `InputError` naming a part of the layer plan that does not fit the others."""
    if plan.orders is not None:
        if plan.order_index is not None:
            by_bucket = tuple(plan.order_index.shape[:-1])
            _check_index("order_index", plan.order_index, (*by_bucket, plan.heads), len(plan.orders))
        heads = plan.heads if plan.order_index is None else len(plan.orders)
        check_permutation(plan.orders, heads, plan.tokens or plan.orders.shape[-1])
    if plan.mask_table is None or plan.tokens is None:
        return
    rows, columns = block_count(plan.tokens, plan.block_q), block_count(plan.tokens, plan.block_kv)
    masks = plan.heads if plan.mask_index is None else len(plan.mask_table)
    if tuple(plan.mask_table.shape) != (masks, rows, -(-columns // 8)):
        raise InputError(
            f"mask_table is {list(plan.mask_table.shape)}; expected [masks, {rows}, {-(-columns // 8)}] "
            f"for {plan.tokens} tokens"
        )
    BlockMask.from_dense(unpack_bits(plan.mask_table, columns), plan.tokens, plan.block_q, plan.block_kv)
    if plan.mask_index is not None:
        _check_index("mask_index", plan.mask_index, (len(plan.mask_index), plan.heads), masks)
        if plan.compensate is not None and plan.compensate.shape != plan.mask_index.shape:
            raise InputError(
                f"compensate is {list(plan.compensate.shape)}; expected {list(plan.mask_index.shape)}, step buckets "
                "and heads"
            )


def _check_index(name: str, index: Tensor, shape: tuple[int, ...], length: int) -> None:
    if tuple(index.shape) != shape:
        raise InputError(f"{name} is {list(index.shape)}; expected {list(shape)}, the last for heads")
    if int(index.min()) < 0 or int(index.max()) >= length:
        raise InputError(f"{name} goes from {int(index.min())} to {int(index.max())}; expected 0 to {length - 1}")


def _moved(tensor: Tensor | None, device: torch.device, dtype: torch.dtype | None = None) -> Tensor | None:
    """The tensor as kernels read it; a part of a larger one that starts anywhere would need kernels of its own."""
    if tensor is None:
        return None
    moved = tensor.to(device, dtype).contiguous()
    return moved.clone() if moved.data_ptr() % 16 else moved
