"""The masks of a plan, packed one by one as they are chosen: a large model's would fill the memory as bools."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK, pack_bits, unpack_bits
from paroattn.grid import TokenGrid
from paroattn.plan import ModelIdentity, Plan
from paroattn.quantize import Precision


class MaskTable:
    """Masks by step bucket, layer and head; all blocks where none was put. Equal ones are stored once.

    Args:
        shape: numbers of step buckets, layers, heads, q blocks and kv blocks.

    Example:
        >>> table = MaskTable((1, 1, 3, 2, 2))
        >>> table.put(0, 0, [2], torch.eye(2, dtype=torch.bool).unsqueeze(0))
        >>> bits, index = table.packed()
        >>> bits.shape, index
        (torch.Size([2, 2, 1]), tensor([[[0, 0, 1]]], dtype=torch.int32))
    """

    def __init__(self, shape: tuple[int, ...]):
        self._index = torch.zeros(shape[:3], dtype=torch.int32)
        self._numbers: dict[bytes, int] = {}
        everything = pack_bits(torch.ones(shape[3:], dtype=torch.bool))
        # Rows that are never filled take no memory.
        self._table = torch.empty(1 + self._index.numel(), *everything.shape, dtype=torch.uint8)
        self._number_of(everything)

    @classmethod
    def of(cls, masks: Tensor) -> MaskTable:
        """The table of bool masks [buckets, layers, heads, q blocks, kv blocks]."""
        table = cls(tuple(masks.shape))
        for bucket, layers in enumerate(masks):
            for layer, own in enumerate(layers):
                table.put(bucket, layer, range(len(own)), own)
        return table

    def put(self, bucket: int, layer: int, heads: Sequence[int], masks: Tensor) -> None:
        """Use masks, bool [heads, q blocks, kv blocks] on any device, for some heads of a step bucket and layer."""
        for head, bits in zip(heads, pack_bits(masks).cpu(), strict=True):
            self._index[bucket, layer, head] = self._number_of(bits)

    def get(self, bucket: int, layer: int, heads: Sequence[int], columns: int) -> Tensor:
        """Masks that were put, bool [heads, q blocks, columns]."""
        return unpack_bits(self._table[self._index[bucket, layer, heads].long()], columns)

    def take_from(self, buckets: Tensor) -> None:
        """Take the masks of a layer from other step buckets, int64 [buckets, layers]."""
        self._index = _taken(self._index, buckets)

    def packed(self) -> tuple[Tensor, Tensor]:
        """The masks in use, uint8 [masks, q blocks, bytes], and the index into them, int32 [buckets, layers, heads]."""
        used, index = self._index.unique(return_inverse=True)
        first, last = int(used[0]), int(used[-1])
        table = self._table[first : last + 1]  # without a copy, which may take gigabytes
        return table if len(used) == last + 1 - first else table[used.long() - first], index.to(torch.int32)

    def _number_of(self, bits: Tensor) -> int:
        key = hashlib.sha256(bits.contiguous().numpy().data).digest()
        if key not in self._numbers:
            number = len(self._numbers)
            self._numbers[key], self._table[number] = number, bits
        return self._numbers[key]


def plan_from_masks(
    masks: MaskTable,
    *,
    model: ModelIdentity,
    grid: TokenGrid,
    order_names: tuple[str, ...],
    order_index: Tensor,
    schedule: tuple[float, ...],
    bucket_edges: tuple[float, ...],
    usage: Tensor,
    block_q: int = BLOCK,
    compensate: Tensor | None = None,
    precisions: tuple[Precision, ...] = (Precision(),),
    precision_index: Tensor | None = None,
    provenance: Mapping[str, Any],
) -> Plan:
    """A plan from its masks.

    A layer that was not called in a bucket gets the masks of the nearest one in which it was: another schedule may call
    it there (Wan 2.2 with another boundary).

    Args: as the attributes of `Plan`; compensate None stands for nowhere, precision_index None for the first precision.
    """
    called_in = nearest_called(usage)
    masks.take_from(called_in)
    table, index = masks.packed()
    if compensate is not None:
        compensate = _taken(compensate, called_in)
    return Plan(
        model=model,
        grid=grid,
        order_names=order_names,
        order_index=order_index,
        precisions=precisions,
        precision_index=torch.zeros(index.shape[1:], dtype=torch.uint8) if precision_index is None else precision_index,
        schedule=schedule,
        bucket_edges=bucket_edges,
        mask_table=table,
        mask_index=index,
        compensate=torch.zeros(index.shape, dtype=torch.bool) if compensate is None else compensate,
        usage=usage,
        provenance=provenance,
        block_q=block_q,
    )


def nearest_called(usage: Tensor) -> Tensor:
    """For each step bucket and layer the nearest bucket in which the layer is called, int64 [buckets, layers].

    Example:
        >>> nearest_called(torch.tensor([[0.5, 0.0], [0.0, 1.0], [0.0, 1.0]]))
        tensor([[0, 1],
                [0, 1],
                [0, 2]])
    """
    bucket = torch.arange(len(usage))
    distance = (bucket.unsqueeze(1) - bucket).abs().unsqueeze(-1)  # [buckets, buckets, 1]
    return distance.masked_fill(usage == 0, len(usage)).argmin(1)


def _taken(tensor: Tensor, buckets: Tensor) -> Tensor:
    """A tensor [buckets, layers, heads] with each layer's rows from other buckets."""
    return tensor.gather(0, buckets.unsqueeze(-1).expand_as(tensor))
