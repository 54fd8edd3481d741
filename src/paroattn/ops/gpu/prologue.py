"""What comes before the attention forward, in Triton: statistics, packed keys and values, lists of kept blocks.

`partial_statistics` reads v and some of k once; `pack_query` and `pack_key_value` read q, k and v in each head's order
and write what the forward reads. Packed blocks of 64 tokens stand one after the other, padded with zeros. RECORD is 0
for forward.py, whose layouts the docstrings give; for hopper.py, it is the bytes from one block to the next, with
keys, values and scale (`_store_rows`, `_store_values`, `_store_scale`), and COLUMNS is `hopper.Layout.columns`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from paroattn.ops.gpu.rows import (
    BLOCK_KV,
    FP8_MAX,
    INT8_MAX,
    LOG2_E,
    TINY,
    load_rows,
    load_tokens,
    number_of_mask,
    quantize_tile,
    stored_token,
    to_int8,
)

_SIZES = {
    "tokens",
    "k_tokens",
    "heads",
    "kv_heads",
    "group",
    "slots",
    "kv_blocks",
    "q_blocks",
    "chunks",
    "mask_bytes",
    "stride_mask",
}


def _kernel(function: Callable[..., Any]) -> Any:
    """A Triton kernel that is compiled once for all sizes."""
    names = inspect.signature(function).parameters
    return triton.jit(function, do_not_specialize=[name for name in _SIZES if name in names])


@_kernel
def partial_statistics(
    k_ptr, v_ptr, partial_ptr, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, kv_heads, tokens,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, K_CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sums of k and v, least and largest v of CHUNK tokens, per channel; grid (chunks, B * H_kv).

    Of k, only the first K_CHUNK tokens of each chunk: any vector may be taken out of all keys without changing the
    softmax, and one near their mean does. TILE tokens are added at a time. partial: float32 [B * H_kv, 4, chunks, D].
    """
    head = tl.program_id(1)
    chunks = tl.num_programs(0)
    b, h = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    channel = tl.arange(0, D)
    k_start, v_start = k_ptr + b * stride_kb + h * stride_kh, v_ptr + b * stride_vb + h * stride_vh
    first = tl.program_id(0) * CHUNK + tl.arange(0, TILE)
    k_sum = tl.zeros([TILE, D], tl.float32)
    for start in tl.range(0, K_CHUNK, TILE):
        token = first + start
        k_sum += load_rows(k_start, stride_kn, token, token < tokens, HEAD_DIM, D)
    v_sum = tl.zeros([TILE, D], tl.float32)
    least = tl.full([TILE, D], float("inf"), tl.float32)
    largest = tl.full([TILE, D], float("-inf"), tl.float32)
    for start in tl.range(0, CHUNK, TILE, num_stages=4):
        token = first + start
        valid = token < tokens
        v = load_rows(v_start, stride_vn, token, valid, HEAD_DIM, D)
        v_sum += v
        least = tl.minimum(least, tl.where(valid[:, None], v, float("inf")))
        largest = tl.maximum(largest, tl.where(valid[:, None], v, float("-inf")))
    partial_ptr += (head * 4 * chunks + tl.program_id(0)) * D + channel
    tl.store(partial_ptr, tl.sum(k_sum, 0))
    tl.store(partial_ptr + chunks * D, tl.sum(v_sum, 0))
    tl.store(partial_ptr + 2 * chunks * D, tl.min(least, 0))
    tl.store(partial_ptr + 3 * chunks * D, tl.max(largest, 0))


@_kernel
def channel_statistics(
    partial_ptr, k_mean_ptr, v_mean_ptr, v_scale_ptr, tokens, k_tokens, chunks,
    D: tl.constexpr, PV: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Mean of k, mean of v and scale of v - mean per channel from the chunks; grid (B * H_kv,), each [B * H_kv, D].

    k_tokens is how many keys were added up; CHUNKS a power of two, at least `chunks`.
    """
    head = tl.program_id(0)
    chunk, channel = tl.arange(0, CHUNKS), tl.arange(0, D)
    there = (chunk < chunks)[:, None]
    partial_ptr += head * 4 * chunks * D + chunk[:, None] * D + channel[None, :]
    k_sum = tl.sum(tl.load(partial_ptr, mask=there, other=0.0), 0)
    v_sum = tl.sum(tl.load(partial_ptr + chunks * D, mask=there, other=0.0), 0)
    least = tl.min(tl.load(partial_ptr + 2 * chunks * D, mask=there, other=float("inf")), 0)
    largest = tl.max(tl.load(partial_ptr + 3 * chunks * D, mask=there, other=float("-inf")), 0)
    v_mean = v_sum / tokens
    farthest = tl.maximum(largest - v_mean, v_mean - least)
    tl.store(k_mean_ptr + head * D + channel, k_sum / k_tokens)
    tl.store(v_mean_ptr + head * D + channel, v_mean)
    tl.store(v_scale_ptr + head * D + channel, tl.maximum(farthest / (FP8_MAX if PV == "fp8" else INT8_MAX), TINY))


@triton.jit
def _store_rows(tile_ptr, x, D: tl.constexpr, RECORD: tl.constexpr):
    """Queries or keys [64, D]; with RECORD as hopper_forward.cu wants them, in pieces of 8 rows by 16 channels."""
    row, channel = tl.arange(0, BLOCK_KV)[:, None], tl.arange(0, D)[None, :]
    at = row * D + channel
    if RECORD > 0:
        at = row // 8 * (8 * D) + channel // 16 * 128 + row % 8 * 16 + channel % 16
    tl.store(tile_ptr + at, x.to(tile_ptr.dtype.element_ty))


@triton.jit
def _store_values(values_ptr, v, D: tl.constexpr, PV: tl.constexpr, RECORD: tl.constexpr, COLUMNS: tl.constexpr):
    """Values [64, D] float32, scaled already, rounded; 8-bit ones transposed, with RECORD 16 tokens at a time.

    A record's COLUMNS beyond D are ones.
    """
    row, channel = tl.arange(0, BLOCK_KV)[None, :], tl.arange(0, D)[:, None]
    at = channel * BLOCK_KV + row
    if RECORD > 0:
        ONES: tl.constexpr = COLUMNS - D
        piece = row // 16 * (16 * COLUMNS) + row % 16
        at = piece + channel * 16
        if ONES > 0:
            ones = tl.full([ONES, BLOCK_KV], 1.0, tl.float32).to(values_ptr.dtype.element_ty)
            tl.store(values_ptr + piece + (D + tl.arange(0, ONES)[:, None]) * 16, ones)
    if PV == "int8":
        tl.store(values_ptr + at, tl.trans(to_int8(v)))
    elif PV == "fp8":
        tl.store(values_ptr + at, tl.trans(v).to(values_ptr.dtype.element_ty))
    else:
        tl.store(values_ptr + tl.trans(row) * D + tl.trans(channel), v.to(values_ptr.dtype.element_ty))


@triton.jit
def _store_scale(k_scale_ptr, at, scale, RECORD: tl.constexpr):
    """The scale of block `at` of the keys; with RECORD four times at the record's end."""
    if RECORD > 0:
        tl.store(k_scale_ptr + at * (RECORD // 4) + tl.arange(0, 4), scale)
    else:
        tl.store(k_scale_ptr + at, scale)


@_kernel
def pack_query(
    q_ptr, heads_ptr, order_ptr, order_index_ptr, k_mean_ptr,
    queries_ptr, q_factor_ptr, lse_shift_ptr,
    stride_qb, stride_qh, stride_qn, scale, heads, group, tokens, slots,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, QK: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """64 queries of one head, gathered, quantised, written; grid (q tiles of 64, B * slots).

    q [B, H, N, HEAD_DIM] by strides; queries [B * slots, q tiles, 64, D]; q_factor [B * slots, q tiles] and lse_shift
    [B * slots, q tiles * 64] as `forward.attention_forward` has them.
    """
    tile = tl.program_id(0)
    packed = tl.program_id(1)
    b = packed // slots
    h = tl.load(heads_ptr + packed % slots)
    row, channel = tl.arange(0, BLOCK_KV), tl.arange(0, D)
    at = (packed * tl.num_programs(0) + tile).to(tl.int64)
    position = tile * BLOCK_KV + row
    valid = position < tokens
    token = position
    if order_ptr is not None:
        token = load_tokens(order_ptr, order_index_ptr, h, tokens, position, valid)
    q_start = q_ptr + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    q = load_rows(q_start, stride_qn, token, valid, HEAD_DIM, D)
    if scale < 0:  # factors are above zero, so that the largest product has the largest logit
        q = -q
    size = tl.abs(scale)
    if QK == "int8":
        kv_head = b * (heads // group) + h // group
        k_mean = tl.load(k_mean_ptr + kv_head * D + channel)
        tl.store(lse_shift_ptr + at * BLOCK_KV + row, tl.sum(q * k_mean[None, :], 1) * size)
        q, q_scale = quantize_tile(q)
        tl.store(q_factor_ptr + at, q_scale * (size * LOG2_E))
    else:
        tl.store(q_factor_ptr + at, size * LOG2_E)
    _store_rows(queries_ptr + at * BLOCK_KV * D, q, D, RECORD)


@_kernel
def pack_key_value(
    k_ptr, v_ptr, heads_ptr, order_ptr, order_index_ptr, key_mask_ptr,
    k_mean_ptr, v_mean_ptr, v_scale_ptr,
    keys_ptr, k_scale_ptr, values_ptr, bias_ptr, block_k_ptr, block_v_ptr, block_count_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, group, tokens, slots, kv_blocks,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr,
    SWAPPED: tl.constexpr, RECORD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of keys and values of one head, gathered, quantised, written; grid (kv_blocks, B * slots).

    Arguments as `forward.attention_forward` has them. k [B, H_kv, N, HEAD_DIM], v by strides; key_mask bool
    [B, N]. Where skipped blocks are compensated: block_k, block_v float32 [B * slots, kv_blocks, D], the means over the
    block's shown tokens, and block_count float32 [B * slots, kv_blocks], how many there are.
    """
    block = tl.program_id(0)
    packed = tl.program_id(1)
    b = packed // slots
    h = tl.load(heads_ptr + packed % slots)
    kv_head = b * (heads // group) + h // group
    row, channel = tl.arange(0, BLOCK_KV), tl.arange(0, D)
    at = (packed * kv_blocks + block).to(tl.int64)
    STRIDE: tl.constexpr = RECORD if RECORD > 0 else BLOCK_KV * D

    position = block * BLOCK_KV + stored_token(row, SWAPPED)
    valid = position < tokens
    token = position
    if order_ptr is not None:
        token = load_tokens(order_ptr, order_index_ptr, h, tokens, position, valid)
    shown = valid
    if key_mask_ptr is not None:
        shown = tl.load(key_mask_ptr + b.to(tl.int64) * tokens + token, mask=valid, other=0) != 0
        tl.store(bias_ptr + at * BLOCK_KV + row, tl.where(shown, 0.0, float("-inf")))
    k_start = k_ptr + b.to(tl.int64) * stride_kb + (h // group).to(tl.int64) * stride_kh
    k = load_rows(k_start, stride_kn, token, valid, HEAD_DIM, D)
    if QK == "int8":
        k = tl.where(valid[:, None], k - tl.load(k_mean_ptr + kv_head * D + channel)[None, :], 0.0)
        values, scale = quantize_tile(k)
        _store_rows(keys_ptr + at * STRIDE, values, D, RECORD)
        _store_scale(k_scale_ptr, at, scale, RECORD)
    else:
        _store_rows(keys_ptr + at * STRIDE, k, D, RECORD)
    if block_k_ptr is not None:
        count = tl.sum(shown.to(tl.float32), 0)
        tl.store(block_count_ptr + at, count)
        tl.store(block_k_ptr + at * D + channel, tl.sum(tl.where(shown[:, None], k, 0.0), 0) / tl.maximum(count, 1.0))

    position = block * BLOCK_KV + row
    valid = position < tokens
    token = position
    if order_ptr is not None:
        token = load_tokens(order_ptr, order_index_ptr, h, tokens, position, valid)
    v_start = v_ptr + b.to(tl.int64) * stride_vb + (h // group).to(tl.int64) * stride_vh
    v = load_rows(v_start, stride_vn, token, valid, HEAD_DIM, D)
    scaled = v
    if PV == "int8" or PV == "fp8":
        v = tl.where(valid[:, None], v - tl.load(v_mean_ptr + kv_head * D + channel)[None, :], 0.0)
        scaled = v / tl.load(v_scale_ptr + kv_head * D + channel)[None, :]
    _store_values(values_ptr + at * STRIDE, scaled, D, PV, RECORD, COLUMNS)
    if block_v_ptr is not None:
        shown = valid
        if key_mask_ptr is not None:
            shown = tl.load(key_mask_ptr + b.to(tl.int64) * tokens + token, mask=valid, other=0) != 0
        count = tl.sum(shown.to(tl.float32), 0)
        tl.store(block_v_ptr + at * D + channel, tl.sum(tl.where(shown[:, None], v, 0.0), 0) / tl.maximum(count, 1.0))


@_kernel
def pack_means(
    block_k_ptr, block_v_ptr, block_count_ptr, heads_ptr, v_scale_ptr,
    keys_ptr, k_scale_ptr, values_ptr, values_scale_ptr, bias_ptr, heads, group, slots, kv_blocks,
    D: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, SWAPPED: tl.constexpr, RECORD: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """64 mean tokens as one packed block; grid (mean_blocks, B * slots).

    Writes keys and values [B * slots, mean_blocks, ...] as `pack_key_value` does, k_scale and values_scale (on top of
    the channels' scales, since means are smaller than values) [B * slots, mean_blocks], and bias [..., 64]: log2 of how
    many tokens each stands for, -inf for none.
    """
    block = tl.program_id(0)
    packed = tl.program_id(1)
    row, channel = tl.arange(0, BLOCK_KV), tl.arange(0, D)
    at = (packed * tl.num_programs(0) + block).to(tl.int64)
    STRIDE: tl.constexpr = RECORD if RECORD > 0 else BLOCK_KV * D
    kv_block = block * BLOCK_KV + stored_token(row, SWAPPED)
    from_block = (packed * kv_blocks + kv_block).to(tl.int64)
    count = tl.load(block_count_ptr + from_block, mask=kv_block < kv_blocks, other=0.0)
    tl.store(bias_ptr + at * BLOCK_KV + row, tl.math.log2(count))
    k = tl.load(
        block_k_ptr + from_block[:, None] * D + channel[None, :], mask=(kv_block < kv_blocks)[:, None], other=0.0
    )
    if QK == "int8":
        values, scale = quantize_tile(k)
        _store_rows(keys_ptr + at * STRIDE, values, D, RECORD)
        _store_scale(k_scale_ptr, at, scale, RECORD)
    else:
        _store_rows(keys_ptr + at * STRIDE, k, D, RECORD)

    kv_block = block * BLOCK_KV + row
    from_block = (packed * kv_blocks + kv_block).to(tl.int64)
    v = tl.load(
        block_v_ptr + from_block[:, None] * D + channel[None, :], mask=(kv_block < kv_blocks)[:, None], other=0.0
    )
    if PV == "int8" or PV == "fp8":
        h = tl.load(heads_ptr + packed % slots)
        kv_head = (packed // slots) * (heads // group) + h // group
        v = v / tl.load(v_scale_ptr + kv_head * D + channel)[None, :]
        largest = tl.max(tl.max(tl.abs(v), 1), 0)
        scale = tl.maximum(largest / (FP8_MAX if PV == "fp8" else INT8_MAX), TINY)
        tl.store(values_scale_ptr + at, scale)
        v = v / scale
    _store_values(values_ptr + at * STRIDE, v, D, PV, RECORD, COLUMNS)


@_kernel
def kept_lists(
    mask_ptr, mask_index_ptr, bucket_ptr, heads_ptr, counts_ptr, indices_ptr,
    stride_mask, heads, q_blocks, kv_blocks, mask_bytes, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Kept kv blocks of one row of blocks, ascending; grid (q_blocks, slots); COLUMNS a power of two >= kv_blocks.

    mask uint8 [H, q_blocks, mask_bytes], or a table with mask_index and bucket (`rows.number_of_mask`) -> counts int32
    [slots, q_blocks], indices int32 [slots, q_blocks, kv_blocks], of which the first `counts` are written.
    """
    row = tl.program_id(0)
    slot = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    h = number_of_mask(mask_index_ptr, bucket_ptr, tl.load(heads_ptr + slot), heads)
    mask_ptr += h.to(tl.int64) * stride_mask + row * mask_bytes
    bits = tl.load(mask_ptr + column // 8, mask=column < kv_blocks, other=0)
    kept = (bits.to(tl.int32) >> (column % 8)) & 1
    at = slot * q_blocks + row
    tl.store(counts_ptr + at, tl.sum(kept, 0))
    place = tl.cumsum(kept, 0) - 1
    tl.store(indices_ptr + at.to(tl.int64) * kv_blocks + place, column, mask=kept == 1)


@_kernel
def schedule(
    counts_ptr, slots_ptr, rows_ptr, slots, q_blocks, ROWS: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr
):
    """Rows of blocks of each slot, longest first, and the slots, heaviest first; grid (chunks of TILE rows, slots).

    counts int32 [slots, q_blocks] -> slots int32 [slots], rows int32 [slots, q_blocks]. The rows of a slot stay
    together, so that its keys and values stay in the L2 cache. ROWS is a power of two, at least q_blocks and TILE;
    SLOTS slots are compared at a time.
    """
    own = tl.program_id(1)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = row < q_blocks
    counts = tl.load(counts_ptr + own * q_blocks + row, mask=there, other=-1)
    rank = tl.zeros([TILE], tl.int32)
    for start in range(0, q_blocks, TILE):
        other = start + tl.arange(0, TILE)
        count = tl.load(counts_ptr + own * q_blocks + other, mask=other < q_blocks, other=-1)
        before = (count[None, :] > counts[:, None]) | (
            (count[None, :] == counts[:, None]) & (other[None, :] < row[:, None])
        )
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(rows_ptr + own * q_blocks + rank, row, mask=there)

    if tl.program_id(0) == 0:
        every_row = tl.arange(0, ROWS)
        exists = every_row < q_blocks
        total = tl.sum(tl.load(counts_ptr + own * q_blocks + every_row, mask=exists, other=0), 0)
        slot_rank = 0
        for start in range(0, slots, SLOTS):
            other = start + tl.arange(0, SLOTS)
            at = other[:, None] * q_blocks + every_row[None, :]
            sums = tl.sum(tl.load(counts_ptr + at, mask=(other < slots)[:, None] & exists[None, :], other=0), 1)
            before = (sums > total) | ((sums == total) & (other < own))
            slot_rank += tl.sum((before & (other < slots)).to(tl.int32), 0)
        tl.store(slots_ptr + slot_rank, own)
