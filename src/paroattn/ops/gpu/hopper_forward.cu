// The attention forward on Hopper (sm_90a) for INT8 QK^T and 8-bit PV: what forward.py computes, in fewer
// instructions.
//
// A program is one warp group: 64 queries of one head, which walk over their list of kept blocks, two blocks of 64
// keys per step. While a step computes, bulk copies fetch the next one's blocks. A thread keeps its part of the logits,
// of P and of the sums in registers, of two rows: lane / 4 of its warp's 16, and eight below.
//
// Packed blocks come from prologue.py as matrix instructions read them: queries and keys as
// [8 groups][D / 16][8 rows][16 channels], values as [4][COLUMNS][16 tokens]. A record is the keys of a block, its
// values, and four times the scale of its keys, since 16 bytes are the least that is copied.
//
// Compiled by NVRTC (hopper.py), which defines D (64 or 128), PV_FP8 (0: int8, 1: e4m3), OUT_BF16 (0: float16), STAGES
// and PROGRAMS, and by hopper.Layout COLUMNS (of the product PV), VALUES, SCALE and RECORD (places in a record and its
// size), QUERIES, BIAS, BARRIERS and SHARED (places in shared memory and its size). docs/gpu-trials.md has what was
// measured and tried.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

// With fp8 and D 64, eight columns of ones follow the values, so that the product PV has the sums of P, too. For D 128
// they cost more than additions; sums of int8 would lack what rounds to zero.
#define ONES (COLUMNS > D)

constexpr int BLOCK = 64, BLOCK_BYTES = BLOCK * D;       // of packed queries, keys or values
constexpr int REST = SCALE + 16 - VALUES;                // values and scale of a block
constexpr int STAGE = 2 * (BLOCK_BYTES + REST);          // what a step reads: keys of two blocks, then the rest of each
constexpr int OUT_STRIDE = 2 * D + 16;                   // bytes of a row on its way out

static_assert(D == 64 || D == 128, "D has to be 64 or 128");
static_assert(COLUMNS == (PV_FP8 && D == 64 ? D + 8 : D), "columns of ones");
static_assert(VALUES == BLOCK_BYTES && SCALE == VALUES + BLOCK * COLUMNS, "a record's parts follow each other");
static_assert(RECORD >= SCALE + 16 && RECORD % 128 == 0, "a record is whole cache lines");
static_assert(QUERIES >= STAGES * STAGE && QUERIES % 128 == 0, "the stages come before the queries");
static_assert(BIAS >= QUERIES + BLOCK_BYTES && BARRIERS >= BIAS + 4 * 2 * BLOCK, "queries, bias, barriers");
static_assert(BARRIERS % 8 == 0 && SHARED >= BARRIERS + 8 * (STAGES + 1), "a barrier per stage, and the queries'");
static_assert(SHARED >= 64 * OUT_STRIDE, "the output leaves through the stages");

#define MINUS_INFINITY __int_as_float(0xFF800000)
constexpr float LOWEST = -1.0e30f, RANGE = 60.0f, LN_2 = 0.6931471805599453f;
constexpr float P_EXPONENT = PV_FP8 ? 8.0f : 6.988684686772166f;

// hopper.py fills it in this order; forward.attention_forward has the shapes. indices is never null, and may be
// read 16 numbers, and two for each block of means, beyond a list.
struct Arguments {
    const u8 *q, *records;
    u8 *output;
    float *lse;
    const int *heads, *order, *order_index;
    const float *q_factor, *lse_shift, *v_mean, *v_scale, *bias;
    const int *slots, *rows, *counts, *indices;
    const u8 *compensate, *mask;
    const int *mask_index;
    const long long *bucket;
    const u8 *mean_records;
    const float *mean_v_scale, *mean_bias;
    long long stride_ob, stride_oh, stride_on, stride_mask;
    int batch, n_heads, group, tokens, n_slots, q_blocks, parts, kv_blocks, mean_blocks, mask_bytes, head_dim;
};

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// The same in all lanes of a warp, which the compiler does not know.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xFFFFFFFF, x, 0); }
// True in one lane of a warp.
__device__ __forceinline__ bool elected() {
    u32 found;
    asm volatile("{\n.reg .pred found;\nelect.sync _|found, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, found;\n}" : "=r"(found));
    return found;
}
__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// Barriers in shared memory.
__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void bulk_copy(u32 to, const u8 *from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// Matrix instructions. A descriptor names a tile in shared memory: its address, the bytes from one piece of 16 bytes of
// a row to the next, and from eight rows to the next eight.
__device__ __forceinline__ u64 descriptor(u32 address, int piece, int eight_rows) {
    return (u64)((address & 0x3FFFF) >> 4) | (u64)(piece >> 4) << 16 | (u64)(eight_rows >> 4) << 32;
}
__device__ __forceinline__ void matrix_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void matrix_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define R4(C, d, i) C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3])
#define R32(C, d, i) R4(C, d, i), R4(C, d, i + 4), R4(C, d, i + 8), R4(C, d, i + 12), \
                     R4(C, d, i + 16), R4(C, d, i + 20), R4(C, d, i + 24), R4(C, d, i + 28)
#define INTS(x) "+r"(x)
#define FLOATS(x) "+f"(x)
#define NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// s [64 x 128] = q [64 x 32] k^T (+ s)
__device__ __forceinline__ void multiply_qk(int (&s)[64], u64 q, u64 k, int add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" NAMES_64 "}, %64, %65, add;\n}"
                 : R32(INTS, s, 0), R32(INTS, s, 32) : "l"(q), "l"(k), "r"(add));
}
__device__ __forceinline__ void wait_for_qk(int (&s)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : R32(INTS, s, 0), R32(INTS, s, 32) : : "memory");
}
// o [64 x COLUMNS] = p [64 x 32] v (+ o)
#if PV_FP8
typedef float Product;
#define PV(N) "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {"
#define PV_END ", 1, 1;\n}"
#if ONES
#define O_ALL R32(FLOATS, o, 0), R4(FLOATS, o, 32)
#else
#define O_ALL R32(FLOATS, o, 0), R32(FLOATS, o, 32)
#endif
#else
typedef int Product;
#define PV(N) "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {"
#define PV_END ";\n}"
#if D == 64
#define O_ALL R32(INTS, o, 0)
#else
#define O_ALL R32(INTS, o, 0), R32(INTS, o, 32)
#endif
#endif
// The statement for N columns: names of the registers of o, then those of p, the descriptor of v and `add`.
#define PV_STATEMENT(N, O, P, V, ADD) \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n" PV(N) O "}, {" P "}, " V ", add" PV_END \
                 : O_ALL : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"(add))
__device__ __forceinline__ void multiply_pv(Product (&o)[COLUMNS / 2], const u32 *p, u64 v, int add) {
#if ONES
    PV_STATEMENT(72, NAMES_32 ", %32, %33, %34, %35", "%36, %37, %38, %39", "%40", "%41");
#elif D == 64
    PV_STATEMENT(64, NAMES_32, "%32, %33, %34, %35", "%36", "%37");
#else
    PV_STATEMENT(128, NAMES_64, "%64, %65, %66, %67", "%68", "%69");
#endif
}
__device__ __forceinline__ void wait_for_pv(Product (&o)[COLUMNS / 2]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : O_ALL : : "memory");
}

// Four neighbours of P, rounded, lowest first.
__device__ __forceinline__ u32 pack(float a, float b, float c, float d) {
    u32 packed;
#if PV_FP8
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}" : "=r"(packed) : "f"(a), "f"(b), "f"(c), "f"(d));
#else
    asm("{\n.reg .s32 a, b, c, d;\n.reg .b32 upper;\n"
        "cvt.rni.s32.f32 a, %1;\ncvt.rni.s32.f32 b, %2;\ncvt.rni.s32.f32 c, %3;\ncvt.rni.s32.f32 d, %4;\n"
        "cvt.pack.sat.s8.s32.b32 upper, d, c, 0;\ncvt.pack.sat.s8.s32.b32 %0, b, a, upper;\n}"
        : "=r"(packed) : "f"(a), "f"(b), "f"(c), "f"(d));
#endif
    return packed;
}
__device__ __forceinline__ float sum_of_quad(float x) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}
__device__ __forceinline__ float largest_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}
// Which token of a block stands in a row of packed keys: see rows.stored_token.
__device__ __forceinline__ int stored_token(int row) {
    return (row & ~15) | ((row >> 1) & 3) << 2 | ((row >> 3) & 1) << 1 | (row & 1);
}

// What a thread keeps of its two rows (lane / 4 and eight below) from step to step: see forward._units.
struct Rows {
    float acc[D / 2], total[2], unit[2], highest[2];
};

// The weight of the sums so far, once the rows' own maximum in this step is known; unit becomes the next one.
__device__ __forceinline__ float next_unit(Rows &rows, int r, float step_maximum) {
    rows.highest[r] = fmaxf(rows.highest[r], step_maximum);
    float unit = fmaxf(step_maximum, rows.highest[r] - RANGE);
    float weight = exp2_fast(rows.unit[r] - unit);
    rows.unit[r] = unit;
    return weight;
}

// The largest of a thread's products in row r of a block.
__device__ __forceinline__ float largest(const int (&s)[64], int block, int r) {
    int found = max(s[32 * block + 2 * r], s[32 * block + 2 * r + 1]);
#pragma unroll
    for (int j = 1; j < 8; j++)
        found = max(max(found, s[32 * block + 4 * j + 2 * r]), s[32 * block + 4 * j + 2 * r + 1]);
    return (float)found;
}

// P of a block from its products s, or with MASKED from logits, whose bits they are then: the left operand of PV. What
// its rows sum up to is added to their totals.
template <bool MASKED>
__device__ __forceinline__ void exponentials(const int (&s)[64], int block, float factor, u32 (&operand)[8],
                                             Rows &rows) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        // Register i: four of 16 columns, i / 2, of row i % 2.
        const int r = i % 2;
        const float shift = rows.unit[r] - P_EXPONENT;
        float p[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int x = s[32 * block + i / 2 * 8 + j / 2 * 4 + 2 * r + j % 2];
            p[j] = exp2_fast(MASKED ? __int_as_float(x) - shift : fmaf((float)x, factor, -shift));
        }
        operand[i] = pack(p[0], p[1], p[2], p[3]);
        if (!ONES) rows.total[r] += (p[0] + p[1]) + (p[2] + p[3]);
    }
}

// Attend the two blocks of a stage, whose products QK^T are under way to s. With MASKED, bias is added to the logits,
// and the values are scaled; blocks is how many there are. `meanwhile` runs while the product PV is under way.
template <bool MASKED, typename Meanwhile>
__device__ __forceinline__ void attend(Rows &rows, int (&s)[64], float q_factor, u32 stage, const float *bias,
                                       int blocks, float v_scale, Meanwhile meanwhile) {
    float factor[2], weight[2], highest[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(factor[i]) : "r"(stage + 2 * BLOCK_BYTES + (i + 1) * REST - 16));
        factor[i] = MASKED && i >= blocks ? 0 : factor[i] * q_factor;
    }
    wait_for_qk(s);
    if (MASKED) {
        bias += 2 * (threadIdx.x % 4);
        highest[0] = highest[1] = MINUS_INFINITY;
#pragma unroll
        for (int i = 0; i < 64; i++) {
            const float x = fmaf((float)s[i], factor[i / 32], bias[i / 4 * 8 + i % 2]);
            s[i] = __float_as_int(x);
            highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], x);
        }
    } else {
        // Factors are above zero: the largest product of a block is the largest logit.
#pragma unroll
        for (int r = 0; r < 2; r++) highest[r] = fmaxf(largest(s, 0, r) * factor[0], largest(s, 1, r) * factor[1]);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        weight[r] = next_unit(rows, r, largest_of_quad(highest[r]));
        rows.total[r] *= weight[r];
    }

    u32 operand[2][8];
#pragma unroll
    for (int i = 0; i < 2; i++) exponentials<MASKED>(s, i, factor[i], operand[i], rows);
    Product product[COLUMNS / 2];
    matrix_fence();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        // Without a second block, what is there is no number perhaps; P is 0.
        const int block = MASKED && i >= blocks ? 0 : i;
        const u64 values = descriptor(stage + 2 * BLOCK_BYTES + block * REST, 16 * COLUMNS, 128);
        multiply_pv(product, operand[i], values, i > 0);
        multiply_pv(product, operand[i] + 4, values + (2 * 16 * COLUMNS >> 4), 1);
    }
    matrix_commit();
    meanwhile();
    wait_for_pv(product);
#pragma unroll
    for (int i = 0; i < D / 2; i++)
        rows.acc[i] = fmaf(rows.acc[i], weight[i / 2 % 2], MASKED ? (float)product[i] * v_scale : (float)product[i]);
    if (ONES)
        for (int r = 0; r < 2; r++) rows.total[r] += (float)product[D / 2 + 2 * r];
}

extern "C" __global__ void __launch_bounds__(128, PROGRAMS) attention_forward(const Arguments a) {
    extern __shared__ __align__(128) u8 shared[];
    const int thread = threadIdx.x, lane = thread % 32, warp = uniform(thread / 32);
    const u32 base = shared_address(shared), full = base + BARRIERS, loaded = full + 8 * STAGES;

    // Which queries.
    int row = blockIdx.x % a.q_blocks;
    const int b = blockIdx.x / a.q_blocks % a.batch;
    int slot = blockIdx.x / a.q_blocks / a.batch;
    if (a.counts) {
        slot = uniform(a.slots[slot]);
        row = uniform(a.rows[slot * (a.q_blocks / a.parts) + row / a.parts]) * a.parts + row % a.parts;
    }
    const int h = uniform(a.heads[slot]), packed = b * a.n_slots + slot, mask_row = row / a.parts;
    const int at = slot * (a.q_blocks / a.parts) + mask_row;
    const int count = uniform(a.counts ? a.counts[at] : a.kv_blocks);
    const int *indices = a.indices + (a.counts ? (long long)at * a.kv_blocks : 0);

    // Steps: two whole blocks each; what is left, with a mask; blocks of mean tokens, one each.
    int whole = 0;
    if (!a.bias && count > 0) {
        int last = indices[count - 1];
        whole = count - (a.tokens % BLOCK != 0 && last == a.kv_blocks - 1);
    }
    const int in_bucket = (a.bucket ? (int)*a.bucket * a.n_heads : 0) + h;
    const int plain_steps = uniform(whole / 2), list_steps = (count + 1) / 2;
    const int steps = uniform(list_steps + (a.compensate && a.compensate[in_bucket] ? a.mean_blocks : 0));

    // Each warp copies a quarter of a step, so that none is late: of one of the two blocks the keys, or the values and
    // the scale. Where from is worked out a step ahead, and the block's number read two steps ahead; beyond the list
    // neither is used.
    const int own = warp / 2, half = warp % 2, bytes = half ? REST : BLOCK_BYTES;
    const u32 target = base + (half ? 2 * BLOCK_BYTES + own * REST : own * BLOCK_BYTES);
    const int *ahead = indices + own;
    int next = *ahead;
    const u8 *from;
    auto look_ahead = [&] {
        from = a.records + (u64)(packed * a.kv_blocks + uniform(next)) * RECORD + half * VALUES;
        ahead += 2;
        next = *ahead;
    };
    auto copy = [&](int step, int stage) {
        const u32 barrier = full + 8 * stage, to = target + stage * STAGE;
        if (2 * step + 1 < count) {
            if (elected()) {
                barrier_expect(barrier, bytes);
                bulk_copy(to, from, bytes, barrier);
            }
        } else if (elected()) {  // one block, of the list or of mean tokens
            if (step >= list_steps)
                from = a.mean_records + (u64)(packed * a.mean_blocks + step - list_steps) * RECORD + half * VALUES;
            if (own == 0) {
                barrier_expect(barrier, bytes);
                bulk_copy(to, from, bytes, barrier);
            } else {
                barrier_arrive(barrier);
            }
        }
    };

    if (thread == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 4);
        barrier_init(loaded, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const long long tile = (long long)packed * a.q_blocks + row;
    if (thread == 0) {
        barrier_expect(loaded, BLOCK_BYTES);
        bulk_copy(base + QUERIES, a.q + tile * BLOCK_BYTES, BLOCK_BYTES, loaded);
    }
    look_ahead();
    for (int i = 0; i < STAGES - 1 && i < steps; i++) {
        copy(i, i);
        look_ahead();
    }
    const float q_factor = a.q_factor[tile];

    Rows rows;
#pragma unroll
    for (int i = 0; i < D / 2; i++) rows.acc[i] = 0;
#pragma unroll
    for (int r = 0; r < 2; r++) rows.total[r] = 0, rows.unit[r] = rows.highest[r] = LOWEST;
    const u64 queries = descriptor(base + QUERIES, 128, 8 * D);
    float *bias = (float *)(shared + BIAS);
    barrier_wait(loaded, 0);

    int stage = 0, before = STAGES - 1;
    u32 turn = 0;  // how often all stages were used
    auto multiply = [&](int step, int (&s)[64]) {
        barrier_wait(full + 8 * stage, turn & 1);
        matrix_fence();
        const u64 keys = descriptor(base + stage * STAGE, 128, 8 * D);
#pragma unroll
        for (int i = 0; i < D / 32; i++) multiply_qk(s, queries + i * (256 >> 4), keys + i * (256 >> 4), i > 0);
        matrix_commit();
        // Meanwhile the stage of the step before is filled again, once all warps are through with it.
        if (step + STAGES - 1 < steps) {
            __syncthreads();
            copy(step + STAGES - 1, before);
        }
    };
    auto finish = [&]() {
        before = stage;
        if (++stage == STAGES) stage = 0, turn++;
    };
    for (int step = 0; step < plain_steps; step++) {
        int s[64];
        multiply(step, s);
        attend<false>(rows, s, q_factor, base + stage * STAGE, bias, 2, 1, look_ahead);
        finish();
    }
    for (int step = plain_steps; step < steps; step++) {
        const int mean = step - list_steps, column = thread % BLOCK, number = 2 * step + thread / BLOCK;
        float added = MINUS_INFINITY, v_scale = 1;
        if (mean < 0 && number < count) {
            const int block = indices[number];
            if (block * BLOCK + stored_token(column) < a.tokens)
                added = a.bias ? a.bias[((long long)packed * a.kv_blocks + block) * BLOCK + column] : 0;
        } else if (mean >= 0 && thread < BLOCK) {
            const int block = mean * BLOCK + stored_token(column);
            const int number = a.mask_index ? a.mask_index[in_bucket] : h;
            const u8 *mask = a.mask + number * a.stride_mask + mask_row * a.mask_bytes;
            if (block < a.kv_blocks && !(mask[block / 8] >> block % 8 & 1))
                added = a.mean_bias[((long long)packed * a.mean_blocks + mean) * BLOCK + column];
        }
        if (mean >= 0) v_scale = a.mean_v_scale[(long long)packed * a.mean_blocks + mean];
        __syncthreads();
        bias[thread] = added;
        __syncthreads();
        int s[64];
        multiply(step, s);
        const int blocks = mean < 0 && 2 * step + 1 < count ? 2 : 1;
        attend<true>(rows, s, q_factor, base + stage * STAGE, bias, blocks, v_scale, look_ahead);
        finish();
    }

    const int *order = a.order ? a.order + (long long)(a.order_index ? a.order_index[h] : h) * a.tokens : nullptr;
    // A total of 0 means that the key mask hides every kept key: the output is 0 then, and lse -inf.
    __syncthreads();  // the stages are free
    const float *v_mean = a.v_mean + (b * (a.n_heads / a.group) + h / a.group) * D + 2 * (lane % 4);
    const float *v_scale = a.v_scale + (v_mean - a.v_mean);
    u8 *own_rows = shared + warp * 16 * OUT_STRIDE;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float total = ONES ? rows.total[r] : sum_of_quad(rows.total[r]);
        const float inverse = total == 0 ? 0 : 1 / total;
        const int in_warp = lane / 4 + 8 * r, position = row * BLOCK + warp * 16 + in_warp;
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            float x[2];
#pragma unroll
            for (int c = 0; c < 2; c++)
                x[c] = total == 0 ? 0
                                  : fmaf(rows.acc[4 * j + 2 * r + c] * inverse, v_scale[8 * j + c], v_mean[8 * j + c]);
            u32 both;
#if OUT_BF16
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(x[1]), "f"(x[0]));
#else
            asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(x[1]), "f"(x[0]));
#endif
            *(u32 *)(own_rows + in_warp * OUT_STRIDE + 16 * j + 4 * (lane % 4)) = both;
        }
        if (lane % 4 == 0 && position < a.tokens) {
            const int token = order ? order[position] : position;
            const float lse = (rows.unit[r] + log2_fast(total) - P_EXPONENT) * LN_2;
            a.lse[((long long)b * a.n_heads + h) * a.tokens + token] =
                lse + a.lse_shift[tile * BLOCK + warp * 16 + in_warp];
        }
    }
    __syncwarp();
    // Back to the input's order, 16 bytes per lane.
    constexpr int PIECES = D / 8;
#pragma unroll 4
    for (int i = lane; i < 16 * PIECES; i += 32) {
        const int in_warp = i / PIECES, channel = i % PIECES * 8, position = row * BLOCK + warp * 16 + in_warp;
        if (position < a.tokens && channel < a.head_dim) {
            const int token = order ? order[position] : position;
            *(uint4 *)(a.output + 2 * (b * a.stride_ob + h * a.stride_oh + token * a.stride_on + channel)) =
                *(const uint4 *)(own_rows + in_warp * OUT_STRIDE + 2 * channel);
        }
    }
}
