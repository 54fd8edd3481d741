"""Device functions that the Triton kernels share: rows of q, k, v in a head's order, logits, and rounding."""

import triton
import triton.language as tl

BLOCK_KV = tl.constexpr(64)
LOG2_E = tl.constexpr(1.4426950408889634)
INT8_MAX = tl.constexpr(127.0)
FP8_MAX = tl.constexpr(448.0)  # of e4m3
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32: no scale is zero
_ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits


@triton.jit
def stored_token(row, SWAPPED: tl.constexpr):
    """Which token of a block a row of its packed keys holds.

    With SWAPPED, bits 3 to 0 of the row, g t1 t0 b, are bits t1 t0 g b of the token. The product QK^T then leaves each
    thread four columns of P that are neighbours among the tokens: what an 8-bit operand of PV needs from it.
    """
    if SWAPPED:
        low = row % 16
        return row - low + ((low // 2) % 4) * 4 + (low // 8) * 2 + low % 2
    else:
        return row


@triton.jit
def load_tokens(order_ptr, order_index_ptr, h, tokens, position, valid):
    """Which tokens stand at positions of head h: order [H, N], or a table with order_index [H]; 0 where not valid."""
    if order_index_ptr is not None:
        h = tl.load(order_index_ptr + h)
    return tl.load(order_ptr + h.to(tl.int64) * tokens + position, mask=valid, other=0)


@triton.jit
def number_of_mask(mask_index_ptr, bucket_ptr, h, heads):
    """Which mask head h has: number h, or with mask_index [step buckets, heads] what stands there for the bucket."""
    if mask_index_ptr is not None:
        h = tl.load(mask_index_ptr + tl.load(bucket_ptr) * heads + h)
    return h


@triton.jit
def load_rows(x_ptr, stride_n, tokens, valid, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Rows [R, D] of x [N, HEAD_DIM] at `tokens` [R], float32; zeros where `valid` [R] is false and beyond HEAD_DIM."""
    channel = tl.arange(0, D)
    start = x_ptr + tokens.to(tl.int64)[:, None] * stride_n
    if HEAD_DIM == D:
        mask = valid[:, None]
    else:
        mask = valid[:, None] & (channel < HEAD_DIM)[None, :]
    return tl.load(start + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def masked_logits(q, k, valid, scale):
    """Logits of queries and keys [64, D] in powers of two, -inf in columns that are not valid."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
    return tl.where(valid[None, :], s, float("-inf"))


@triton.jit
def to_int8(x):
    """The nearest int8 of float32 x in [-127, 127], ties to even."""
    return (x + _ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def quantize_tile(x):
    """A tile [64, D] float32 as int8 with one scale: values and scale."""
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0) / INT8_MAX, TINY)
    return to_int8(x / scale), scale
