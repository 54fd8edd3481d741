// The kernel for every other CPU, on the compiler's vector types: all formats are numbers in float32. Integers and
// bfloat16 are rounded as the formats say and multiplied as floats, which is exact for their products.
#pragma once

#include <type_traits>

#include "attend.h"

namespace paroattn {
namespace {

// ---- Elements, all one float wide

struct Bfloat16 : FloatElement {
  static uint32_t bits(float x) { return uint32_t(to_bfloat16(x)) << 16; }
};

struct Integer : FloatElement {
  static uint32_t bits(float x) { return bit_cast<uint32_t>((x + kRoundingConstant) - kRoundingConstant); }
};

struct TokenOrder {
  static int token(int group, int) { return group; }
  static int shown(int bit) { return bit; }
};

// sums += 4 rows of STEPS numbers times 2 vectors of columns; rows are ROW_WIDTH apart, steps STEP_WIDTH.
template <int LANES, int STEPS, int ROW_WIDTH, int STEP_WIDTH>
PAROATTN_INLINE void multiply(typename Vector<LANES>::Float (&sums)[kStripRows][2], const float* rows,
                              const float* columns) {
  using Float = typename Vector<LANES>::Float;
  for (int step = 0; step < STEPS; ++step) {
    const Float* words = reinterpret_cast<const Float*>(columns + step * STEP_WIDTH);
    for (int r = 0; r < kStripRows; ++r) {
      const float x = rows[r * ROW_WIDTH + step];
      sums[r][0] += x * words[0];
      sums[r][1] += x * words[1];
    }
  }
}

template <int LANES, class ElementOfQK, int D>
struct Scores {
  using Element = ElementOfQK;
  using Float = typename Vector<LANES>::Float;
  static constexpr int kKeyBytes = kBlock * D * 4;

  template <class Between>
  static PAROATTN_INLINE void compute(const uint32_t* query, const char* key, const uint32_t* start, Band& band,
                                      int strip, Between between) {
    for (int r = 0; r < kStripRows; ++r) between(strip + r);
    for (int first = 0; first < kBlock; first += 2 * LANES) {
      const Float* begin = reinterpret_cast<const Float*>(start + first);
      Float sums[kStripRows][2];
      for (int r = 0; r < kStripRows; ++r) sums[r][0] = begin[0], sums[r][1] = begin[1];
      multiply<LANES, D, D, kBlock>(sums, reinterpret_cast<const float*>(query),
                                    reinterpret_cast<const float*>(key) + first);
      for (int r = 0; r < kStripRows; ++r) std::memcpy(&band.scores[strip + r][first], sums[r], sizeof sums[r]);
    }
    for (int r = strip; r < strip + kStripRows; ++r) {
      band.max[r] = largest(reinterpret_cast<const float*>(band.scores[r]));
    }
  }

 private:
  // NaN if there is one.
  static float largest(const float* scores) {
    float lanes[LANES], sum = 0;
    for (int i = 0; i < LANES; ++i) lanes[i] = scores[i];
    for (int i = 0; i < kBlock; ++i) lanes[i % LANES] = scores[i] > lanes[i % LANES] ? scores[i] : lanes[i % LANES];
    for (int i = 0; i < kBlock; ++i) sum += scores[i] * 0.0f;
    float largest = lanes[0];
    for (float x : lanes) largest = x > largest ? x : largest;
    return sum == sum ? largest : sum;
  }
};

template <int LANES, class ElementOfPV, int D>
struct Values {
  using Element = ElementOfPV;
  using Float = typename Vector<LANES>::Float;
  using Int = typename Vector<LANES>::Int;
  static constexpr int kValueBytes = kBlock * D * 4;
  static constexpr bool kInteger = std::is_same<Element, Integer>::value;
  using Order = TokenOrder;

  struct Probabilities {
    alignas(64) float row[kStripRows][kBlock];
  };

  static float total_unit(Format) { return 1.0f; }
  static float probability_unit(Format format) { return kInteger ? float(probability_steps(format)) : 1.0f; }

  template <class Scores>
  static PAROATTN_INLINE void exponent(const Band& band, int r, Probabilities& p, float* total) {
    const float* scores = reinterpret_cast<const float*>(band.scores[r]);
    const float one = kInteger ? float(band.steps) : 1.0f;
    for (int first = 0; first < kBlock; first += LANES) {
      Float logits, e;
      std::memcpy(&logits, scores + first, sizeof logits);
      e = exp2_clamped<LANES, 6>((logits - band.max[r]) * band.factor);
      for (int i = 0; i < LANES; ++i) {
        const float shown = band.shown >> (first + i) & 1 ? e[i] : 0.0f;
        total[(first + i) % 16] += band.weight[r] * shown;
        p.row[r % kStripRows][first + i] = bit_cast<float>(Element::bits(shown * one));
      }
    }
  }

  static PAROATTN_INLINE void add(const Probabilities& p, const Band& band, int strip, float* output) {
    for (int first = 0; first < D; first += 2 * LANES) {
      Float sums[kStripRows][2] = {};
      multiply<LANES, kBlock, kBlock, D>(sums, p.row[0], reinterpret_cast<const float*>(band.value) + first);
      for (int r = 0; r < kStripRows; ++r) {
        Float* out = reinterpret_cast<Float*>(output + r * D + first);
        out[0] += band.value_weight[strip + r] * sums[r][0];
        out[1] += band.value_weight[strip + r] * sums[r][1];
      }
    }
  }
};

// ---- The table of functions

template <int LANES, class QueryKey, class Value, int D>
Kernel make_kernel() {
  using S = Scores<LANES, QueryKey, D>;
  using V = Values<LANES, Value, D>;
  return {size_t(S::kKeyBytes),
          size_t(V::kValueBytes),
          measure,
          pack<QueryKey, Value, TokenOrder, D>,
          pack_means<QueryKey, Value, TokenOrder, D>,
          attend<S, V, D>};
}

template <int LANES, class QueryKey, int D>
Kernel kernel_for_pv(Format pv) {
  if (is_integer(pv)) return make_kernel<LANES, QueryKey, Integer, D>();
  if (pv == Format::kBf16) return make_kernel<LANES, QueryKey, Bfloat16, D>();
  return make_kernel<LANES, QueryKey, FloatElement, D>();
}

template <int LANES, int D>
Kernel kernel_for_formats(Format qk, Format pv) {
  if (is_integer(qk)) return kernel_for_pv<LANES, Integer, D>(pv);
  if (qk == Format::kBf16) return kernel_for_pv<LANES, Bfloat16, D>(pv);
  return kernel_for_pv<LANES, FloatElement, D>(pv);
}

template <int LANES>
Kernel narrowest_kernel(Format qk, Format pv, int head_dim) {
  if (head_dim <= 64) return kernel_for_formats<LANES, 64>(qk, pv);
  return head_dim <= 128 ? kernel_for_formats<LANES, 128>(qk, pv) : kernel_for_formats<LANES, 256>(qk, pv);
}

}  // namespace
}  // namespace paroattn
