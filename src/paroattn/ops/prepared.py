"""Attention prepared once for a layer of a plan, then called with tensors only."""

from __future__ import annotations

import torch
from torch import Tensor

from paroattn.block_mask import BlockMask, block_count, unpack_bits
from paroattn.ops.attention import TensorLayout, check_layout, check_tensors, checked_scale
from paroattn.ops.backend import Backend, choose_backend
from paroattn.order import check_permutation
from paroattn.plan import LayerPlan


def prepare(
    layer_plan: LayerPlan,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    tensor_layout: TensorLayout = "NHD",
    scale: float | None = None,
    backend: str = "auto",
) -> PreparedAttention:
    """Move a layer's part of a plan to a device and check it there, once.

    Args:
        layer_plan: from `Plan.layer`.
        device, dtype: of the tensors that calls will bring.
        tensor_layout: "NHD" [B, N, H, D] or "HND" [B, H, N, D].
        scale: factor of the logits; default 1 / sqrt(D).
        backend: "auto" or a backend's name.

    Returns:
        An operator: `op(query, key, value, step=bucket)`.

    Raises:
        ValueError: an unknown layout or backend, or a precision the backend does not have.

    Example:
        >>> op = prepare(LayerPlan(precisions=(Precision(),) * 2), device="cpu", dtype=torch.float32)
        >>> query = torch.randn(1, 100, 2, 64)
        >>> op(query, query, query, step=torch.tensor(0)).shape
        torch.Size([1, 100, 2, 64])
    """
    return PreparedAttention(layer_plan, torch.device(device), dtype, tensor_layout, scale, backend)


class PreparedAttention:
    """The operator that `prepare` returns."""

    def __init__(
        self,
        layer_plan: LayerPlan,
        device: torch.device,
        dtype: torch.dtype,
        tensor_layout: TensorLayout,
        scale: float | None,
        backend: str,
    ):
        check_layout(tensor_layout)
        _check_parts(layer_plan)
        self.layer_plan = layer_plan
        self.dtype = dtype
        self.tensor_layout = tensor_layout
        self.scale = scale
        self._backend = choose_for_layer(backend, layer_plan, device, dtype)
        permutation = _moved(layer_plan.permutation, device)
        if permutation is not None:
            permutation = permutation.to(torch.int32).expand(layer_plan.heads, -1)
        self._permutation = permutation
        self._mask_table = _moved(layer_plan.mask_table, device)
        self._mask_index = _moved(layer_plan.mask_index, device)
        compensates = layer_plan.compensate is not None and bool(layer_plan.compensate.any())
        self._compensate = _moved(layer_plan.compensate, device) if compensates else None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, step: Tensor, key_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query, key, value: [B, N, H, D] ("NHD") or [B, H, N, D] ("HND"), of the prepared dtype and device.
            step: 0-dim integer tensor on that device: the step bucket (`Plan.bucket_of`), which selects the masks and
                the heads with compensation.
            key_mask: bool [B, N] in input order, False for padding.

        Returns:
            The output, shaped like query.
        """
        if self.tensor_layout == "NHD":
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        check_tensors(query, key, value, key_mask)
        self._check_shape(query)
        plan = self.layer_plan
        block_mask = compensate = None
        bucket = step.reshape(1).long()
        # index_select reads the step on the device; indexing would ask for its value here.
        if self._mask_table is not None and self._mask_index is not None:
            masks = self._mask_index.index_select(0, bucket)[0]
            bits = self._mask_table.index_select(0, masks.long())
            block_mask = BlockMask(bits, query.shape[2], plan.block_q, plan.block_kv)
        if self._compensate is not None:
            compensate = self._compensate.index_select(0, bucket)[0]
        output, _ = self._backend.attend(
            query,
            key,
            value,
            permutation=self._permutation,
            block_mask=block_mask,
            precisions=plan.precisions,
            compensate=compensate,
            key_mask=key_mask,
            scale=checked_scale(self.scale, query.shape[3]),
        )
        return output.transpose(1, 2) if self.tensor_layout == "NHD" else output

    def _check_shape(self, query: Tensor) -> None:
        plan = self.layer_plan
        if query.dtype != self.dtype:
            raise ValueError(f"query is {query.dtype}; this operator was prepared for {self.dtype}")
        if query.shape[1] != plan.heads or (plan.tokens is not None and query.shape[2] != plan.tokens):
            expected = "any number of" if plan.tokens is None else f"{plan.tokens:,}"
            raise ValueError(
                f"query has {query.shape[1]} heads and {query.shape[2]:,} tokens; this operator was prepared for "
                f"{plan.heads} heads and {expected} tokens"
            )


def choose_for_layer(
    name: str, layer_plan: LayerPlan, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Backend:
    """The backend of that name for a layer, as `choose_backend`; without a device, what can be known before a call."""
    return choose_backend(
        name,
        layer_plan.precisions,
        device=device,
        dtype=dtype,
        block_shape=(layer_plan.block_q, layer_plan.block_kv),
    )


def _check_parts(plan: LayerPlan) -> None:
    """Raise `ValueError` naming a part of the layer plan that does not fit the others."""
    if plan.permutation is not None:
        check_permutation(plan.permutation, plan.heads, plan.tokens or plan.permutation.shape[-1])
    if plan.mask_table is None or plan.mask_index is None or plan.tokens is None:
        return
    rows, columns = block_count(plan.tokens, plan.block_q), block_count(plan.tokens, plan.block_kv)
    if tuple(plan.mask_table.shape[1:]) != (rows, -(-columns // 8)):
        raise ValueError(
            f"mask_table is {list(plan.mask_table.shape)}; expected [masks, {rows}, {-(-columns // 8)}] "
            f"for {plan.tokens} tokens"
        )
    BlockMask.from_dense(unpack_bits(plan.mask_table, columns), plan.tokens, plan.block_q, plan.block_kv)
    buckets, masks = len(plan.mask_index), len(plan.mask_table)
    for name, part in (("mask_index", plan.mask_index), ("compensate", plan.compensate)):
        if part is not None and tuple(part.shape) != (buckets, plan.heads):
            raise ValueError(
                f"{name} is {list(part.shape)}; expected [{buckets}, {plan.heads}], step buckets and heads"
            )
    if int(plan.mask_index.min()) < 0 or int(plan.mask_index.max()) >= masks:
        raise ValueError(f"mask_index goes up to {int(plan.mask_index.max())}; mask_table has {masks} masks")


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
