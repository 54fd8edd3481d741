"""The block-sparse attention forward in Triton: one program attends one block of queries of one head.

It walks over the row's list of kept blocks with an online softmax in powers of two (`_units`). Whole blocks, one or two
per step, need no mask; what remains of the list, the partial last block among it, goes through masked steps, as does
everything when there is a key mask. Blocks of mean tokens follow where skipped blocks are
compensated. Packed keys and values come from prologue.py; docs/gpu-design.md has the layouts and why they are so.
"""

import triton
import triton.language as tl

from paroattn.ops.gpu.rows import BLOCK_KV, load_tokens, number_of_mask, stored_token, to_int8

LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e30)  # the maximum before any block; not -inf, whose differences are NaN
LEAST_INT = tl.constexpr(-(2**31))
RANGE = tl.constexpr(60.0)  # how far, as a power of two, a step's unit may lie below the largest logit so far


@triton.jit
def _p_exponent(PV: tl.constexpr):
    """Log2 of the factor P carries so that it fills its format: 127 steps of int8, 256 of e4m3's 448."""
    if PV == "int8":
        return 6.988684686772166
    elif PV == "fp8":
        return 8.0
    else:
        return 0.0


@triton.jit
def _pack_int8(p, ASM: tl.constexpr):
    """P in [0, 127] rounded to int8; the assembly converts and packs two numbers in one instruction."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .s32 a, b, c, d;
            .reg .b32 upper;
            cvt.rni.s32.f32 a, $1;
            cvt.rni.s32.f32 b, $2;
            cvt.rni.s32.f32 c, $3;
            cvt.rni.s32.f32 d, $4;
            cvt.pack.sat.s8.s32.b32 upper, d, c, 0;
            cvt.pack.sat.s8.s32.b32 $0, b, a, upper;
            }""",
            "=r,f,f,f,f",
            [p],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return to_int8(p)


@triton.jit
def _cast(x, FORMAT: tl.constexpr):
    if FORMAT == "fp16":
        return x.to(tl.float16)
    elif FORMAT == "bf16":
        return x.to(tl.bfloat16)
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def _operand(p, BLOCK_Q: tl.constexpr, WIDTH: tl.constexpr, PV: tl.constexpr, SWAPPED: tl.constexpr, ASM: tl.constexpr):
    """P [BLOCK_Q, WIDTH] float32, columns as stored, as the left operand of PV, columns in the order of the tokens."""
    if SWAPPED:  # a renaming of registers
        p = tl.reshape(p, (BLOCK_Q, WIDTH // 16, 2, 4, 2))
        p = tl.reshape(tl.permute(p, (0, 1, 3, 2, 4)), (BLOCK_Q, WIDTH))
    if PV == "int8":
        return _pack_int8(p, ASM)
    else:
        return _cast(p, PV)


@triton.jit
def _units(unit, highest, step_maximum):
    """The unit of the next sums, the largest logit so far, and the weight of the sums so far in the new unit.

    Sums are kept in units of 2^(the step's own row maximum), not of the running maximum: P then uses all steps of its
    format in every block, at no cost, since the sums are weighted in each step anyway. RANGE keeps them finite; a step
    that lies further below the largest logit adds nothing.
    """
    highest = tl.maximum(highest, step_maximum)
    new_unit = tl.maximum(step_maximum, highest - RANGE)
    return new_unit, highest, tl.math.exp2(unit - new_unit)


@triton.jit
def _step(
    acc, total, unit, highest, q, q_factor, k_ptr, v_ptr, k_scale_ptr, block0, block1, bias, v_scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, WIDTH: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr,
    MASKED: tl.constexpr, SCALED: tl.constexpr, SWAPPED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Attend block0, with WIDTH 128 also block1: two kept blocks, gathered into one tile, share products and unit.

    With MASKED, bias [WIDTH] is added to the logits; with SCALED, v_scale goes with the values.
    """
    column, channel = tl.arange(0, WIDTH), tl.arange(0, D)
    block = tl.where(column < BLOCK_KV, block0, block1)
    start, within = block * (BLOCK_KV * D), column % BLOCK_KV
    keys = tl.load(k_ptr + start[None, :] + within[None, :] * D + channel[:, None])
    if QK == "int8":
        products = tl.dot(q, keys, out_dtype=tl.int32)
        scale0, scale1 = tl.load(k_scale_ptr + block0), tl.load(k_scale_ptr + block1)
        factor = q_factor[:, None] * tl.where(column < BLOCK_KV, scale0, scale1)[None, :]
    else:
        products = tl.dot(q, keys)
        factor = q_factor[:, None]

    if MASKED:
        logits = products.to(tl.float32) * factor + bias[None, :]
        unit, highest, weight = _units(unit, highest, tl.max(logits, 1))
        p = tl.math.exp2(logits - (unit - _p_exponent(PV))[:, None])
    else:
        # Factors are above zero: the largest product of a block is the largest logit, and maxima of integers are cheap.
        if QK == "int8" and WIDTH == 128:
            maximum0 = tl.max(tl.where(column[None, :] < BLOCK_KV, products, LEAST_INT), 1).to(tl.float32)
            maximum1 = tl.max(tl.where(column[None, :] < BLOCK_KV, LEAST_INT, products), 1).to(tl.float32)
            step_maximum = tl.maximum(maximum0 * scale0, maximum1 * scale1) * q_factor
        elif QK == "int8":
            step_maximum = tl.max(products, 1).to(tl.float32) * (q_factor * scale0)
        else:
            step_maximum = tl.max(products, 1) * q_factor
        unit, highest, weight = _units(unit, highest, step_maximum)
        p = tl.math.exp2(products.to(tl.float32) * factor - (unit - _p_exponent(PV))[:, None])

    operand = _operand(p, BLOCK_Q, WIDTH, PV, SWAPPED, ASM)
    if PV == "int8" or PV == "fp8":  # stored transposed
        values = tl.load(v_ptr + start[:, None] + channel[None, :] * BLOCK_KV + within[:, None])
    else:
        values = tl.load(v_ptr + start[:, None] + within[:, None] * D + channel[None, :])
    if PV == "int8":
        product = tl.dot(operand, values, out_dtype=tl.int32).to(tl.float32)
    else:
        product = tl.dot(operand, values)
    # A sum of its own: what tensor cores add in fp8 has less than float32's precision. The order saves registers.
    acc = acc * weight[:, None] + (product * v_scale if SCALED else product)
    total = total * weight + tl.sum(p, 1)
    return acc, total, unit, highest


@triton.jit
def _kept_block(indices_ptr, number, count, LISTED: tl.constexpr):
    """Which block is number `number` of a row's `count`; all are kept where there is no list."""
    if LISTED:
        return tl.load(indices_ptr + number, mask=number < count, other=0)
    else:
        return number


# Compiled once for all of them.
_SIZES = ["batch", "heads", "group", "tokens", "slots", "q_blocks", "kv_blocks", "mean_blocks"]
_SIZES += ["mask_bytes", "stride_mask", "parts"]


@triton.jit(do_not_specialize=_SIZES)
def attention_forward(
    q_ptr, k_ptr, v_ptr, output_ptr, lse_ptr, heads_ptr, order_ptr, order_index_ptr,
    q_factor_ptr, lse_shift_ptr, k_scale_ptr, v_mean_ptr, v_scale_ptr, bias_ptr,
    slots_ptr, rows_ptr, counts_ptr, indices_ptr,
    compensate_ptr, mask_ptr, mask_index_ptr, bucket_ptr,
    mean_k_ptr, mean_k_scale_ptr, mean_v_ptr, mean_v_scale_ptr, mean_bias_ptr,
    visited_ptr,
    stride_ob, stride_oh, stride_on, stride_mask,
    batch, heads, group, tokens, slots, q_blocks, parts, kv_blocks, mean_blocks, mask_bytes,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr,
    WIDTH: tl.constexpr, SWAPPED: tl.constexpr, ASM: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one block of queries; the grid is `batch * slots * q_blocks` programs, the heaviest first.

    A slot is a head of this launch: heads[slot] is its number, and packed tensors count by slot. Pointers that a call
    does not need are None.

    q: packed queries [B * slots, q_blocks, BLOCK_Q, D]; q_factor float32 [B * slots, q_blocks * BLOCK_Q / 64], which
    turns products into logits in powers of two; lse_shift float32 [B * slots, q_blocks * BLOCK_Q], for lse, if int8.
    k: packed keys [B * slots, kv_blocks, 64, D]; k_scale [B * slots, kv_blocks] if int8.
    v: packed values [B * slots, kv_blocks, 64, D], or [..., D, 64] if 8-bit, with v_mean, v_scale [B, H / group, D].
    bias [B * slots, kv_blocks * 64]: 0 or -inf, as the keys are stored.
    output [B, H, N, HEAD_DIM] by strides; lse [B, H, N]; order [H, N], or a table with order_index.
    A row of the mask is for `parts` programs. slots, rows [slots, mask rows]: what the programs take in turn; counts,
    indices: `prologue.kept_lists`.
    compensate bool [H], mask uint8 [H, mask rows, mask_bytes], or tables with mask_index and bucket
    (`rows.number_of_mask`); mean_k, ...: `prologue.pack_means`.
    visited int32 [B * slots, q_blocks]: how many blocks each program attended.
    """
    program = tl.program_id(0)
    row = program % q_blocks
    b = (program // q_blocks) % batch
    slot = program // q_blocks // batch
    if counts_ptr is not None:
        slot = tl.load(slots_ptr + slot)
        row = tl.load(rows_ptr + slot * (q_blocks // parts) + row // parts) * parts + row % parts
    h = tl.load(heads_ptr + slot)
    packed = b * slots + slot
    kv_head = b * (heads // group) + h // group
    channel = tl.arange(0, D)
    position = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_row = packed * q_blocks * BLOCK_Q + position
    q = tl.load(q_ptr + q_row.to(tl.int64)[:, None] * D + channel[None, :])
    q_factor = tl.load(q_factor_ptr + q_row // 64)
    if QK == "int8":
        k_scale_ptr += packed * kv_blocks
    k_ptr += packed.to(tl.int64) * kv_blocks * (BLOCK_KV * D)
    v_ptr += packed.to(tl.int64) * kv_blocks * (BLOCK_KV * D)

    # The row's list of kept blocks.
    LISTED: tl.constexpr = counts_ptr is not None
    count = kv_blocks
    if LISTED:
        at = slot * (q_blocks // parts) + row // parts
        count = tl.load(counts_ptr + at)
        indices_ptr += at.to(tl.int64) * kv_blocks
    partial = (tokens % BLOCK_KV != 0) & (_kept_block(indices_ptr, count - 1, count, LISTED) == kv_blocks - 1)
    whole = count - partial.to(tl.int32)
    if bias_ptr is not None:
        whole = 0
        bias_ptr += packed.to(tl.int64) * kv_blocks * BLOCK_KV

    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    unit = tl.full([BLOCK_Q], LOWEST, tl.float32)
    highest = unit
    visited = 0
    EACH: tl.constexpr = WIDTH // BLOCK_KV
    # Block numbers are read one step ahead: keys and values can then be on their way while another step computes.
    next0 = _kept_block(indices_ptr, 0, whole, LISTED)
    next1 = _kept_block(indices_ptr, EACH - 1, whole, LISTED)
    for step in range(0, whole // EACH):
        block0, block1 = next0, next1
        next0 = _kept_block(indices_ptr, step * EACH + EACH, whole, LISTED)
        next1 = _kept_block(indices_ptr, step * EACH + 2 * EACH - 1, whole, LISTED)
        acc, total, unit, highest = _step(
            acc, total, unit, highest, q, q_factor, k_ptr, v_ptr, k_scale_ptr, block0, block1, 0.0, 1.0,
            D, BLOCK_Q, WIDTH, QK, PV, False, False, SWAPPED, ASM,
        )  # fmt: skip
        if visited_ptr is not None:
            visited += EACH

    column = stored_token(tl.arange(0, BLOCK_KV), SWAPPED)
    for step in tl.range(whole // EACH * EACH, count, num_stages=NUM_STAGES if bias_ptr is not None else 1):
        block = _kept_block(indices_ptr, step, count, LISTED)
        bias = tl.where(block * BLOCK_KV + column < tokens, 0.0, float("-inf"))
        if bias_ptr is not None:
            bias += tl.load(bias_ptr + block * BLOCK_KV + tl.arange(0, BLOCK_KV))
        acc, total, unit, highest = _step(
            acc, total, unit, highest, q, q_factor, k_ptr, v_ptr, k_scale_ptr, block, block, bias, 1.0,
            D, BLOCK_Q, BLOCK_KV, QK, PV, True, False, SWAPPED, ASM,
        )  # fmt: skip
        if visited_ptr is not None:
            visited += 1

    if compensate_ptr is not None:
        mean_k_ptr += packed.to(tl.int64) * mean_blocks * (BLOCK_KV * D)
        mean_v_ptr += packed.to(tl.int64) * mean_blocks * (BLOCK_KV * D)
        mean_bias_ptr += packed * mean_blocks * BLOCK_KV
        if QK == "int8":
            mean_k_scale_ptr += packed * mean_blocks
        mask_number = number_of_mask(mask_index_ptr, bucket_ptr, h, heads)
        mask_ptr += mask_number.to(tl.int64) * stride_mask + row // parts * mask_bytes
        if bucket_ptr is not None:
            compensate_ptr += tl.load(bucket_ptr) * heads
        for block in tl.range(0, tl.load(compensate_ptr + h).to(tl.int32) * mean_blocks, num_stages=1):
            kv_block = block * BLOCK_KV + column  # that the mean token of this column stands for
            bits = tl.load(mask_ptr + kv_block // 8, mask=kv_block < kv_blocks, other=255)
            bias = tl.load(mean_bias_ptr + block * BLOCK_KV + tl.arange(0, BLOCK_KV))
            bias = tl.where((bits.to(tl.int32) >> (kv_block % 8)) & 1 == 0, bias, float("-inf"))
            v_scale = 1.0
            if PV == "int8" or PV == "fp8":
                v_scale = tl.load(mean_v_scale_ptr + packed * mean_blocks + block)
            acc, total, unit, highest = _step(
                acc, total, unit, highest, q, q_factor, mean_k_ptr, mean_v_ptr, mean_k_scale_ptr, block, block, bias,
                v_scale, D, BLOCK_Q, BLOCK_KV, QK, PV, True, PV == "int8" or PV == "fp8", SWAPPED, ASM,
            )  # fmt: skip

    # A total of 0 means that the key mask hides every kept key: the output is 0 then, and lse -inf.
    result = acc / tl.where(total == 0, 1.0, total)[:, None]
    if PV == "int8" or PV == "fp8":
        result = result * tl.load(v_scale_ptr + kv_head * D + channel)[None, :]
        v_mean = tl.load(v_mean_ptr + kv_head * D + channel)
        result = tl.where((total == 0)[:, None], 0.0, result + v_mean[None, :])
    lse = (unit + tl.math.log2(total) - _p_exponent(PV)) * LN_2
    if QK == "int8":
        lse += tl.load(lse_shift_ptr + q_row)

    # Back to the input's order.
    valid = position < tokens
    token = position
    if order_ptr is not None:
        token = load_tokens(order_ptr, order_index_ptr, h, tokens, position, valid)
    out = output_ptr + b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
    out += token.to(tl.int64)[:, None] * stride_on + channel[None, :]
    mask = valid[:, None]
    if HEAD_DIM != D:
        mask = mask & (channel < HEAD_DIM)[None, :]
    tl.store(out, result.to(output_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + (b.to(tl.int64) * heads + h) * tokens + token, lse, mask=valid)
    if visited_ptr is not None:
        tl.store(visited_ptr + packed * q_blocks + row, visited)
