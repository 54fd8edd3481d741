"""Repair by probes in three kernels: exact rows, the map of each head, and the map applied in one pass.

`paroattn.ops.repair` is the definition. Nothing waits for the GPU, and no sum depends on which program ends first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from paroattn.ops.gpu import device
from paroattn.ops.gpu.rows import LOG2_E, TINY
from paroattn.ops.inputs import with_adjacent_channels
from paroattn.quantize import HEAD_WIDTHS

PROBES = 64
_PROBES = tl.constexpr(PROBES)
_TILE = tl.constexpr(64)  # keys at a time, channels, and rows
_PROGRAMS = 264  # two for each multiprocessor of a large GPU, so that few heads keep it busy
_CHUNKS = 64  # of the keys of a head, at most: a program holds the limits of all
_EXACT = 1e-7  # what is left of the inverse's error
_WIDEST = dict.fromkeys((torch.float16, torch.bfloat16), 128 if torch.version.hip else HEAD_WIDTHS[-1])
_WIDEST[torch.float32] = 128
WARPS: dict[str, Callable[[int], int]] = {
    "exact_probes": lambda width: 4 if width == 64 else 8,
    "fit_map": lambda width: 4,
    "apply_map": lambda width: 8,
}
"""Of the kernels, by the width of heads."""


def takes(output: Tensor) -> bool:
    """Whether the kernels do this, with channels side by side in memory; wider heads may not fit into a program's."""
    return output.shape[-1] <= _WIDEST.get(output.dtype, 0) and output.stride(-1) == 1


def repaired(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    first: int,
    count: int,
    key_mask: Tensor | None,
    scale: float,
    ridge: float,
    step: int,
) -> Tensor:
    """As `paroattn.ops.repair.repaired`, of an output that the kernels take.

    Args:
        ridge: added to the diagonal of each head's system.
        step: of the probes, in units of 2^-32 of the rows.
    """
    query, key, value = (with_adjacent_channels(x) for x in (query, key, value))
    key_mask = None if key_mask is None else key_mask.contiguous()
    batch, heads, _, channels = query.shape
    keys, width = key.shape[2], max(64, triton.next_power_of_2(channels))
    tiles = triton.cdiv(keys, 64)
    chunks = min(tiles, _CHUNKS, triton.cdiv(_PROGRAMS, batch * heads))
    chunk = triton.cdiv(tiles, chunks) * 64
    chunks = triton.cdiv(keys, chunk)
    floats: dict[str, Any] = {"dtype": torch.float32, "device": output.device}
    sums = torch.empty(batch * heads, chunks, PROBES, width, **floats)
    limits = torch.empty(batch * heads, chunks, 2, PROBES, **floats)
    weights = torch.empty(batch * heads, width, width, dtype=output.dtype, device=output.device)
    moved = torch.empty(batch * heads, width, **floats)
    group = heads // key.shape[1]
    on_amd, in_16_bits, products = torch.version.hip is not None, output.dtype != torch.float32, precision()
    with device.on_device_of(output):
        exact_probes[(chunks, batch * heads)](
            query, key, value, key_mask, sums, limits, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            0 if key_mask is None else key_mask.stride(0), heads, group, keys, first, count, chunk, scale,
            STEP=step, CHANNELS=channels, WIDTH=width, PRECISION=products, num_warps=WARPS["exact_probes"](width),
            num_stages=stages_of(width, in_16_bits=in_16_bits, on_amd=on_amd),
        )  # fmt: skip
        fit_map[(width // 64, batch * heads)](
            output, sums, limits, weights, moved, *output.stride()[:3], heads, first, count, chunks, width // 64, ridge,
            STEP=step, CHANNELS=channels, WIDTH=width, CHUNKS=triton.next_power_of_2(chunks),
            ROUNDS=rounds_of(channels, ridge), PRECISION=products, num_warps=WARPS["fit_map"](width),
        )  # fmt: skip
        each = min(triton.cdiv(count, 64), triton.cdiv(4 * _PROGRAMS, batch * heads))
        apply_map[(each, batch * heads)](
            output, weights, moved, *output.stride()[:3], heads, first, count,
            CHANNELS=channels, WIDTH=width, COLUMNS=columns_of(width, in_16_bits=in_16_bits), PRECISION=products,
            num_warps=WARPS["apply_map"](width), num_stages=stages_of(width, in_16_bits=in_16_bits, on_amd=on_amd),
        )  # fmt: skip
    return output


def precision() -> str:
    """Of products in float32: three of matrix units on NVIDIA's GPUs, whose other units would take registers' worth."""
    return "ieee" if torch.version.hip else "tf32x3"


def stages_of(width: int, *, in_16_bits: bool, on_amd: bool) -> int:
    """Tiles that `exact_probes` and `apply_map` load ahead, as far as shared memory goes on every GPU."""
    return 3 if in_16_bits and width <= 128 and not on_amd else 1


def columns_of(width: int, *, in_16_bits: bool) -> int:
    """Channels that a program of `apply_map` has weights of at a time."""
    if not in_16_bits:
        return 32
    return width if width <= 128 else 64


def rounds_of(channels: int, ridge: float) -> int:
    """Rounds of `fit_map` that leave `_EXACT` of an error.

    Eigenvalues lie between the ridge and the ridge and the trace, 64 for each channel; the first guess, 2 / (least and
    largest), leaves (condition - 1) / (condition + 1).
    """
    condition = 1 + PROBES * channels / ridge
    error, rounds = (condition - 1) / (condition + 1), 0
    while error > _EXACT:
        error, rounds = error**2 / (2 - error**2), rounds + 1
    return rounds


@triton.jit
def _probes(count, STEP: tl.constexpr):
    """Which rows are probes."""
    steps = (tl.arange(0, _PROBES).to(tl.int64) * STEP) & 0xFFFFFFFF
    return (steps * count) >> 32


@triton.jit
def exact_probes(
    q_ptr, k_ptr, v_ptr, mask_ptr, sums_ptr, limits_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_mask,
    heads, group, keys, first, count, chunk, scale,
    STEP: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of the probes over a chunk of the keys: unnormalised sums, largest logits and sums of exponentials."""
    number, place = tl.program_id(0), tl.program_id(1)
    b, h = (place // heads).to(tl.int64), place % heads
    channel = tl.arange(0, WIDTH)
    is_channel = (channel < CHANNELS)[None, :]
    probe = _probes(count, STEP) + first
    q_start = q_ptr + b * stride_qb + h.to(tl.int64) * stride_qh
    q = tl.load(q_start + probe[:, None] * stride_qn + channel[None, :], mask=is_channel, other=0.0)
    kv_head = (h // group).to(tl.int64)
    k_start, v_start = k_ptr + b * stride_kb + kv_head * stride_kh, v_ptr + b * stride_vb + kv_head * stride_vh
    largest = tl.full([_PROBES], float("-inf"), tl.float32)
    total = tl.zeros([_PROBES], tl.float32)
    sums = tl.zeros([_PROBES, WIDTH], tl.float32)
    begin = number * chunk
    for start in range(begin, tl.minimum(begin + chunk, keys), _TILE):
        token = start + tl.arange(0, _TILE)
        valid = token < keys
        row = token.to(tl.int64)[:, None]
        there = valid[:, None] & is_channel
        k = tl.load(k_start + row * stride_kn + channel[None, :], mask=there, other=0.0)
        v = tl.load(v_start + row * stride_vn + channel[None, :], mask=there, other=0.0)
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + b * stride_mask + token, mask=valid, other=0) != 0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        s = tl.where(valid[None, :], s, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, 1))
        safe = tl.where(larger == float("-inf"), 0.0, larger)  # where every key so far is hidden
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(largest - safe)
        total = total * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        largest = larger
    at = place.to(tl.int64) * tl.num_programs(0) + number
    probe = tl.arange(0, _PROBES)
    tl.store(sums_ptr + (at * _PROBES + probe[:, None]) * WIDTH + channel[None, :], sums)
    tl.store(limits_ptr + at * 2 * _PROBES + probe, largest)
    tl.store(limits_ptr + (at * 2 + 1) * _PROBES + probe, total)


@triton.jit
def _found(start, row, n, c, CHANNELS: tl.constexpr):
    """Outputs of the probes in 64 channels from c on."""
    channel = c + tl.arange(0, _TILE)
    found = tl.load(start + row[:, None] * n + channel[None, :], mask=(channel < CHANNELS)[None, :], other=0.0)
    return found.to(tl.float32)


@triton.jit
def _in_units(found):
    """Outputs about their means, in units of their deviation; the deviations; the means."""
    mean = tl.sum(found, 0) / _PROBES
    centred = found - mean[None, :]
    deviation = tl.maximum(tl.sqrt(tl.sum(centred * centred, 0) / _PROBES), TINY)
    return centred / deviation[None, :], deviation, mean


@triton.jit(do_not_specialize=["tiles"])
def fit_map(
    out_ptr, sums_ptr, limits_ptr, weights_ptr, moved_ptr, stride_ob, stride_oh, stride_on,
    heads, first, count, chunks, tiles, ridge,
    STEP: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, ROUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """64 columns of a head's map, weights [WIDTH, WIDTH] and moved [WIDTH], in tiles of 64 x 64.

    Programs of the same head each solve its system, at the same time.

    CHUNKS: a power of two, at least `chunks`.
    tiles: WIDTH / 64, which is no constant: loops of one round are unrolled then, which Triton 3.6 cannot compile for
    Blackwell.
    """
    c, place = tl.program_id(0) * _TILE, tl.program_id(1)
    b, h = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    probe = tl.arange(0, _PROBES)
    row = _probes(count, STEP) + first
    start = out_ptr + b * stride_ob + h * stride_oh
    one = tl.where(probe[:, None] == probe[None, :], 1.0, 0.0)
    system = one * ridge
    for tile in range(tiles):
        units, deviation, found_mean = _in_units(_found(start, row, stride_on, tile * _TILE, CHANNELS))
        system += tl.dot(units, tl.trans(units), input_precision=PRECISION)
    # Newton's iteration for the inverse: no pivots, no square roots, products only. A round squares the error, which is
    # positive then; a factor puts it about zero again, which saves a third of the rounds. The largest eigenvalue is at
    # most the largest sum of a row and at most the trace, of which the sum may be twice as much.
    most = tl.minimum(tl.max(tl.sum(tl.abs(system), 1), 0), ridge + _PROBES * CHANNELS)
    inverse = one * (2.0 / (ridge + most))
    squared = (most - ridge) / (most + ridge)
    squared *= squared
    for _round in range(ROUNDS):
        left = 2.0 * one - tl.dot(system, inverse, input_precision=PRECISION)
        inverse = tl.dot(inverse, left, input_precision=PRECISION) * (2.0 / (2.0 - squared))
        squared = squared / (2.0 - squared)
        squared *= squared

    chunk = tl.arange(0, CHUNKS)
    at = place.to(tl.int64) * chunks
    limits = limits_ptr + (at + chunk[:, None]) * (2 * _PROBES) + probe[None, :]
    there = (chunk < chunks)[:, None]
    each = tl.load(limits, mask=there, other=float("-inf"))
    largest = tl.max(each, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # where every key is hidden, and rows are zeros
    total = tl.sum(tl.load(limits + _PROBES, mask=there, other=0.0) * tl.exp2(each - largest[None, :]), 0)
    total = tl.where(total == 0, 1.0, total)
    channel = c + tl.arange(0, _TILE)
    exact = tl.zeros([_PROBES, _TILE], tl.float32)
    for number in tl.range(chunks, num_stages=4):
        share = tl.exp2(tl.load(limits_ptr + (at + number) * (2 * _PROBES) + probe) - largest) / total
        sums = sums_ptr + ((at + number) * _PROBES + probe[:, None]) * WIDTH + channel[None, :]
        exact += tl.load(sums) * share[:, None]
    missed = exact - _found(start, row, stride_on, c, CHANNELS)
    mean = tl.sum(missed, 0) / _PROBES
    solved = tl.dot(inverse, missed - mean[None, :], input_precision=PRECISION)
    moved = mean
    for other in range(tiles):
        r = other * _TILE
        units, deviation, found_mean = _in_units(_found(start, row, stride_on, r, CHANNELS))
        weights = tl.dot(tl.trans(units), solved, input_precision=PRECISION) / deviation[:, None]
        moved -= tl.sum(weights * found_mean[:, None], 0)
        to = weights_ptr + (place.to(tl.int64) * WIDTH + r + probe[:, None]) * WIDTH + channel[None, :]
        tl.store(to, weights.to(weights_ptr.dtype.element_ty))
    tl.store(moved_ptr + place.to(tl.int64) * WIDTH + channel, moved)


@triton.jit
def apply_map(
    out_ptr, weights_ptr, moved_ptr, stride_ob, stride_oh, stride_on, heads, first, count,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows and their image under the map, in place; of many rows, with weights loaded once, if COLUMNS is WIDTH.

    Otherwise weights of COLUMNS channels are loaded at a time.
    """
    place = tl.program_id(1)
    b, h = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    is_channel = (channel < CHANNELS)[None, :]
    base = place.to(tl.int64) * WIDTH
    if COLUMNS == WIDTH:
        weights = tl.load(weights_ptr + (base + channel[:, None]) * WIDTH + channel[None, :])
        moved = tl.load(moved_ptr + base + channel)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(count, _TILE), tl.num_programs(0)):
        row = tile * _TILE + tl.arange(0, _TILE)
        is_row = (row < count)[:, None]
        start = out_ptr + b * stride_ob + h * stride_oh + (row + first).to(tl.int64)[:, None] * stride_on
        rows = tl.load(start + channel[None, :], mask=is_row & is_channel, other=0.0)
        if COLUMNS == WIDTH:
            image = tl.dot(rows, weights, input_precision=PRECISION) + moved
            found = (rows.to(tl.float32) + image).to(out_ptr.dtype.element_ty)
            tl.store(start + channel[None, :], found, mask=is_row & is_channel)
        else:
            for c in tl.static_range(0, WIDTH, COLUMNS):
                column = c + tl.arange(0, COLUMNS)
                some = tl.load(weights_ptr + (base + channel[:, None]) * WIDTH + column[None, :])
                image = tl.dot(rows, some, input_precision=PRECISION) + tl.load(moved_ptr + base + column)[None, :]
                mask = is_row & (column < CHANNELS)[None, :]
                own = tl.load(start + column[None, :], mask=mask, other=0.0).to(tl.float32)
                tl.store(start + column[None, :], (own + image).to(out_ptr.dtype.element_ty), mask=mask)
