"""Calibration's kernels: sums of blocks of softmax(q k^T), and what leaving blocks out does to the output.

`row_lse` and `block_sums` take tensors as they are. For the others, a program takes 64 chosen rows of a head:
q [heads, tiles * 64, D] and k, v [heads, kv blocks * 64, D] are in the head's order, with zeros after their ends. Rows
that do not exist have lse = inf, so that their P is zero. Names are those of `paroattn.calibration.costs`.
"""

import triton
import triton.language as tl

from paroattn.ops.gpu.rows import BLOCK_KV, masked_logits


@triton.jit
def _rows(x_ptr, row, tokens, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Rows [64, D] of x [N, HEAD_DIM], zeros beyond it."""
    channel = tl.arange(0, D)
    mask = (row < tokens)[:, None] & (channel < HEAD_DIM)[None, :]
    return tl.load(x_ptr + row.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :], mask=mask, other=0.0)


@triton.jit
def row_lse(q_ptr, k_ptr, lse_ptr, scale, tokens, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Log2 of the sum of 2^logit of 64 rows; grid (q blocks,); lse float32 [N]."""
    row = tl.program_id(0) * BLOCK_KV + tl.arange(0, BLOCK_KV)
    q = _rows(q_ptr, row, tokens, HEAD_DIM, D)
    maximum = tl.full([BLOCK_KV], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_KV], tl.float32)
    for start in range(0, tokens, BLOCK_KV):
        column = start + tl.arange(0, BLOCK_KV)
        s = masked_logits(q, _rows(k_ptr, column, tokens, HEAD_DIM, D), column < tokens, scale)
        new_maximum = tl.maximum(maximum, tl.max(s, 1))
        total = total * tl.math.exp2(maximum - new_maximum) + tl.sum(tl.math.exp2(s - new_maximum[:, None]), 1)
        maximum = new_maximum
    tl.store(lse_ptr + row, maximum + tl.math.log2(total), mask=row < tokens)


@triton.jit
def block_sums(q_ptr, k_ptr, lse_ptr, sums_ptr, scale, tokens, blocks, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """One row of blocks in one order; grid (q blocks, orders).

    q, k [orders, N, HEAD_DIM] and lse [orders, N] in each order; sums float32 [orders, blocks, blocks].
    """
    block, order = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q_ptr += order * tokens * HEAD_DIM
    k_ptr += order * tokens * HEAD_DIM
    sums_ptr += (order * blocks + block) * blocks
    row = block * BLOCK_KV + tl.arange(0, BLOCK_KV)
    q = _rows(q_ptr, row, tokens, HEAD_DIM, D)
    # Rows beyond the sequence add nothing.
    lse = tl.load(lse_ptr + order * tokens + row, mask=row < tokens, other=float("inf"))
    for number in range(0, blocks):
        column = number * BLOCK_KV + tl.arange(0, BLOCK_KV)
        s = masked_logits(q, _rows(k_ptr, column, tokens, HEAD_DIM, D), column < tokens, scale)
        p = tl.math.exp2(s - lse[:, None])
        tl.store(sums_ptr + number, tl.sum(p))


@triton.jit
def _tile(x_ptr, block, D: tl.constexpr):
    """64 rows of x [..., D]."""
    row = block * BLOCK_KV + tl.arange(0, BLOCK_KV)
    return tl.load(x_ptr + row[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def _logits(q, k_ptr, block, tokens, scale, D: tl.constexpr):
    """Logits [64, 64] of a kv block in powers of two, -inf beyond the sequence."""
    column = block * BLOCK_KV + tl.arange(0, BLOCK_KV)
    return masked_logits(q, _tile(k_ptr, block, D), column < tokens, scale)


@triton.jit
def _rounded(p, v_ptr, ROUNDED: tl.constexpr):
    """P as it is multiplied: in the values' format, if that is asked for."""
    return p.to(v_ptr.dtype.element_ty).to(tl.float32) if ROUNDED else p


@triton.jit
def _weighted(p, v, ROUNDED: tl.constexpr):
    """P V, float32; 16-bit values are multiplied by P in two parts of 16 bits, or by a rounded P in one."""
    high = p.to(v.dtype)
    if v.dtype == tl.float32:
        return tl.dot(p, v, input_precision="ieee")
    elif ROUNDED:
        return tl.dot(high, v)
    else:
        low = (p - high.to(tl.float32)).to(v.dtype)
        return tl.dot(high, v, tl.dot(low, v))  # in the other order registers would spill on sm90


@triton.jit
def _head(q_ptr, k_ptr, v_ptr, lse_ptr, output_ptr, tokens, D: tl.constexpr):
    """Pointers to the program's head in each."""
    head, padded = tl.program_id(1).to(tl.int64), tl.num_programs(0) * BLOCK_KV
    kv_padded = tl.cdiv(tokens, BLOCK_KV) * BLOCK_KV
    return (
        q_ptr + head * padded * D,
        k_ptr + head * kv_padded * D,
        v_ptr + head * kv_padded * D,
        lse_ptr + head * padded,
        output_ptr + head * padded * D,
    )


@triton.jit
def attend_rows(q_ptr, k_ptr, v_ptr, lse_ptr, output_ptr, scale, tokens, rows, D: tl.constexpr, ROUNDED: tl.constexpr):
    """Log2 of the rows' sums of 2^logit, and their output; grid (tiles of 64 rows, heads).

    lse float32 [heads, tiles * 64], output float32 [heads, tiles * 64, D].
    """
    q_ptr, k_ptr, v_ptr, lse_ptr, output_ptr = _head(q_ptr, k_ptr, v_ptr, lse_ptr, output_ptr, tokens, D)
    row = tl.program_id(0) * BLOCK_KV + tl.arange(0, BLOCK_KV)
    q = _tile(q_ptr, tl.program_id(0), D)
    maximum = tl.full([BLOCK_KV], -1.0e30, tl.float32)
    total, weights = tl.zeros([BLOCK_KV], tl.float32), tl.zeros([BLOCK_KV], tl.float32)
    acc = tl.zeros([BLOCK_KV, D], tl.float32)
    for block in range(0, tl.cdiv(tokens, BLOCK_KV)):
        s = _logits(q, k_ptr, block, tokens, scale, D)
        new_maximum = tl.maximum(maximum, tl.max(s, 1))
        p = tl.math.exp2(s - new_maximum[:, None])
        moved = tl.math.exp2(maximum - new_maximum)
        total = total * moved + tl.sum(p, 1)
        # The output is a mean of values: it is divided by what they were multiplied by.
        weights = weights * moved + tl.sum(_rounded(p, v_ptr, ROUNDED), 1)
        acc = acc * moved[:, None] + _weighted(p, _tile(v_ptr, block, D), ROUNDED)
        maximum = new_maximum
    exists = row < rows
    tl.store(lse_ptr + row, tl.where(exists, maximum + tl.math.log2(total), float("inf")))
    output = tl.where(exists[:, None], acc / weights[:, None], 0.0)
    tl.store(output_ptr + row[:, None] * D + tl.arange(0, D)[None, :], output)


@triton.jit
def _costs(p, share, surrogate, output, v_ptr, mean_v_ptr, block, channel, D: tl.constexpr, ROUNDED: tl.constexpr):
    """Squares of what a kv block takes from some channels of each row's output, dropped and approximated."""
    row = block * BLOCK_KV + tl.arange(0, BLOCK_KV)
    v = tl.load(v_ptr + row[:, None] * D + channel[None, :])
    change = _weighted(p, v, ROUNDED) - share[:, None] * output
    mean_v = tl.load(mean_v_ptr + block * D + channel)
    residual = change - surrogate[:, None] * (mean_v[None, :] - output)
    return tl.sum(change * change, 1), tl.sum(residual * residual, 1)


@triton.jit
def block_costs(
    q_ptr, k_ptr, v_ptr, lse_ptr, output_ptr, surrogate_ptr, mean_v_ptr, parts_ptr, scale, tokens,
    D: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Each row's part of the sums of P and of the costs of skipping each kv block; grid (tiles, heads).

    surrogate float32 [heads, kv blocks, tiles * 64], mean_v float32 [heads, kv blocks, D]; parts float32 [heads, kv
    blocks, 3, tiles * 64]: sums of P, then squares of both ways. Sums over rows would keep warps waiting, and all
    channels at once take more registers than there are.
    """
    q_ptr, k_ptr, v_ptr, lse_ptr, output_ptr = _head(q_ptr, k_ptr, v_ptr, lse_ptr, output_ptr, tokens, D)
    tile, padded, head = tl.program_id(0), tl.num_programs(0) * BLOCK_KV, tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(tokens, BLOCK_KV)
    surrogate_ptr += head * blocks * padded
    parts_ptr += head * blocks * padded * 3
    mean_v_ptr += head * blocks * D
    row, low = tile * BLOCK_KV + tl.arange(0, BLOCK_KV), tl.arange(0, D // 2)
    high = low + D // 2
    q = _tile(q_ptr, tl.program_id(0), D)
    lse = tl.load(lse_ptr + row)
    if D <= 128:
        output_low = tl.load(output_ptr + row[:, None] * D + low[None, :])
        output_high = tl.load(output_ptr + row[:, None] * D + high[None, :])
    for block in range(0, blocks):
        p = _rounded(tl.math.exp2(_logits(q, k_ptr, block, tokens, scale, D) - lse[:, None]), v_ptr, ROUNDED)
        share = tl.sum(p, 1)
        first = tl.cast(block, tl.int64) * padded
        surrogate = tl.load(surrogate_ptr + first + row)
        if D <= 128:
            dropped, approximated = _costs(p, share, surrogate, output_low, v_ptr, mean_v_ptr, block, low, D, ROUNDED)
            more_dropped, more_approximated = _costs(
                p, share, surrogate, output_high, v_ptr, mean_v_ptr, block, high, D, ROUNDED
            )
            dropped += more_dropped
            approximated += more_approximated
        else:  # no registers are left for the output, or for several parts at once, as unrolled loops have them
            dropped, approximated = tl.zeros([BLOCK_KV], tl.float32), tl.zeros([BLOCK_KV], tl.float32)
            for start in tl.range(0, D, 64, num_stages=1):
                channel = start + tl.arange(0, 64)
                output = tl.load(output_ptr + row[:, None] * D + channel[None, :])
                more_dropped, more_approximated = _costs(
                    p, share, surrogate, output, v_ptr, mean_v_ptr, block, channel, D, ROUNDED
                )
                dropped += more_dropped
                approximated += more_approximated
        part_ptr = parts_ptr + first * 3 + row
        tl.store(part_ptr, share)
        tl.store(part_ptr + padded, dropped)
        tl.store(part_ptr + 2 * padded, approximated)


@triton.jit
def kept_errors(
    q_ptr, k_ptr, v_ptr, lse_ptr, output_ptr, surrogate_ptr, mean_v_ptr, start_ptr, taken_ptr,
    lists_ptr, ends_ptr, wanted_ptr, errors_ptr, scale, tokens, rows, tiles_per_block,
    D: tl.constexpr,
):  # fmt: skip
    """Squared change of the rows' output when only the first blocks of a list are kept; grid (tiles, heads, 2 ways).

    start float32 [heads, tiles * 64, D] and taken [heads, tiles * 64]: the output's sums with every block approximated,
    where the second way starts; lists int32 [2, heads, q blocks, kv blocks], of which the first `ends` [2, heads, q
    blocks] are kept in the end; wanted uint8 like lists: after which of them the change is to be found; errors float32
    [2, heads, tiles, kv blocks], written there.
    """
    q_ptr, k_ptr, v_ptr, lse_ptr, output_ptr = _head(q_ptr, k_ptr, v_ptr, lse_ptr, output_ptr, tokens, D)
    tile, tiles, head, way = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    blocks = tl.cdiv(tokens, BLOCK_KV)
    surrogate_ptr += head * blocks * tiles * BLOCK_KV
    mean_v_ptr += head * blocks * D
    row, channel = tile * BLOCK_KV + tl.arange(0, BLOCK_KV), tl.arange(0, D)
    q = _tile(q_ptr, tl.program_id(0), D)
    lse = tl.load(lse_ptr + row)
    at = row[:, None] * D + channel[None, :]
    if D <= 128:
        output = tl.load(output_ptr + at)
    approximated = (way == 1).to(tl.float32)
    acc = tl.load(start_ptr + head * tiles * BLOCK_KV * D + at) * approximated
    total = tl.load(taken_ptr + head * tiles * BLOCK_KV + row) * approximated
    way_and_head = way * tl.num_programs(1) + head
    list_row = way_and_head * (tiles // tiles_per_block) + tile // tiles_per_block
    end = tl.load(ends_ptr + list_row)
    list_row *= blocks
    # One loop, not one per level within another over the levels: Triton 3.6 compiled that wrongly for sm90.
    for number in range(0, end):
        block = tl.load(lists_ptr + list_row + number)
        p = tl.math.exp2(_logits(q, k_ptr, block, tokens, scale, D) - lse[:, None])
        surrogate = tl.load(surrogate_ptr + block.to(tl.int64) * (tiles * BLOCK_KV) + row) * approximated
        mean_v = tl.load(mean_v_ptr + block * D + channel)
        part = _weighted(p, _tile(v_ptr, block, D), False)
        acc += part - surrogate[:, None] * mean_v[None, :]
        total += tl.sum(p, 1) - surrogate
        if tl.load(wanted_ptr + list_row + number) != 0:
            if D > 128:  # no registers are left to hold it
                output = tl.load(output_ptr + at)
            moved = tl.where((row < rows)[:, None], acc / tl.maximum(total, 1.0e-6)[:, None] - output, 0.0)
            tl.store(errors_ptr + (way_and_head * tiles + tile) * blocks + number, tl.sum(moved * moved))
