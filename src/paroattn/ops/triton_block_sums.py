"""The kernels of `triton_calibration`: log-sum-exp of rows and sums of blocks of softmax(q k^T)."""

import triton
import triton.language as tl

from paroattn.ops.triton_rows import BLOCK_KV, masked_logits


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
