// Statistics and packing: gathers a block of tokens in the new order, takes the mean from it, quantises it and writes
// it in the layout of the products. Plain loops over rows, which compilers turn into vector code.
//
// Every product takes 32-bit words: `kDepth` adjacent elements along the summed dimension, 4 int8, 2 bfloat16 or 1
// float. With D channels a packed block of 64 tokens is
//
//     query   [64 tokens][D / kDepth] words      a row's word goes to all lanes of a vector ...
//     key     [D / kDepth][64 tokens] words      ... and meets the same channels of 16 tokens
//     value   [64 / kDepth][D] words             a word of P meets the same tokens of 16 channels
//
// Element types say how a number becomes bits: kDepth, Storage, `bits(float)` (the low bits count), the score of a
// hidden column, what adds to a score, and `kUnsignedQuery`, where integers of q are stored plus 128 because the
// instruction wants one unsigned side.
#pragma once

#include "rows.h"
#include "vector_math.h"

namespace paroattn {
namespace {

constexpr float kSmallestScale = 1.17549435e-38f;  // values too small for a scale round to zero
constexpr float kHiddenScore = -1e30f;

// A number that fills its word. Kernels add what their products need.
struct FloatElement {
  static constexpr int kDepth = 1;
  static constexpr bool kUnsignedQuery = false;
  using Storage = uint32_t;
  static uint32_t bits(float x) { return bit_cast<uint32_t>(x); }
  static uint32_t hidden_score() { return bit_cast<uint32_t>(kHiddenScore); }
  static uint32_t add_to_score(uint32_t score, float x) { return bit_cast<uint32_t>(bit_cast<float>(score) + x); }
};

// Tokens by channels; hidden and missing tokens and padding channels are zero.
template <int D>
struct Tile {
  alignas(64) float row[kBlock][D];
};

// One bit for each token of the block that exists.
inline uint64_t existing_tokens(const Head& head, int64_t block) {
  const int64_t count = head.tokens - block * kBlock;
  return count < kBlock ? (uint64_t(1) << count) - 1 : ~uint64_t(0);
}

// One bit for each token of the block that exists and is not hidden.
inline uint64_t shown_tokens(const Head& head, int64_t block) {
  uint64_t shown = existing_tokens(head, block);
  for (int r = 0; head.key_mask && r < kBlock; ++r) {
    const uint64_t bit = uint64_t(1) << r;
    if (shown & bit && !head.key_mask[token_at(head, block * kBlock + r)]) shown &= ~bit;
  }
  return shown;
}

// The bits of tokens in the order in which exponents are computed.
template <class Order>
inline uint64_t in_order(uint64_t tokens) {
  uint64_t ordered = 0;
  for (int bit = 0; bit < kBlock; ++bit) ordered |= (tokens >> Order::shown(bit) & 1) << bit;
  return ordered;
}

template <class Type>
inline void measure_key(const Head& head, int64_t first_token, int64_t last_token, Moments& out) {
  for (int64_t token = first_token; token < last_token; ++token) {
    const auto* key = row_at<Type>(head.key, token);
    for (int d = 0; d < head.head_dim; ++d) out.key_sum[d] += Type::load(key[d]);
  }
}

template <class Type>
inline void measure_value(const Head& head, int64_t first_token, int64_t last_token, Moments& out) {
  for (int64_t token = first_token; token < last_token; ++token) {
    const auto* value = row_at<Type>(head.value, token);
    for (int d = 0; d < head.head_dim; ++d) {
      const float x = Type::load(value[d]);
      out.value_sum[d] += x;
      out.value_min[d] = x < out.value_min[d] ? x : out.value_min[d];
      out.value_max[d] = x > out.value_max[d] ? x : out.value_max[d];
    }
  }
}

inline void measure(const Head& head, int64_t first_token, int64_t last_token, Moments& out) {
  Moments moments;  // a copy of its own, which no store through a pointer can change
  for (int d = 0; d < kMaxHeadDim; ++d) {
    moments.key_sum[d] = moments.value_sum[d] = 0;
    moments.value_min[d] = __builtin_inff();
    moments.value_max[d] = -__builtin_inff();
  }
  with_type(head.key, [&](auto type) {
    if (is_integer(head.qk)) measure_key<decltype(type)>(head, first_token, last_token, moments);
    if (is_integer(head.pv)) measure_value<decltype(type)>(head, first_token, last_token, moments);
  });
  out = moments;
}

// Fills the tile with the block's rows minus `mean`, where `present` has a bit.
template <class Type, int D>
inline void gather(const Head& head, const Rows& rows, int64_t block, uint64_t present, const float* mean,
                   Tile<D>& tile) {
  const int head_dim = head.head_dim;
  for (int r = 0; r < kBlock; ++r) {
    if (!(present >> r & 1)) {
      for (int d = 0; d < D; ++d) tile.row[r][d] = 0;
      continue;
    }
    const auto* row = row_at<Type>(rows, token_at(head, block * kBlock + r));
    for (int d = 0; d < head_dim; ++d) tile.row[r][d] = Type::load(row[d]) - mean[d];
    for (int d = head_dim; d < D; ++d) tile.row[r][d] = 0;
  }
}

template <int D>
inline void gather(const Head& head, const Rows& rows, int64_t block, uint64_t present, const float* mean,
                   Tile<D>& tile) {
  with_type(rows, [&](auto type) { gather<decltype(type)>(head, rows, block, present, mean, tile); });
}

template <int D>
inline void add_up(const Tile<D>& tile, int head_dim, float* out) {
  float sums[D] = {};
  for (int r = 0; r < kBlock; ++r) {
    for (int d = 0; d < D; ++d) sums[d] += tile.row[r][d];
  }
  std::memcpy(out, sums, head_dim * sizeof(float));
}

// The size of one integer step: the largest magnitude over `steps`, and NaN if there is a NaN.
template <int D>
inline float step_size(const Tile<D>& tile, int steps) {
  uint32_t lanes[D] = {}, largest = 0;  // magnitudes in the order of their bits, where NaN is above all numbers
  for (int r = 0; r < kBlock; ++r) {
    for (int d = 0; d < D; ++d) {
      const uint32_t magnitude = bit_cast<uint32_t>(tile.row[r][d]) & 0x7fffffff;
      lanes[d] = magnitude > lanes[d] ? magnitude : lanes[d];
    }
  }
  for (int d = 0; d < D; ++d) largest = lanes[d] > largest ? lanes[d] : largest;
  const float size = bit_cast<float>(largest) / steps;
  return size < kSmallestScale ? kSmallestScale : size;
}

// Turns the rows by an orthogonal (Hadamard) matrix. Turning q and k alike leaves their products as they are and spreads
// channels with large values over all of them, so that 4 bits suffice better.
template <int D>
inline void rotate(Tile<D>& tile) {
  const float norm = 1.0f / __builtin_sqrtf(float(D));
  for (int r = 0; r < kBlock; ++r) {
    float* row = tile.row[r];
    for (int width = 1; width < D; width *= 2) {
      for (int first = 0; first < D; first += 2 * width) {
        for (int d = first; d < first + width; ++d) {
          const float a = row[d], b = row[d + width];
          row[d] = a + b;
          row[d + width] = a - b;
        }
      }
    }
    for (int d = 0; d < D; ++d) row[d] *= norm;
  }
}

// Rows of the tile times `factor` as adjacent elements: the layout of the query.
template <class Element, int D>
inline void pack_rows(const Tile<D>& tile, float factor, typename Element::Storage* out) {
  using Storage = typename Element::Storage;
  for (int r = 0; r < kBlock; ++r) {
    for (int d = 0; d < D; ++d) out[r * D + d] = Storage(Element::bits(tile.row[r][d] * factor));
  }
}

// Turns rows of words into columns: the layout of the key. Compilers know how to turn 16 columns at a time.
template <int WORDS>
inline void transpose(const uint32_t* rows, uint32_t* out) {
  alignas(64) uint32_t part[kBlock][16];
  for (int first = 0; first < WORDS; first += 16, out += 16 * kBlock) {
    for (int r = 0; r < kBlock; ++r) std::memcpy(part[r], rows + r * WORDS + first, sizeof part[r]);
    for (int w = 0; w < 16; ++w) {
      for (int r = 0; r < kBlock; ++r) out[w * kBlock + r] = part[r][w];
    }
  }
}

// Rows `Order::token(group, 0 ... kDepth - 1)` share the words of a group: the layout of the value.
template <class Element, class Order, int D>
inline void pack_groups(const Tile<D>& tile, const float* factor, uint32_t* out) {
  constexpr int kDepth = Element::kDepth;
  for (int group = 0; group < kBlock / kDepth; ++group) {
    for (int d = 0; d < D; ++d) {
      uint32_t word = 0;
#pragma GCC unroll 4
      for (int e = 0; e < kDepth; ++e) {
        const uint32_t bits = Element::bits(tile.row[Order::token(group, e)][d] * factor[d]);
        word |= (kDepth == 1 ? bits : bits & ((1ull << 32 / kDepth) - 1)) << (32 / kDepth * e);
      }
      out[group * D + d] = word;
    }
  }
}

// What the scores of a column start from: the correction for q + 128, or a score no other is below.
template <class Element, int WORDS>
inline void pack_score_start(const uint32_t* key, uint64_t shown, uint32_t* out) {
  int32_t sums[kBlock] = {};
  if constexpr (Element::kUnsignedQuery) {
    for (int w = 0; w < WORDS; ++w) {
      for (int r = 0; r < kBlock; ++r) {
        const uint32_t word = key[w * kBlock + r];  // four int8
        for (int shift = 0; shift < 32; shift += 8) sums[r] += int32_t(word << shift) >> 24;
      }
    }
  }
  for (int r = 0; r < kBlock; ++r) out[r] = shown >> r & 1 ? uint32_t(-128 * sums[r]) : Element::hidden_score();
}

template <int D>
inline float dot(const float* a, const float* b) {
  using Float = Vector<16>::Float;
  Float sums = {};
  for (int d = 0; d < D; d += 16) sums += load_vector<16>(a + d) * load_vector<16>(b + d);
  return sum_of_16(reinterpret_cast<const float*>(&sums));
}

// A packed block of q and what belongs to it.
template <class Element, int D>
struct Query {
  alignas(64) typename Element::Storage elements[kBlock * D];
  float scale;
  float shift[kBlock];  // what taking the mean from k took from each row's logits
};

// A step of q is not below `smallest`: rounding then loses what is too small to matter.
template <class Element, int D>
inline void pack_query(const Head& head, int64_t block, float smallest, Query<Element, D>& out) {
  Tile<D> tile;
  const float zero[kMaxHeadDim] = {};
  gather(head, head.query, block, existing_tokens(head, block), zero, tile);
  for (int r = 0; r < kBlock; ++r) {
    out.shift[r] = is_integer(head.qk) ? dot<D>(tile.row[r], head.key_mean) * head.scale : 0.0f;
  }
  if (head.qk == Format::kInt4) rotate(tile);
  out.scale = is_integer(head.qk) ? step_size(tile, symmetric_steps(head.qk)) : 1.0f;
  if (out.scale < smallest) out.scale = smallest;
  // With the sign of the scale in q, larger scores always mean larger logits.
  pack_rows<Element, D>(tile, __builtin_copysignf(1.0f / out.scale, head.scale), out.elements);
  if constexpr (Element::kUnsignedQuery) {
    for (auto& element : out.elements) element ^= 0x80;
  }
}

template <class Element, int D>
inline void pack_key(const Head& head, Tile<D>& tile, Format format, uint64_t shown, int64_t block) {
  if (head.qk == Format::kInt4) rotate(tile);
  const float size = is_integer(format) ? step_size(tile, symmetric_steps(format)) : 1.0f;
  head.key_scale[block] = size;
  constexpr int kWords = D / Element::kDepth;
  alignas(64) uint32_t rows[kBlock * kWords];
  auto* elements = reinterpret_cast<typename Element::Storage*>(rows);
  pack_rows<Element, D>(tile, 1.0f / size, elements);
  uint32_t* out = reinterpret_cast<uint32_t*>(head.packed_key) + block * kBlock * kWords;
  transpose<kWords>(rows, out);
  pack_score_start<Element, kWords>(out, shown, head.score_start + block * kBlock);
}

template <class Element, class Order, int D>
inline void pack_value(const Head& head, const Tile<D>& tile, const float* factor, uint64_t shown, int64_t block) {
  uint32_t* out = reinterpret_cast<uint32_t*>(head.packed_value) + block * kBlock * D / Element::kDepth;
  pack_groups<Element, Order, D>(tile, factor, out);
  head.shown[block] = in_order<Order>(shown);
}

template <class QueryKey, class Value, class Order, int D>
void pack(const Head& head, int64_t block) {
  Tile<D> tile;
  const uint64_t shown = shown_tokens(head, block);
  float* sums = head.token_sums + block * 2 * head.head_dim;
  gather(head, head.key, block, shown, head.key_mean, tile);
  if (head.compensate) add_up(tile, head.head_dim, sums);
  pack_key<QueryKey, D>(head, tile, head.qk, shown, block);
  gather(head, head.value, block, shown, head.value_mean, tile);
  if (head.compensate) add_up(tile, head.head_dim, sums + head.head_dim);
  float factor[D];
  for (int d = 0; d < D; ++d) factor[d] = 1.0f / head.value_scale[d];
  pack_value<Value, Order, D>(head, tile, factor, shown, block);
}

// Makes 64 mean tokens, each of what is shown of one kv block of the mask, and packs them as one more block. Their
// values have a common scale on top of the channels', because means are smaller than what they are taken from.
template <class QueryKey, class Value, class Order, int D>
void pack_means(const Head& head, int64_t mean_block) {
  const int64_t token_blocks = block_count(head.tokens), block = token_blocks + mean_block;
  Tile<D> key = {}, value = {};
  uint64_t shown = 0;
  for (int r = 0; r < kBlock; ++r) {
    const int64_t mean_token = mean_block * kBlock + r, first = mean_token * head.mask_block_kv;
    float count = 0;
    for (int64_t from = first; from < first + head.mask_block_kv && from < token_blocks; ++from) {
      const float* sums = head.token_sums + from * 2 * head.head_dim;
      for (int d = 0; d < head.head_dim; ++d) key.row[r][d] += sums[d];
      for (int d = 0; d < head.head_dim; ++d) value.row[r][d] += sums[head.head_dim + d];
      count += __builtin_popcountll(head.shown[from]);
    }
    head.mean_log_share[mean_token] = __builtin_log2f(count / (kBlock * head.mask_block_kv));
    if (count == 0) continue;
    for (int d = 0; d < head.head_dim; ++d) key.row[r][d] /= count;
    for (int d = 0; d < head.head_dim; ++d) value.row[r][d] /= count * head.value_scale[d];
    shown |= uint64_t(1) << r;
  }
  pack_key<QueryKey, D>(head, key, mean_format(head.qk), shown, block);
  const float size = is_integer(head.pv) ? step_size(value, symmetric_steps(mean_format(head.pv))) : 1.0f;
  head.mean_value_scale[mean_block] = size;
  float factor[D];
  for (float& x : factor) x = 1.0f / size;
  pack_value<Value, Order, D>(head, value, factor, shown, block);
}

}  // namespace
}  // namespace paroattn
