"""Launches what comes before the attention forward (prologue.py), and says what of it the forward reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from paroattn.block_mask import BLOCK, block_count
from paroattn.ops.gpu import hopper, prologue
from paroattn.ops.gpu.configs import Config, Kind, block_warps, config, queries_per_program
from paroattn.ops.gpu.device import INTERPRETED, target_here
from paroattn.ops.gpu.recording import Recording
from paroattn.ops.inputs import AttentionInputs
from paroattn.quantize import Precision, padded_head_dim

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_CHUNKS = (128, 512)  # tokens that one program of the statistics reads, of a short sequence and of a long one
_SHORT, _WHOLE = 2**15, 2**12  # tokens up to which a sequence is short, and up to which the mean of k takes all
_ROWS_AT_ONCE, _SLOTS_AT_ONCE = 64, 8  # rows of blocks that one program of the schedule ranks, and slots
_READ_AHEAD = 16  # numbers that hopper.py may read beyond a list, whose kernel says so


class Call:
    """One call as the kernels read it, and sizes that follow from it.

    Args:
        inputs: with channels side by side in memory.

    Attributes:
        order: int32 [H, N]; mask: uint8 [H, mask rows, bytes] with rows of mask_block_q queries; key_mask: uint8.
        compensate: uint8 [H], None without a mask.
        order_index, mask_index, bucket: where to look up these three if they are tables, as `AttentionInputs` has them.
        formats: of QK^T and PV of each head, "fp16", "bf16", "int8" and for PV "fp8".
        group: how many heads share keys and values.
        width: of a head inside the kernels, `padded_head_dim`.
        mean_blocks: blocks of mean tokens, one of which stands for a block of keys.
        target: of device.py.
        recording: what writes the launches down, or None.
    """

    def __init__(self, inputs: AttentionInputs):
        permutation, compensate, key_mask = inputs.permutation, inputs.compensate, inputs.key_mask
        self.query, self.key, self.value = inputs.query, inputs.key, inputs.value
        self.order = None if permutation is None else permutation.to(torch.int32).contiguous()
        self.mask = None if inputs.block_mask is None else inputs.block_mask.bits
        if self.mask is not None and self.mask.stride(1) != self.mask.shape[2]:
            self.mask = self.mask.contiguous()
        self.mask_block_q = inputs.block_shape[0]
        self.compensate = None if compensate is None or self.mask is None else compensate.view(torch.uint8)
        self.order_index, self.mask_index, self.bucket = inputs.order_index, inputs.mask_index, inputs.bucket
        self.key_mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.scale = inputs.scale
        self.formats = _formats(tuple(inputs.precisions), self.query.dtype)
        self.batch, self.heads, self.tokens, self.head_dim = self.query.shape
        self.group = self.heads // self.key.shape[1]
        self.width = padded_head_dim(self.head_dim)
        self.kv_blocks = block_count(self.tokens, BLOCK)
        self.mean_blocks = 0 if self.compensate is None else block_count(self.kv_blocks, BLOCK)
        self.target = target_here(self.query.device)
        self.recording: Recording | None = None

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.recording is not None:
            return self.recording.room(shape, dtype, self.query.device)
        return torch.empty(shape, dtype=dtype, device=self.query.device)

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """Launch a Triton kernel; options are its constants, by name, and those of the compiler."""
        if self.recording is not None:
            self.recording.triton(kernel, grid, arguments, options)
        else:
            kernel[grid](*arguments, **options)

    def tensors(self, output: Tensor, lse: Tensor) -> tuple[Tensor | None, ...]:
        """All that kernels are given of a call and that other calls have at other places in memory."""
        given = (self.query, self.key, self.value, output, lse, self.order, self.order_index, self.mask)
        return *given, self.mask_index, self.bucket, self.compensate, self.key_mask

    def kind(self, output: Tensor) -> tuple[Any, ...]:
        """What makes the launches of two calls the same, but for the tensors."""
        shapes = tuple((x.shape, x.stride()) for x in (self.query, self.key, self.value, output))
        mask = None if self.mask is None else (self.mask.shape[1:], self.mask.stride(0), self.mask_block_q)
        missing = tuple(x is None for x in self.tensors(output, output))
        return self.query.device, self.query.dtype, self.formats, shapes, mask, missing, self.scale


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of one precision, which are launched together.

    Attributes:
        numbers: int32 [slots], their numbers among all.
        block_q: queries per program; parts: programs per row of the mask; q_blocks: programs per head and batch item.
        records: where packed blocks have what for hopper.py, None for Triton's forward.
        config: of Triton's kernels.
    """

    numbers: Tensor
    qk: str
    pv: str
    block_q: int
    parts: int
    q_blocks: int
    records: hopper.Layout | None
    config: Config

    @property
    def slots(self) -> int:
        return len(self.numbers)

    @property
    def swapped(self) -> bool:
        """Whether keys are stored as `rows.stored_token` says, which hopper.py always wants."""
        return self.records is not None or self.config.swapped

    @property
    def record(self) -> int:
        """Bytes from one record to the next, 0 for none."""
        return 0 if self.records is None else self.records.record

    @property
    def columns(self) -> int:
        """Of a record's values, 0 for none."""
        return 0 if self.records is None else self.records.columns


def heads_of(call: Call, numbers: tuple[int, ...], qk: str, pv: str, on_hopper: bool) -> Heads:
    mask_block_q = None if call.mask is None else call.mask_block_q
    block_q = BLOCK if on_hopper else queries_per_program(call.width, mask_block_q, call.tokens)
    parts = 1 if mask_block_q is None else mask_block_q // block_q
    kind = Kind(call.width, block_q, _width_of(qk), _width_of(pv))
    return Heads(
        _on_device(numbers, call.query.device),
        qk,
        pv,
        block_q,
        parts,
        block_count(call.tokens, block_q * parts) * parts,
        hopper.layout(call.width, pv) if on_hopper else None,
        config(call.target, kind, compensated=call.compensate is not None),
    )


@dataclass(frozen=True, eq=False)
class Packed:
    """What the forwards read, but for the lists; `forward.attention_forward` has the shapes.

    In records, keys holds everything of a block, and values and k_scale are views of it; so with the means.
    """

    queries: Tensor
    q_factor: Tensor
    lse_shift: Tensor | None
    keys: Tensor
    values: Tensor
    k_scale: Tensor
    v_mean: Tensor | None
    v_scale: Tensor | None
    bias: Tensor | None
    mean_keys: Tensor | None
    mean_values: Tensor | None
    mean_k_scale: Tensor | None
    mean_v_scale: Tensor | None
    mean_bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Lists:
    """Kept blocks: counts int32 [slots, mask rows] and indices; slots and rows as programs take them in turn."""

    counts: Tensor
    indices: Tensor
    slots: Tensor
    rows: Tensor


def partial_statistics(call: Call) -> Tensor:
    kv_heads = call.key.shape[1]
    chunk = _chunk(call.tokens)
    chunks = block_count(call.tokens, chunk)
    partial = call.new(call.batch * kv_heads, 4, chunks, call.width)
    call.launch(
        prologue.partial_statistics,
        (chunks, call.batch * kv_heads),
        call.key,
        call.value,
        partial,
        *call.key.stride()[:3],
        *call.value.stride()[:3],
        kv_heads,
        call.tokens,
        HEAD_DIM=call.head_dim,
        D=call.width,
        CHUNK=chunk,
        K_CHUNK=_k_chunk(call.tokens),
        TILE=2048 // call.width,
        num_warps=block_warps(call.width),
    )
    return partial


def pack(call: Call, heads: Heads, partial: Tensor | None) -> Packed:
    """Gather, quantise and write queries, keys, values and, for compensation, the blocks' means."""
    packs = call.batch * heads.slots
    k_mean, v_mean, v_scale = (None, None, None) if partial is None else _channel_statistics(call, partial, heads.pv)
    q_tiles = heads.q_blocks * heads.block_q // BLOCK
    queries = call.new(packs * q_tiles * BLOCK, call.width, dtype=_DTYPES[heads.qk])
    q_factor = call.new(packs, q_tiles)
    lse_shift = call.new(packs, q_tiles * BLOCK) if heads.qk == "int8" else None
    call.launch(
        prologue.pack_query,
        (q_tiles, packs),
        call.query,
        heads.numbers,
        call.order,
        call.order_index,
        k_mean,
        queries,
        q_factor,
        lse_shift,
        *call.query.stride()[:3],
        call.scale,
        call.heads,
        call.group,
        call.tokens,
        heads.slots,
        HEAD_DIM=call.head_dim,
        D=call.width,
        QK=heads.qk,
        RECORD=heads.record,
        num_warps=block_warps(call.width),
    )
    keys, values, k_scale = _room(call, heads, packs * call.kv_blocks)
    bias = None if call.key_mask is None else call.new(packs, call.kv_blocks * BLOCK)
    means = _room_for_means(call, packs)
    call.launch(
        prologue.pack_key_value,
        (call.kv_blocks, packs),
        call.key,
        call.value,
        heads.numbers,
        call.order,
        call.order_index,
        call.key_mask,
        k_mean,
        v_mean,
        v_scale,
        keys,
        k_scale,
        values,
        bias,
        *means,
        *call.key.stride()[:3],
        *call.value.stride()[:3],
        call.heads,
        call.group,
        call.tokens,
        heads.slots,
        call.kv_blocks,
        HEAD_DIM=call.head_dim,
        D=call.width,
        QK=heads.qk,
        PV=heads.pv,
        SWAPPED=heads.swapped,
        RECORD=heads.record,
        COLUMNS=heads.columns,
        num_warps=block_warps(call.width),
    )
    packed_means = _packed_means(call, heads, means, v_scale)
    return Packed(queries, q_factor, lse_shift, keys, values, k_scale, v_mean, v_scale, bias, *packed_means)


def _channel_statistics(call: Call, partial: Tensor, pv: str) -> tuple[Tensor, ...]:
    """Mean of k, mean of v and scale of v per channel."""
    kv_heads, _, chunks, width = partial.shape
    found = call.new(3, kv_heads, width).unbind(0)
    k_chunk, before_last = _k_chunk(call.tokens), chunks - 1
    call.launch(
        prologue.channel_statistics,
        (kv_heads,),
        partial,
        *found,
        call.tokens,
        before_last * k_chunk + min(call.tokens - before_last * _chunk(call.tokens), k_chunk),
        chunks,
        D=width,
        PV=pv,
        CHUNKS=triton.next_power_of_2(chunks),
        num_warps=2 * block_warps(width),
    )
    return found


def _room(call: Call, heads: Heads, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for so many blocks' keys, values and scales of the keys, uninitialised."""
    if heads.records is not None:
        records = call.new(blocks * heads.record, dtype=torch.int8)
        values = records[heads.records.values :].view(_DTYPES[heads.pv])
        return records, values, records[heads.records.scale :].view(torch.float32)
    keys = call.new(blocks * BLOCK, call.width, dtype=_DTYPES[heads.qk])
    shape = (blocks * BLOCK, call.width) if _width_of(heads.pv) == "16" else (blocks * call.width, BLOCK)
    return keys, call.new(*shape, dtype=_DTYPES[heads.pv]), call.new(blocks)


def _room_for_means(call: Call, packs: int) -> tuple[Tensor | None, ...]:
    """Room for the mean key, mean value and number of shown tokens of each block."""
    if call.compensate is None:
        return None, None, None
    means = (call.new(packs, call.kv_blocks, call.width) for _ in range(2))
    return *means, call.new(packs, call.kv_blocks)


def _packed_means(
    call: Call, heads: Heads, means: tuple[Tensor | None, ...], v_scale: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Packed mean keys, mean values, scales of the keys and values, and bias."""
    if call.compensate is None:
        return (None,) * 5
    packs = call.batch * heads.slots
    keys, values, k_scale = _room(call, heads, packs * call.mean_blocks)
    values_scale, bias = call.new(packs, call.mean_blocks), call.new(packs, call.mean_blocks * BLOCK)
    call.launch(
        prologue.pack_means,
        (call.mean_blocks, packs),
        *means,
        heads.numbers,
        v_scale,
        keys,
        k_scale,
        values,
        values_scale,
        bias,
        call.heads,
        call.group,
        heads.slots,
        call.kv_blocks,
        D=call.width,
        QK=heads.qk,
        PV=heads.pv,
        SWAPPED=heads.swapped,
        RECORD=heads.record,
        COLUMNS=heads.columns,
        num_warps=block_warps(call.width),
    )
    return keys, values, k_scale, values_scale, bias


def kept_lists(call: Call, heads: Heads) -> Lists | None:
    """The lists of kept blocks, and the order of heads and rows, longest first; None without a mask."""
    if call.mask is None:
        return None
    slots, rows = heads.slots, call.mask.shape[1]
    counts = call.new(slots, rows, dtype=torch.int32)
    indices = call.new(slots * rows * call.kv_blocks + 2 * call.mean_blocks + _READ_AHEAD, dtype=torch.int32)
    call.launch(
        prologue.kept_lists,
        (rows, slots),
        call.mask,
        call.mask_index,
        call.bucket,
        heads.numbers,
        counts,
        indices,
        call.mask.stride(0),
        call.heads,
        rows,
        call.kv_blocks,
        call.mask.shape[2],
        COLUMNS=triton.next_power_of_2(call.kv_blocks),
        num_warps=2,
    )
    slot_order, row_order = call.new(slots, dtype=torch.int32), torch.empty_like(counts)
    call.launch(
        prologue.schedule,
        (block_count(rows, _ROWS_AT_ONCE), slots),
        counts,
        slot_order,
        row_order,
        slots,
        rows,
        ROWS=max(_ROWS_AT_ONCE, triton.next_power_of_2(rows)),
        TILE=_ROWS_AT_ONCE,
        SLOTS=_SLOTS_AT_ONCE,
    )
    return Lists(counts, indices, slot_order, row_order)


@functools.lru_cache(maxsize=64)
def all_blocks(kv_blocks: int, device: torch.device) -> Tensor:
    """The list of kept blocks of a row that keeps all."""
    return torch.arange(kv_blocks + _READ_AHEAD, dtype=torch.int32).to(device)


def on_hopper(call: Call, qk: str, pv: str, output: Tensor) -> bool:
    """Whether hopper.py computes these formats here."""
    if call.target != "sm90" or INTERPRETED or not hopper.takes(qk, pv, output) or hopper.unavailable() is not None:
        return False
    return hopper.loads(output.device.index, call.width, pv, output.dtype)


def _chunk(tokens: int) -> int:
    return _CHUNKS[tokens > _SHORT]


def _k_chunk(tokens: int) -> int:
    """How many of a chunk's tokens the mean of k takes."""
    return _chunk(tokens) // (1 if tokens <= _WHOLE else 4)


def _width_of(kernel_format: str) -> str:
    return kernel_format if kernel_format in ("int8", "fp8") else "16"


@functools.lru_cache
def _formats(precisions: tuple[Precision, ...], dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    """The kernels' names of the heads' formats; exact products of 16-bit input are 16-bit ones with float32 sums."""
    exact = "fp16" if dtype == torch.float16 else "bf16"
    names = [(precision.qk, precision.pv) for precision in precisions]
    return tuple((exact if qk == "exact" else qk, exact if pv == "exact" else pv) for qk, pv in names)


@functools.lru_cache(maxsize=1024)
def _on_device(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Head numbers on the device, copied there once: a copy in every call would wait for the device."""
    return torch.tensor(heads, dtype=torch.int32, device=device)
