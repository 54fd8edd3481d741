"""Block masks: which blocks of an attention map are computed, stored as bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paroattn.errors import InputError
from paroattn.grid import TokenGrid

BLOCK = 64
_MANY_TOKENS = 100_000
_BIT_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)
_BITS_OF_BYTE = torch.tensor([byte.bit_count() for byte in range(256)])


def block_count(tokens: int, block: int) -> int:
    """Number of blocks that cover `tokens`; the last one may be partial."""
    return -(-tokens // block)


def usual_block_q(tokens: int) -> int:
    """Queries per block where none are asked for: in long sequences two of 64 skip nearly the same keys, and masks of
    128 x 64 blocks are half as large.
    """
    return BLOCK if tokens < _MANY_TOKENS else 2 * BLOCK


def pack_bits(mask: Tensor) -> Tensor:
    """Pack bool [..., K] into uint8 [..., ceil(K / 8)]; bit j of byte i is entry 8 i + j, unused bits are zero."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    values = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) * values).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, length: int) -> Tensor:
    """Undo `pack_bits`: uint8 [..., ceil(length / 8)] into bool [..., length]."""
    values = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) & values).ne(0).flatten(-2)[..., :length]


def count_bits(bits: Tensor) -> int:
    """How many entries of a packed mask are True."""
    return int(_BITS_OF_BYTE[bits.int()].sum())


def visual_blocks(grid: TokenGrid, block_q: int = BLOCK, block_kv: int = BLOCK) -> tuple[slice, slice]:
    """Rows and columns of blocks without any text token; they are the same whatever the number of text tokens."""
    if not grid.text_tokens:
        return slice(block_count(grid.tokens, block_q)), slice(block_count(grid.tokens, block_kv))
    return slice(grid.visual_tokens // block_q), slice(grid.visual_tokens // block_kv)


def text_blocks(grid: TokenGrid, block_q: int = BLOCK, block_kv: int = BLOCK) -> Tensor:
    """Blocks that touch a text token, bool [q blocks, kv blocks]; they are always computed (paper, section 4.2).

    Visual tokens come first in every order, so these are the last rows and columns of blocks.
    """
    rows, columns = block_count(grid.tokens, block_q), block_count(grid.tokens, block_kv)
    touched = torch.ones(rows, columns, dtype=torch.bool)
    touched[visual_blocks(grid, block_q, block_kv)] = False
    return touched


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Computed blocks of the attention maps of several heads, over the reordered sequence.

    Build it with `BlockMask.from_dense`. The last row and column of blocks may be partial.

    Attributes:
        bits: uint8 [heads, q blocks, ceil(kv blocks / 8)], see `pack_bits`.
        tokens: length N of the sequence.
        block_q, block_kv: tokens per block of queries and of keys.
    """

    bits: Tensor
    tokens: int
    block_q: int = BLOCK
    block_kv: int = BLOCK

    @classmethod
    def from_dense(cls, mask: Tensor, tokens: int, block_q: int = BLOCK, block_kv: int = BLOCK) -> BlockMask:
        """Pack a bool mask [heads, ceil(N / block_q), ceil(N / block_kv)]; True blocks are computed.

        Raises:
            InputError: wrong dtype or shape, or a row of blocks without any True.

        Example:
            >>> BlockMask.from_dense(torch.eye(3, dtype=torch.bool)[None], tokens=130).density
            0.3333333333333333
        """
        expected = (block_count(tokens, block_q), block_count(tokens, block_kv))
        if mask.dtype != torch.bool or mask.ndim != 3 or tuple(mask.shape[1:]) != expected:
            raise InputError(
                f"block_mask is {mask.dtype} {list(mask.shape)}; expected torch.bool [heads, {expected[0]}, "
                f"{expected[1]}] for {tokens} tokens in blocks of {block_q} x {block_kv}"
            )
        # Values are not known while a graph is traced.
        if not torch.compiler.is_compiling() and not bool(mask.any(-1).all()):
            head, row = (~mask.any(-1)).nonzero()[0].tolist()
            raise InputError(
                f"block_mask keeps no block in row {row} of head {head}; every row of blocks needs at least one"
            )
        return cls(pack_bits(mask), tokens, block_q, block_kv)

    @property
    def heads(self) -> int:
        return self.bits.shape[0]

    @property
    def density(self) -> float:
        """Computed blocks over all blocks, text blocks counted."""
        return float(self.to_dense().double().mean())

    def to_dense(self) -> Tensor:
        """The mask as bool [heads, q blocks, kv blocks]."""
        return unpack_bits(self.bits, block_count(self.tokens, self.block_kv))

    def kv_lists(self) -> tuple[Tensor, Tensor]:
        """Computed kv blocks per row, the form kernels and FlexAttention take.

        Returns:
            kv_num_blocks: int32 [heads, q blocks], how many blocks a row computes.
            kv_indices: int32 [heads, q blocks, kv blocks]: the computed blocks in ascending order, then the others.
        """
        dense = self.to_dense()
        indices = (~dense).to(torch.uint8).sort(dim=-1, stable=True).indices
        return dense.sum(-1, dtype=torch.int32), indices.to(torch.int32)

    def to_flex(self, device: torch.device | str = "cpu") -> Any:
        """The mask as PyTorch's FlexAttention takes it, over the reordered sequence.

        Returns:
            `torch.nn.attention.flex_attention.BlockMask` of one batch and these heads, all of its blocks full ones.

        Example:
            >>> mask = BlockMask.from_dense(torch.eye(3, dtype=torch.bool)[None], tokens=130).to_flex()
            >>> mask.shape
            (1, 1, 130, 130)
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexMask

        counts, indices = (lists.unsqueeze(0).to(device) for lists in self.kv_lists())
        dense = self.to_dense().to(device)

        def keeps(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # for what is not compiled
            return dense[head, query // self.block_q, key // self.block_kv]

        # None of the blocks are partial; full ones need indices of their own, not shared.
        return FlexMask.from_kv_blocks(
            torch.zeros_like(counts), indices, counts, indices.clone(),
            BLOCK_SIZE=(self.block_q, self.block_kv), mask_mod=keeps, seq_lengths=(self.tokens, self.tokens),
        )  # fmt: skip

    def to_bsr(self, head: int) -> tuple[Tensor, Tensor]:
        """A head's kept blocks in rows, as FlashInfer's `BlockSparseAttentionWrapper` takes them.

        Returns:
            indptr: int32 [q blocks + 1], where each row begins in `indices`.
            indices: int32 [kept blocks], their kv blocks, ascending in each row.

        Example:
            >>> BlockMask.from_dense(torch.eye(3, dtype=torch.bool)[None], tokens=130).to_bsr(0)
            (tensor([0, 1, 2, 3], dtype=torch.int32), tensor([0, 1, 2], dtype=torch.int32))
        """
        kept = unpack_bits(self.bits[head], block_count(self.tokens, self.block_kv))
        indptr = torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0))
        return indptr.int(), kept.nonzero()[:, 1].int()

    def to_coo(self) -> Tensor:
        """Head, q block and kv block of each kept block, int64 [3, kept blocks].

        Example:
            >>> BlockMask.from_dense(torch.eye(2, dtype=torch.bool)[None], tokens=100).to_coo().tolist()
            [[0, 0], [0, 1], [0, 1]]
        """
        return self.to_dense().nonzero().T
