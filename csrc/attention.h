// The data that all kernels share.
//
// A head's tokens are cut into blocks of 64 in the reordered sequence. Work goes through three stages: `measure` takes
// statistics of K and V, `pack` gathers, shifts and quantises one block of k and v into the layout the products want,
// `attend` does that with one block of q and computes its rows. Each kernel is one implementation of these stages for a
// CPU and a pair of number formats; threads.cpp runs them.
//
// Where skipped blocks are compensated, `pack` also leaves the sums of its tokens. From these `pack_means` makes mean
// tokens, one for each kv block of the mask, and packs 64 of them as one more block after those of the tokens.
#pragma once

#include <cstddef>
#include <cstdint>

// For what runs per strip: as calls, its sums would leave the registers.
#define PAROATTN_INLINE inline __attribute__((always_inline))

namespace paroattn {

constexpr int kBlock = 64;        // tokens per block
constexpr int kMaxHeadDim = 256;  // packed blocks are 64, 128 or 256 channels wide; the rest is zero

enum class DataType { kFloat32, kFloat16, kBfloat16 };
enum class Format { kExact, kBf16, kInt8, kInt4 };

// Tokens of one head: row i starts `i * stride` elements after `data`, its head_dim values are adjacent.
struct Rows {
  void* data;
  int64_t stride;
  DataType type;
};

// Largest integers of a format's operands: q, k and v are symmetric, P counts from zero.
constexpr int symmetric_steps(Format format) { return format == Format::kInt8 ? 127 : format == Format::kInt4 ? 7 : 0; }
constexpr int probability_steps(Format format) { return format == Format::kInt8 ? 255 : 15; }
constexpr bool is_integer(Format format) { return format == Format::kInt8 || format == Format::kInt4; }

// The format of mean tokens: they are few and each stands for many, so 4 bits would cost accuracy for nothing.
constexpr Format mean_format(Format format) { return format == Format::kInt4 ? Format::kInt8 : format; }

// Sums and extremes per channel over some tokens.
struct Moments {
  float key_sum[kMaxHeadDim];
  float value_sum[kMaxHeadDim];
  float value_min[kMaxHeadDim];
  float value_max[kMaxHeadDim];
};

// One head of one batch element: what the caller brings, then what the stages leave for each other.
struct Head {
  Rows query, key, value, output;
  float* lse;               // [tokens], natural logarithm
  const int32_t* order;     // [tokens], position i of the reordered sequence holds token order[i]; null: as it is
  const uint8_t* mask;      // bits of kept kv blocks, one row of mask_row_bytes per row of blocks; null: all are kept
  int64_t mask_row_bytes;
  int mask_block_q, mask_block_kv;  // 64-token blocks that one bit stands for, along rows and along columns
  bool compensate;          // the mean of a skipped block stands in for it; needs a mask
  const uint8_t* key_mask;  // [tokens] in the input's order, 0 hides a key; null: all are shown
  int64_t tokens;
  int head_dim;
  float scale;  // of the logits
  Format qk, pv;

  float key_mean[kMaxHeadDim];     // taken from k before quantising; zero in floating-point formats
  float value_mean[kMaxHeadDim];   // taken from v, and added to the output
  float value_scale[kMaxHeadDim];  // per channel; one in floating-point formats

  char *packed_key, *packed_value;  // blocks one after another, those of mean tokens last
  uint32_t* score_start;            // [blocks][64]: what a column's score starts from, int32 or float
  float* key_scale;                 // [blocks]
  uint64_t* shown;                  // [blocks]: bits of columns that exist and are not hidden, as exponents order them
  float* token_sums;                // [blocks of tokens][2][head_dim]: of the shown keys and of their values
  float* mean_value_scale;          // [mean blocks]: of their values, on top of the channels' scales
  float* mean_log_share;            // [mean blocks][64]: log2 of a kv block's shown tokens over those of a full one
};

// Blocks that cover the head's tokens.
inline int64_t block_count(int64_t tokens) { return (tokens + kBlock - 1) / kBlock; }

// Blocks that cover its mean tokens.
inline int64_t mean_block_count(const Head& head) {
  const int64_t means = (block_count(head.tokens) + head.mask_block_kv - 1) / head.mask_block_kv;
  return head.compensate ? block_count(means) : 0;
}

// The stages for one CPU, one pair of formats and one padded head_dim.
struct Kernel {
  size_t key_bytes, value_bytes;  // of one packed block
  void (*measure)(const Head&, int64_t first_token, int64_t last_token, Moments&);
  void (*pack)(const Head&, int64_t block);
  void (*pack_means)(const Head&, int64_t mean_block);
  int64_t (*attend)(const Head&, int64_t q_block);  // returns how many kv blocks it visited
};

Kernel avx512_vnni_kernel(Format qk, Format pv, int head_dim);
Kernel avx512_bf16_kernel(Format qk, Format pv, int head_dim);
Kernel avx2_kernel(Format qk, Format pv, int head_dim);
Kernel baseline_kernel(Format qk, Format pv, int head_dim);

}  // namespace paroattn
