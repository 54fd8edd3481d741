"""The kernels of `triton_calibration.skip_costs`: attention of chosen rows, and what leaving blocks out does to it.

All take one head, its keys and values in the head's order and 64 chosen rows per program. Rows that do not exist have
lse = inf, so that their P is zero.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(x_ptr, row, limit, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Rows [64, D] of x [N, HEAD_DIM], zeros beyond it."""
    channel = tl.arange(0, D)
    mask = (row < limit)[:, None] & (channel < HEAD_DIM)[None, :]
    return tl.load(x_ptr + row.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _logits(q, k_ptr, block, tokens, scale, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Logits [64, 64] of a kv block in powers of two, -inf beyond the sequence."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    k = _tile(k_ptr, column, tokens, HEAD_DIM, D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
    return tl.where((column < tokens)[None, :], s, float("-inf"))


@triton.jit
def _part(p, v_ptr, block, tokens, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """P V of a kv block, [64, D] float32; 16-bit values are multiplied by P in two parts of 16 bits."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    v = _tile(v_ptr, column, tokens, HEAD_DIM, D)
    if v.dtype == tl.float32:
        return tl.dot(p, v, input_precision="ieee")
    else:
        high = p.to(v.dtype)
        low = (p - high.to(tl.float32)).to(v.dtype)
        return tl.dot(high, v, tl.dot(low, v))  # in the other order registers would spill on sm90


@triton.jit
def attend_rows(
    q_ptr, k_ptr, v_ptr, lse_ptr, output_ptr, scale, tokens, rows,
    HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Log2 of the rows' sums of 2^logit, and their output; grid (tiles of 64 rows,).

    q [rows, HEAD_DIM], k, v [N, HEAD_DIM]; lse float32 [tiles * 64], output float32 [tiles * 64, D].
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    q = _tile(q_ptr, row, rows, HEAD_DIM, D)
    maximum = tl.full([BLOCK], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for block in range(0, tl.cdiv(tokens, BLOCK)):
        s = _logits(q, k_ptr, block, tokens, scale, HEAD_DIM, D)
        new_maximum = tl.maximum(maximum, tl.max(s, 1))
        p = tl.math.exp2(s - new_maximum[:, None])
        weight = tl.math.exp2(maximum - new_maximum)
        total = total * weight + tl.sum(p, 1)
        acc = acc * weight[:, None] + _part(p, v_ptr, block, tokens, HEAD_DIM, D)
        maximum = new_maximum
    exists = row < rows
    tl.store(lse_ptr + row, tl.where(exists, maximum + tl.math.log2(total), float("inf")))
    output = tl.where(exists[:, None], acc / total[:, None], 0.0)
    tl.store(output_ptr + row[:, None] * D + tl.arange(0, D)[None, :], output)


@triton.jit
def block_costs(
    q_ptr, k_ptr, v_ptr, lse_ptr, output_ptr, surrogate_ptr, mean_v_ptr, sums_ptr, costs_ptr, scale, tokens, rows,
    HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sums of P and costs of skipping each kv block; grid (tiles,); names as in `calibration.skip_cost`.

    surrogate float32 [kv blocks, tiles * 64], mean_v float32 [kv blocks, D]; sums float32 [tiles, kv blocks], costs
    [2, tiles, kv blocks].
    """
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    row, channel = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    q = _tile(q_ptr, row, rows, HEAD_DIM, D)
    lse = tl.load(lse_ptr + row)
    output = tl.load(output_ptr + row[:, None] * D + channel[None, :])
    blocks = tl.cdiv(tokens, BLOCK)
    for block in range(0, blocks):
        p = tl.math.exp2(_logits(q, k_ptr, block, tokens, scale, HEAD_DIM, D) - lse[:, None])
        share = tl.sum(p, 1)
        change = _part(p, v_ptr, block, tokens, HEAD_DIM, D) - share[:, None] * output
        surrogate = tl.load(surrogate_ptr + block * (tiles * BLOCK) + row)
        mean_v = tl.load(mean_v_ptr + block * D + channel)
        residual = change - surrogate[:, None] * (mean_v[None, :] - output)
        at = tile * blocks + block
        tl.store(sums_ptr + at, tl.sum(p))
        tl.store(costs_ptr + at, tl.sum(change * change))
        tl.store(costs_ptr + tiles * blocks + at, tl.sum(residual * residual))


@triton.jit
def kept_errors(
    q_ptr, k_ptr, v_ptr, lse_ptr, output_ptr, surrogate_ptr, mean_v_ptr, start_ptr, taken_ptr,
    lists_ptr, ends_ptr, wanted_ptr, errors_ptr, scale, tokens, rows, tiles_per_block,
    HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Squared change of the rows' output when only the first blocks of a list are kept; grid (tiles, 2 ways to skip).

    start float32 [tiles * 64, D] and taken [tiles * 64]: the output's sums with every block approximated, used by the
    second way; lists int32 [2, q blocks, kv blocks], of which the first `ends` [2, q blocks] are kept in the end; wanted
    uint8 like lists: after which of them the change is to be found; errors float32 [2, tiles, kv blocks], written there.
    """
    tile, tiles, way = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    row, channel = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    q = _tile(q_ptr, row, rows, HEAD_DIM, D)
    lse = tl.load(lse_ptr + row)
    at = row[:, None] * D + channel[None, :]
    output = tl.load(output_ptr + at)
    approximated = (way == 1).to(tl.float32)
    acc = tl.load(start_ptr + at) * approximated
    total = tl.load(taken_ptr + row) * approximated
    blocks = tl.cdiv(tokens, BLOCK)
    list_row = way * (tiles // tiles_per_block) + tile // tiles_per_block
    end = tl.load(ends_ptr + list_row)
    list_row *= blocks
    for number in range(0, end):
        block = tl.load(lists_ptr + list_row + number)
        p = tl.math.exp2(_logits(q, k_ptr, block, tokens, scale, HEAD_DIM, D) - lse[:, None])
        surrogate = tl.load(surrogate_ptr + block * (tiles * BLOCK) + row) * approximated
        mean_v = tl.load(mean_v_ptr + block * D + channel)
        part = _part(p, v_ptr, block, tokens, HEAD_DIM, D)
        acc += part - surrogate[:, None] * mean_v[None, :]
        total += tl.sum(p, 1) - surrogate
        if tl.load(wanted_ptr + list_row + number) != 0:
            moved = tl.where((row < rows)[:, None], acc / tl.maximum(total, 1.0e-6)[:, None] - output, 0.0)
            tl.store(errors_ptr + (way * tiles + tile) * blocks + number, tl.sum(moved * moved))
