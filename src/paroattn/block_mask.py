"""Block masks: which blocks of an attention map are computed, stored as bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paroattn.errors import InputError
from paroattn.grid import TokenGrid

BLOCK = 64
_BIT_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)
_BITS_OF_BYTE = torch.tensor([byte.bit_count() for byte in range(256)])


def block_count(tokens: int, block: int) -> int:
    """Number of blocks that cover `tokens`; the last one may be partial."""
    return -(-tokens // block)


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
