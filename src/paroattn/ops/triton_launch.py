"""Launches the Triton kernels: heads of one precision at a time, statistics, packing, lists of blocks, attention."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from paroattn.block_mask import BLOCK, block_count
from paroattn.ops import triton_forward, triton_prologue
from paroattn.ops.triton_attention import INTERPRETED, on_device_of, target_here
from paroattn.ops.triton_configs import Config, Kind, config, queries_per_program

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_CHUNK, _TILE = 512, 32  # tokens that one program of the statistics reads, and how many at a time
_ROWS_AT_ONCE = 64  # rows of blocks that one program of the schedule ranks


def run(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    permutation: Tensor | None,
    mask_bits: Tensor | None,
    block_q: int,
    compensate: Tensor | None,
    key_mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rotary: str,
    qk: Sequence[str],
    pv: Sequence[str],
    scale: float,
    count_visits: bool = False,
) -> list[Tensor]:
    """Fill output and lse; arguments as `triton_attention.triton_attention` has them.

    Returns:
        With `count_visits`, how many kv blocks each program attended: int32 [B, heads, programs] per precision.
    """
    visits: list[Tensor] = []
    if output.numel() == 0:
        return visits
    with on_device_of(query):
        call = _Call(query, key, value, permutation, mask_bits, block_q, compensate, key_mask, cos, sin, rotary, scale)
        partial = call.partial_statistics() if {"int8", "fp8"} & {*qk, *pv} else None
        for formats in dict.fromkeys(zip(qk, pv, strict=True)):
            heads = tuple(head for head, own in enumerate(zip(qk, pv, strict=True)) if own == formats)
            visited = call.attend(heads, *formats, partial, output, lse, count_visits)
            if visited is not None:
                visits.append(visited)
    return visits


class _Call:
    """The inputs of one call, and its launches."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        permutation: Tensor | None,
        mask_bits: Tensor | None,
        block_q: int,
        compensate: Tensor | None,
        key_mask: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        rotary: str,
        scale: float,
    ):
        self.query, self.key, self.value = query, key, value
        self.batch, self.heads, self.tokens, self.head_dim = query.shape
        self.group = self.heads // key.shape[1]
        self.order = None if permutation is None else permutation.contiguous()
        self.mask = (
            mask_bits if mask_bits is None or mask_bits.stride(1) == mask_bits.shape[2] else mask_bits.contiguous()
        )
        self.compensate = None if compensate is None or mask_bits is None else compensate.view(torch.uint8)
        self.key_mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.angles = (cos, sin) if cos is None or sin is None else (cos.contiguous(), sin.contiguous())
        self.rotary = rotary or None
        self.scale = scale
        self.width = 64 if self.head_dim <= 64 else 128  # of a head inside the kernels
        self.target = target_here(query.device)
        self.block_q = queries_per_program(self.width, None if mask_bits is None else block_q, self.tokens)
        self.parts = 1 if mask_bits is None else block_q // self.block_q  # programs per row of the mask
        self.q_blocks = block_count(self.tokens, self.block_q * self.parts) * self.parts
        self.kv_blocks = block_count(self.tokens, BLOCK)
        self.mean_blocks = block_count(self.kv_blocks, BLOCK) if self.compensate is not None else 0

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.query.device)

    def partial_statistics(self) -> Tensor:
        kv_heads = self.key.shape[1]
        chunks = block_count(self.tokens, _CHUNK)
        partial = self.new(self.batch * kv_heads, 4, chunks, self.width)
        triton_prologue.partial_statistics[(chunks, self.batch * kv_heads)](
            self.key,
            self.value,
            partial,
            *self.key.stride()[:3],
            *self.value.stride()[:3],
            kv_heads,
            self.tokens,
            HEAD_DIM=self.head_dim,
            D=self.width,
            CHUNK=_CHUNK,
            TILE=_TILE,
        )
        return partial

    def attend(
        self,
        heads: tuple[int, ...],
        qk: str,
        pv: str,
        partial: Tensor | None,
        output: Tensor,
        lse: Tensor,
        count_visits: bool,
    ) -> Tensor | None:
        """Fill these heads of output and lse; returns the visited blocks if they are to be counted."""
        slots, packs = len(heads), self.batch * len(heads)
        head_numbers = _on_device(heads, self.query.device)
        kind = Kind(self.width, self.block_q, _width_of(qk), _width_of(pv))
        chosen = config(self.target, kind, compensated=self.compensate is not None)

        k_mean = v_mean = v_scale = None
        if partial is not None:
            kv_heads, _, chunks, _ = partial.shape
            k_mean, v_mean, v_scale = self.new(3, kv_heads, self.width).unbind(0)
            triton_prologue.channel_statistics[(kv_heads,)](
                partial,
                k_mean,
                v_mean,
                v_scale,
                self.tokens,
                chunks,
                D=self.width,
                PV=pv,
                CHUNKS=triton.next_power_of_2(chunks),
                num_warps=8,
            )
        q_tiles = self.q_blocks * self.block_q // BLOCK
        queries = self.new(packs * q_tiles * BLOCK, self.width, dtype=_DTYPES[qk])
        q_factor = self.new(packs, q_tiles)
        lse_shift = self.new(packs, q_tiles * BLOCK) if qk == "int8" else None
        triton_prologue.pack_query[(q_tiles, packs)](
            self.query,
            head_numbers,
            self.order,
            *self.angles,
            k_mean,
            queries,
            q_factor,
            lse_shift,
            *self.query.stride()[:3],
            self.scale,
            self.heads,
            self.group,
            self.tokens,
            slots,
            HEAD_DIM=self.head_dim,
            D=self.width,
            QK=qk,
            ROTARY=self.rotary,
        )
        keys = self.new(packs * self.kv_blocks * BLOCK, self.width, dtype=_DTYPES[qk])
        values = self._packed_values(packs * self.kv_blocks, pv)
        k_scale = self.new(packs, self.kv_blocks)
        bias = self.new(packs, self.kv_blocks * BLOCK) if self.key_mask is not None else None
        means = self._block_means(packs)
        triton_prologue.pack_key_value[(self.kv_blocks, packs)](
            self.key,
            self.value,
            head_numbers,
            self.order,
            *self.angles,
            self.key_mask,
            k_mean,
            v_mean,
            v_scale,
            keys,
            k_scale,
            values,
            bias,
            *means,
            *self.key.stride()[:3],
            *self.value.stride()[:3],
            self.heads,
            self.group,
            self.tokens,
            slots,
            self.kv_blocks,
            HEAD_DIM=self.head_dim,
            D=self.width,
            QK=qk,
            PV=pv,
            ROTARY=self.rotary,
            SWAPPED=chosen.swapped,
        )
        mean_tiles = self._mean_tiles(packs, means, head_numbers, v_scale, qk, pv, chosen)
        slot_order, row_order, counts, indices = self._lists(head_numbers)
        visited = self.new(packs, self.q_blocks, dtype=torch.int32) if count_visits else None
        triton_forward.attention_forward[(packs * self.q_blocks,)](
            queries,
            keys,
            values,
            output,
            lse,
            head_numbers,
            self.order,
            q_factor,
            lse_shift,
            k_scale if qk == "int8" else None,
            v_mean,
            v_scale,
            bias,
            slot_order,
            row_order,
            counts,
            indices,
            self.compensate,
            None if self.compensate is None else self.mask,
            *mean_tiles,
            visited,
            *output.stride()[:3],
            0 if self.mask is None else self.mask.stride(0),
            self.batch,
            self.heads,
            self.group,
            self.tokens,
            slots,
            self.q_blocks,
            self.parts,
            self.kv_blocks,
            self.mean_blocks,
            0 if self.mask is None else self.mask.shape[2],
            HEAD_DIM=self.head_dim,
            D=self.width,
            BLOCK_Q=self.block_q,
            QK=qk,
            PV=pv,
            WIDTH=chosen.width,
            SWAPPED=chosen.swapped,
            ASM=chosen.asm and not INTERPRETED,
            NUM_STAGES=chosen.num_stages,
            **chosen.options,
        )
        return None if visited is None else visited.view(self.batch, slots, self.q_blocks)

    def _packed_values(self, blocks: int, pv: str) -> Tensor:
        shape = (blocks * BLOCK, self.width) if _width_of(pv) == "16" else (blocks * self.width, BLOCK)
        return self.new(*shape, dtype=_DTYPES[pv])

    def _block_means(self, packs: int) -> tuple[Tensor | None, ...]:
        """Room for the mean key, mean value and number of shown tokens of each block."""
        if self.compensate is None:
            return None, None, None
        means = (self.new(packs, self.kv_blocks, self.width) for _ in range(2))
        return *means, self.new(packs, self.kv_blocks)

    def _mean_tiles(
        self,
        packs: int,
        means: tuple[Tensor | None, ...],
        head_numbers: Tensor,
        v_scale: Tensor | None,
        qk: str,
        pv: str,
        chosen: Config,
    ) -> tuple[Tensor | None, ...]:
        """Packed mean keys, their scales, packed mean values, their scales, bias."""
        if self.compensate is None:
            return None, None, None, None, None
        keys = self.new(packs * self.mean_blocks * BLOCK, self.width, dtype=_DTYPES[qk])
        values = self._packed_values(packs * self.mean_blocks, pv)
        k_scale, values_scale = self.new(packs, self.mean_blocks), self.new(packs, self.mean_blocks)
        bias = self.new(packs, self.mean_blocks * BLOCK)
        triton_prologue.pack_means[(self.mean_blocks, packs)](
            *means,
            head_numbers,
            v_scale,
            keys,
            k_scale,
            values,
            values_scale,
            bias,
            self.heads,
            self.group,
            packs // self.batch,
            self.kv_blocks,
            D=self.width,
            QK=qk,
            PV=pv,
            SWAPPED=chosen.swapped,
        )
        return keys, k_scale, values, values_scale, bias

    def _lists(self, head_numbers: Tensor) -> tuple[Tensor | None, ...]:
        """Order of the slots and of their rows, longest first, and the kept blocks: counts and indices."""
        if self.mask is None:
            return None, None, None, None
        slots, rows = len(head_numbers), self.mask.shape[1]
        counts = self.new(slots, rows, dtype=torch.int32)
        indices = self.new(slots, rows, self.kv_blocks, dtype=torch.int32)
        triton_prologue.kept_lists[(rows, slots)](
            self.mask,
            head_numbers,
            counts,
            indices,
            self.mask.stride(0),
            rows,
            self.kv_blocks,
            self.mask.shape[2],
            COLUMNS=triton.next_power_of_2(self.kv_blocks),
        )
        slot_order, row_order = self.new(slots, dtype=torch.int32), torch.empty_like(counts)
        triton_prologue.schedule[(block_count(rows, _ROWS_AT_ONCE), slots)](
            counts,
            slot_order,
            row_order,
            slots,
            rows,
            ROWS=max(_ROWS_AT_ONCE, triton.next_power_of_2(rows)),
            TILE=_ROWS_AT_ONCE,
        )
        return slot_order, row_order, counts, indices


def _width_of(kernel_format: str) -> str:
    return kernel_format if kernel_format in ("int8", "fp8") else "16"


@functools.lru_cache(maxsize=1024)
def _on_device(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Head numbers on the device, copied there once: a copy in every call would wait for the device."""
    return torch.tensor(heads, dtype=torch.int32, device=device)
