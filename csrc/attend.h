// Attention of one block of 64 query rows over its kept kv blocks, then over blocks of mean tokens: online softmax in
// bands of 16 rows by 64 columns, each of 4 strips, whose sums fit into registers.
//
// For each strip: scores = q k^T (`Scores::compute`), P = 2^(score - maximum) (`Values::exponent`), output += P v
// (`Values::add`). The maxima of a whole band are brought up to date at once (`update_max`). The exponents of a strip
// run between the products of the scores of the same strip in the next band, so that both kinds of instructions keep
// the CPU busy.
//
// P is relative to the largest score of its row within the block and so uses all steps of an integer format; `weight`
// brings it to the row's maximum over the blocks seen so far.
//
// A mean token stands for the shown tokens of a kv block of the mask. The number of tokens of a full block is in the
// weight, and what is missing from it in the score, as the logarithm of the share that is shown.
#pragma once

#include "attention.h"
#include "pack.h"
#include "vector_math.h"

namespace paroattn {
namespace {

constexpr int kStripRows = 4, kBandRows = 16;

// Mean tokens get no smaller factor: logarithms of shares, divided by it, would overflow the scores. A block of q that
// needs it is rounded to larger steps, with errors of logits below 2^-10.
constexpr float kSmallestMeanFactor = 0x1p-24f;

// A block's columns, as one block of queries sees them.
struct Columns {
  float factor;  // > 0; score * factor is the logit in powers of two
  uint64_t shown;
  const char* value;  // the packed kv block
  int steps;          // largest integer of P
  float tokens;       // that a column stands for
  float value_unit;   // of P v, in that of the output
};

// Scores that wait to become probabilities.
struct Band : Columns {
  alignas(64) uint32_t scores[kBandRows][kBlock];  // int32 or float, as Scores has them
  alignas(64) float max[kBandRows];                // of each row of scores
  alignas(64) float weight[kBandRows];             // of P in the total, see above
  alignas(64) float value_weight[kBandRows];       // of P v in the output
  int row;                                         // first row of the band
};

// What the rows have gathered so far.
template <int D>
struct Gathered {
  alignas(64) float output[kBlock][D];
  alignas(64) float total[kBlock][16];  // sums of P, in 16 parts
  alignas(64) float max[kBlock];        // logits in powers of two
};

// The columns that a row of the mask makes a block show, as exponents order them: those of a kept kv block, or the mean
// tokens of skipped ones.
template <class Order>
inline uint64_t shown_columns(const Head& head, const uint8_t* mask_row, int64_t block) {
  const int64_t mean_block = block - block_count(head.tokens);
  if (mean_block < 0) {
    const int64_t bit = block / head.mask_block_kv;
    return !mask_row || mask_row[bit / 8] >> (bit % 8) & 1 ? head.shown[block] : 0;
  }
  uint64_t kept = 0;
  for (int64_t i = 0; i < 8 && 8 * mean_block + i < head.mask_row_bytes; ++i) {
    kept |= uint64_t(mask_row[8 * mean_block + i]) << (8 * i);
  }
  return head.shown[block] & in_order<Order>(~kept);
}

// The starts of scores in a block of mean tokens of which only those in `shown` count.
template <class Element, class Order>
inline void start_means(const Head& head, int64_t mean_block, uint64_t shown, float factor, uint32_t* out) {
  const uint32_t* start = head.score_start + (block_count(head.tokens) + mean_block) * kBlock;
  const float* log_share = head.mean_log_share + mean_block * kBlock;
  for (int bit = 0; bit < kBlock; ++bit) {
    const int column = Order::shown(bit);
    out[column] = shown >> bit & 1 ? Element::add_to_score(start[column], log_share[column] / factor)
                                   : Element::hidden_score();
  }
}

// Sets the band's weights, relative to the rows' maxima. Those follow the band's only when it exceeds them by more than
// 2^8: a weight of up to 2^8 costs no accuracy in floating point, and what was gathered is rarely rescaled.
template <int D>
PAROATTN_INLINE void update_max(Band& band, Gathered<D>& rows) {
  using Float = Vector<kBandRows>::Float;
  const Float band_max = load_vector<kBandRows>(band.max) * band.factor;
  const Float old_max = load_vector<kBandRows>(rows.max + band.row);
  Float max = old_max;
  const auto exceeds = !(band_max <= old_max + 8.0f);  // true for a NaN, which then stays
  if (any(exceeds)) {
    max = exceeds ? band_max : old_max;
    store_vector(rows.max + band.row, max);
    const Float rescale = exp2_clamped<kBandRows, 6>(old_max - max);
    for (int r = 0; r < kBandRows; ++r) {
      const float factor = rescale[r];
      for (int d = 0; d < D; ++d) rows.output[band.row + r][d] *= factor;
      for (int i = 0; i < 16; ++i) rows.total[band.row + r][i] *= factor;
    }
  }
  const Float weight = exp2_clamped<kBandRows, 6>(band_max - max) * band.tokens;
  store_vector(band.weight, weight);
  store_vector(band.value_weight, weight * band.value_unit);
}

// Divides by the sum of P, adds what was taken from v, and writes the rows to their places in the input's order.
template <class Type, class Values, int D>
inline void finish(const Head& head, int64_t q_block, const float* shift, const Gathered<D>& rows) {
  constexpr float kLn2 = 0.69314718f;
  for (int r = 0; r < kBlock && q_block * kBlock + r < head.tokens; ++r) {
    const int64_t position = q_block * kBlock + r, token = token_at(head, position);
    const float total = sum_of_16(rows.total[r]) / Values::total_unit(head.pv);
    const bool empty = total == 0;  // key_mask hides every kept key
    const float per_total = empty ? 0.0f : 1.0f / (total * Values::probability_unit(head.pv));
    auto* out = row_at<Type>(head.output, token);
    for (int d = 0; d < head.head_dim; ++d) {
      const float x = rows.output[r][d] * per_total * head.value_scale[d] + head.value_mean[d];
      out[d] = Type::store(empty ? 0.0f : x);
    }
    head.lse[token] = empty ? -__builtin_inff() : (__builtin_log2f(total) + rows.max[r]) * kLn2 + shift[r];
  }
}

template <class Scores, class Values, int D>
int64_t attend(const Head& head, int64_t q_block) {
  using Element = typename Scores::Element;
  using Order = typename Values::Order;
  const int64_t token_blocks = block_count(head.tokens), blocks = token_blocks + mean_block_count(head);
  const uint8_t* mask_row = head.mask ? head.mask + q_block / head.mask_block_q * head.mask_row_bytes : nullptr;
  Query<Element, D> query, coarse_query;
  pack_query(head, q_block, 0.0f, query);
  const float query_factor = __builtin_fabsf(head.scale) * 1.44269504f * query.scale;
  int64_t visited = 0;

  Gathered<D> rows;
  std::memset(&rows, 0, sizeof rows);
  for (float& max : rows.max) max = -__builtin_inff();
  // Two bands take turns. The one that waits at first shows no column and adds nothing.
  Band bands[2], *waiting = &bands[0], *current = &bands[1];
  std::memset(waiting, 0, sizeof *waiting);
  typename Values::Probabilities p;
  const auto exponent = [&](int r) __attribute__((always_inline)) {
    Values::template exponent<Scores>(*waiting, r, p, rows.total[waiting->row + r]);
  };

  for (int64_t block = 0; block < blocks; ++block) {
    Columns columns;
    columns.shown = shown_columns<Order>(head, mask_row, block);
    if (!columns.shown) continue;
    columns.factor = query_factor * head.key_scale[block];
    columns.value = head.packed_value + block * Values::kValueBytes;
    columns.steps = probability_steps(head.pv);
    columns.tokens = columns.value_unit = 1.0f;
    const auto* elements = query.elements;
    const uint32_t* start = head.score_start + block * kBlock;
    alignas(64) uint32_t mean_start[kBlock];
    if (block < token_blocks) {
      ++visited;
    } else {
      if (columns.factor < kSmallestMeanFactor) {
        pack_query(head, q_block, kSmallestMeanFactor / columns.factor * query.scale, coarse_query);
        elements = coarse_query.elements;
        columns.factor = kSmallestMeanFactor;
      }
      const int64_t mean_block = block - token_blocks;
      const Format format = mean_format(head.pv);
      columns.steps = probability_steps(format);
      columns.tokens = float(kBlock * head.mask_block_kv);
      columns.value_unit = head.mean_value_scale[mean_block] * Values::probability_unit(head.pv) /
                           Values::probability_unit(format);
      start_means<Element, Order>(head, mean_block, columns.shown, columns.factor, mean_start);
      start = mean_start;
    }
    if (!waiting->value) waiting->value = columns.value;
    const char* key = head.packed_key + block * Scores::kKeyBytes;
    for (int row = 0; row < kBlock; row += kBandRows) {
      static_cast<Columns&>(*current) = columns;
      current->row = row;
      for (int strip = 0; strip < kBandRows; strip += kStripRows) {
        Scores::compute(elements + (row + strip) * D, key, start, *current, strip, exponent);
        Values::add(p, *waiting, strip, rows.output[waiting->row + strip]);
      }
      update_max(*current, rows);
      Band* const done = waiting;
      waiting = current;
      current = done;
    }
  }
  for (int strip = 0; waiting->value && strip < kBandRows; strip += kStripRows) {
    for (int r = strip; r < strip + kStripRows; ++r) exponent(r);
    Values::add(p, *waiting, strip, rows.output[waiting->row + strip]);
  }
  with_type(head.output, [&](auto type) { finish<decltype(type), Values>(head, q_block, query.shift, rows); });
  return visited;
}

}  // namespace
}  // namespace paroattn
