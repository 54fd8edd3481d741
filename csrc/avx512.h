// Products, exponents and packing for AVX-512. Included by one translation unit per set of instructions.
#pragma once

#include <immintrin.h>

#include "attend.h"

namespace paroattn {
namespace {

// ---- Elements and how 32-bit words of them are multiplied: sums += word * 16 words, over kDepth elements each.

// Integers of 8 bits; vpdpbusd wants one side unsigned: q + 128 and P.
struct Int8 {
  static constexpr int kDepth = 4;
  static constexpr bool kUnsignedQuery = true;
  using Storage = uint8_t;
  using Sums = __m512i;
  static uint32_t bits(float x) { return bit_cast<uint32_t>(x + kRoundingConstant); }  // the low byte is the integer
  static uint32_t hidden_score() { return uint32_t(-(1 << 30)); }
  static uint32_t add_to_score(uint32_t score, float x) {  // x <= 0 or NaN
    return score + uint32_t(int32_t(x > -0x1p29f ? x - 0.5f : -0x1p29f));
  }
  static PAROATTN_INLINE Sums start(__m512i words) { return words; }
  static PAROATTN_INLINE Sums multiply_add(Sums sums, __m512i word, __m512i words) {
    return _mm512_dpbusd_epi32(sums, word, words);
  }
  static PAROATTN_INLINE __m512 to_float(Sums sums) { return _mm512_cvtepi32_ps(sums); }
};

struct Float32 : FloatElement {
  using Sums = __m512;
  static PAROATTN_INLINE Sums start(__m512i words) { return _mm512_castsi512_ps(words); }
  static PAROATTN_INLINE Sums multiply_add(Sums sums, __m512i word, __m512i words) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(word), _mm512_castsi512_ps(words), sums);
  }
  static PAROATTN_INLINE __m512 to_float(Sums sums) { return sums; }
};

#ifdef __AVX512BF16__
struct Bfloat16 : Float32 {
  static constexpr int kDepth = 2;
  using Storage = uint16_t;
  static uint32_t bits(float x) { return to_bfloat16(x); }
  static PAROATTN_INLINE Sums multiply_add(Sums sums, __m512i word, __m512i words) {
    return _mm512_dpbf16_ps(sums, (__m512bh)word, (__m512bh)words);
  }
};
#else
// Values of bfloat16, multiplied as floats.
struct Bfloat16 : Float32 {
  static uint32_t bits(float x) { return uint32_t(to_bfloat16(x)) << 16; }
};
#endif

// sums += 4 rows of words times 64 columns, over STEPS words. A row's words are adjacent, rows ROW_WORDS apart; the
// words of a step, one per column, are adjacent, steps STEP_WORDS apart.
template <class Element, int STEPS, int ROW_WORDS, int STEP_WORDS>
PAROATTN_INLINE void multiply(typename Element::Sums (&sums)[kStripRows][4], const uint32_t* rows,
                              const uint32_t* columns) {
#pragma GCC unroll 16
  for (int step = 0; step < STEPS; ++step) {
    __m512i words[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) words[i] = _mm512_loadu_si512(columns + step * STEP_WORDS + 16 * i);
#pragma GCC unroll 4
    for (int r = 0; r < kStripRows; ++r) {
      const __m512i word = _mm512_set1_epi32(int32_t(rows[r * ROW_WORDS + step]));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[r][i] = Element::multiply_add(sums[r][i], word, words[i]);
    }
  }
}

// ---- Scores

// The largest of each of four vectors.
PAROATTN_INLINE __m128 horizontal_max(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));  // a b a b in each lane
  const __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512 abcd = _mm512_max_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  abcd = _mm512_max_ps(abcd, _mm512_shuffle_f32x4(abcd, abcd, 0x4e));
  abcd = _mm512_max_ps(abcd, _mm512_shuffle_f32x4(abcd, abcd, 0xb1));
  return _mm512_castps512_ps128(abcd);
}

PAROATTN_INLINE __m512 max_of(const __m512i (&x)[4]) {
  return _mm512_cvtepi32_ps(_mm512_max_epi32(_mm512_max_epi32(x[0], x[1]), _mm512_max_epi32(x[2], x[3])));
}

PAROATTN_INLINE __m512 max_of(const __m512 (&x)[4]) {
  return _mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3]));
}

// Rows that hold a NaN, which max_of may lose. Integer scores have none: there a NaN is in the factor.
PAROATTN_INLINE bool has_nan(const __m512i (&)[4]) { return false; }

PAROATTN_INLINE bool has_nan(const __m512 (&x)[4]) {
  return (_mm512_cmp_ps_mask(x[0], x[1], _CMP_UNORD_Q) | _mm512_cmp_ps_mask(x[2], x[3], _CMP_UNORD_Q)) != 0;
}

template <class ElementOfQK, int D>
struct Scores {
  using Element = ElementOfQK;
  static constexpr int kWords = D / Element::kDepth;
  static constexpr int kKeyBytes = kBlock * kWords * 4;

  template <class Between>
  static PAROATTN_INLINE void compute(const typename Element::Storage* query, const char* key, const uint32_t* start,
                                      Band& band, int strip, Between between) {
    typename Element::Sums sums[kStripRows][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i words = _mm512_loadu_si512(start + 16 * i);
#pragma GCC unroll 4
      for (int r = 0; r < kStripRows; ++r) sums[r][i] = Element::start(words);
    }
    constexpr int kPart = kWords / kStripRows;
    for (int part = 0; part < kStripRows; ++part) {
      between(strip + part);
      multiply<Element, kPart, kWords, kBlock>(sums, reinterpret_cast<const uint32_t*>(query) + part * kPart,
                                               reinterpret_cast<const uint32_t*>(key) + part * kPart * kBlock);
    }
    _mm_store_ps(band.max + strip, horizontal_max(max_of(sums[0]), max_of(sums[1]), max_of(sums[2]), max_of(sums[3])));
#pragma GCC unroll 4
    for (int r = 0; r < kStripRows; ++r) {
      if (has_nan(sums[r])) band.max[strip + r] = __builtin_nanf("");
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) std::memcpy(&band.scores[strip + r][16 * i], &sums[r][i], 64);
    }
  }

  // Scores 16 i ... 16 i + 15 of a row.
  static PAROATTN_INLINE __m512 load(const Band& band, int r, int i) {
    typename Element::Sums sums;
    std::memcpy(&sums, &band.scores[r][16 * i], 64);
    return Element::to_float(sums);
  }
};

// ---- Values

// total[0 ... 15] += weight * sums
PAROATTN_INLINE void add_to_total(float* total, float weight, __m512 sums) {
  _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_set1_ps(weight), sums, _mm512_load_ps(total)));
}

// output += weight * P v, for a strip of P as words.
template <class Element, int D>
PAROATTN_INLINE void add_product(const uint32_t* p, const Band& band, int strip, float* output) {
  constexpr int kWords = kBlock / Element::kDepth;
  const uint32_t* value = reinterpret_cast<const uint32_t*>(band.value);
  for (int first = 0; first < D; first += 64) {
    // Makes the compiler read P anew: kept for the next 64 channels, it would fill all registers and more.
    __asm__ volatile("" ::: "memory");
    typename Element::Sums sums[kStripRows][4];
#pragma GCC unroll 4
    for (int r = 0; r < kStripRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[r][i] = Element::start(_mm512_setzero_si512());
    }
    multiply<Element, kWords, kWords, D>(sums, p, value + first);
#pragma GCC unroll 4
    for (int r = 0; r < kStripRows; ++r) {
      const __m512 weight = _mm512_set1_ps(band.value_weight[strip + r]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        float* out = output + r * D + first + 16 * i;
        _mm512_store_ps(out, _mm512_fmadd_ps(weight, Element::to_float(sums[r][i]), _mm512_load_ps(out)));
      }
    }
  }
}

// 2^(-i / 64) with 15 bits.
struct PowerTable {
  alignas(64) uint16_t power[64];
  constexpr PowerTable() : power() {
    double x = kTop;
    for (int i = 0; i < 64; ++i, x *= 0.98922801319397546) power[i] = uint16_t(x + 0.5);
  }
  static constexpr int kTop = 32767;
};

constexpr PowerTable kPowers;

// P as integers. The exponent is computed on 16-bit integers, 32 at a time: t = -log2(P) is rounded to 6 fraction bits,
// which move P by 0.3% on average, a sixth of what rounding q and k does. They select a power from a table, the integer
// part shifts it.
template <int D>
struct IntegerValues {
  using Element = Int8;
  static constexpr int kValueBytes = kBlock * D;

  // _mm512_packus_* interleave the four 128-bit lanes of their operands, so byte 16 L + 4 c + e of a row of P is column
  // 16 c + 4 L + e. Packing of v follows that order; nothing has to be permuted here.
  struct Order {
    static int token(int group, int e) { return 16 * (group % 4) + 4 * (group / 4) + e; }
    // After the first of two packs: word 8 L + 4 c + e of a half is column 16 c + 4 L + e.
    static int shown(int bit) { return bit / 32 * 32 + bit % 8 / 4 * 16 + bit % 32 / 8 * 4 + bit % 4; }
  };

  struct Probabilities {
    alignas(64) uint8_t row[kStripRows][kBlock];
  };

  static float total_unit(Format) { return PowerTable::kTop; }
  static float probability_unit(Format format) { return float(probability_steps(format)); }

  static PAROATTN_INLINE __m512i exp2_negative(__m512i t, __mmask32 shown) {
    const __m512i* table = reinterpret_cast<const __m512i*>(kPowers.power);
    const __m512i power = _mm512_permutex2var_epi16(table[0], t, table[1]);  // by the lower 6 bits of t
    return _mm512_maskz_srlv_epi16(shown, power, _mm512_srli_epi16(t, 6));
  }

  template <class Scores>
  static PAROATTN_INLINE void exponent(const Band& band, int r, Probabilities& p, float* total) {
    // Larger factors overflow the conversion to integers; a step of an integer score is then above 8 powers of two, far
    // finer than the scores were rounded. Scores in floating point are clamped instead.
    constexpr bool kIntegerScores = Scores::Element::kDepth == 4;
    const float factor = 64.0f * (kIntegerScores && band.factor > 8.0f ? 8.0f : band.factor);
    const __m512 max = _mm512_set1_ps(band.max[r] * factor), factors = _mm512_set1_ps(factor);
    __m512i t[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m512 distance = _mm512_fnmadd_ps(Scores::load(band, r, i), factors, max);
      if (!kIntegerScores) distance = _mm512_min_ps(distance, _mm512_set1_ps(65535.0f));
      t[i] = _mm512_cvtps_epi32(distance);
    }
    const __m512i p0 = exp2_negative(_mm512_packus_epi32(t[0], t[1]), __mmask32(band.shown));
    const __m512i p1 = exp2_negative(_mm512_packus_epi32(t[2], t[3]), __mmask32(band.shown >> 32));
    const __m512i ones = _mm512_set1_epi16(1);
    const __m512i sums = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(_mm512_setzero_si512(), p0, ones), p1, ones);
    add_to_total(total, band.weight[r], _mm512_cvtepi32_ps(sums));
    const __m512i steps = _mm512_set1_epi16(int16_t(band.steps));
    const __m512i rounded0 = _mm512_mulhrs_epi16(p0, steps), rounded1 = _mm512_mulhrs_epi16(p1, steps);
    _mm512_store_si512(p.row[r % kStripRows], _mm512_packus_epi16(rounded0, rounded1));
  }

  static PAROATTN_INLINE void add(const Probabilities& p, const Band& band, int strip, float* output) {
    add_product<Element, D>(reinterpret_cast<const uint32_t*>(p.row), band, strip, output);
  }
};

// P as float32 or bfloat16.
template <class ElementOfPV, int D>
struct FloatValues {
  using Element = ElementOfPV;
  static constexpr int kValueBytes = kBlock * D / Element::kDepth * 4;
  static constexpr int kDegree = sizeof(typename Element::Storage) == 4 ? 6 : 4;

  struct Order {
    static int token(int group, int e) { return group * Element::kDepth + e; }
    static int shown(int bit) { return bit; }
  };

  struct Probabilities {
    alignas(64) typename Element::Storage row[kStripRows][kBlock];
  };

  static float total_unit(Format) { return 1.0f; }
  static float probability_unit(Format) { return 1.0f; }

  template <class Scores>
  static PAROATTN_INLINE void exponent(const Band& band, int r, Probabilities& p, float* total) {
    const __m512 max = _mm512_set1_ps(band.max[r]), factor = _mm512_set1_ps(band.factor);
    __m512 sums = _mm512_setzero_ps(), e[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 logit = _mm512_mul_ps(_mm512_sub_ps(Scores::load(band, r, i), max), factor);
      e[i] = _mm512_maskz_mov_ps(__mmask16(band.shown >> (16 * i)), exp2_clamped<16, kDegree>(logit));
      sums = _mm512_add_ps(sums, e[i]);
    }
    add_to_total(total, band.weight[r], sums);
    store(e, p.row[r % kStripRows], Element());
  }

  static PAROATTN_INLINE void add(const Probabilities& p, const Band& band, int strip, float* output) {
    add_product<Element, D>(reinterpret_cast<const uint32_t*>(p.row), band, strip, output);
  }

 private:
  static PAROATTN_INLINE void store(const __m512 (&e)[4], uint32_t* row, Float32) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_store_ps(row + 16 * i, e[i]);
  }

#ifdef __AVX512BF16__
  static PAROATTN_INLINE void store(const __m512 (&e)[4], uint16_t* row, Bfloat16) {
    _mm512_store_si512(row, (__m512i)_mm512_cvtne2ps_pbh(e[1], e[0]));
    _mm512_store_si512(row + 32, (__m512i)_mm512_cvtne2ps_pbh(e[3], e[2]));
  }
#else
  static PAROATTN_INLINE void store(const __m512 (&e)[4], uint32_t* row, Bfloat16) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 16; ++j) row[16 * i + j] = Bfloat16::bits(e[i][j]);
    }
  }
#endif
};

// ---- The table of functions

template <class QueryKey, class Values, int D>
Kernel make_kernel() {
  using S = Scores<QueryKey, D>;
  using Element = typename Values::Element;
  using Order = typename Values::Order;
  return {size_t(S::kKeyBytes),
          size_t(Values::kValueBytes),
          measure,
          pack<QueryKey, Element, Order, D>,
          pack_means<QueryKey, Element, Order, D>,
          attend<S, Values, D>};
}

template <class QueryKey, int D>
Kernel kernel_for_pv(Format pv) {
  if (is_integer(pv)) return make_kernel<QueryKey, IntegerValues<D>, D>();
  if (pv == Format::kBf16) return make_kernel<QueryKey, FloatValues<Bfloat16, D>, D>();
  return make_kernel<QueryKey, FloatValues<Float32, D>, D>();
}

template <int D>
Kernel kernel_for_formats(Format qk, Format pv) {
  if (is_integer(qk)) return kernel_for_pv<Int8, D>(pv);
  if (qk == Format::kBf16) return kernel_for_pv<Bfloat16, D>(pv);
  return kernel_for_pv<Float32, D>(pv);
}

inline Kernel narrowest_kernel(Format qk, Format pv, int head_dim) {
  if (head_dim <= 64) return kernel_for_formats<64>(qk, pv);
  return head_dim <= 128 ? kernel_for_formats<128>(qk, pv) : kernel_for_formats<256>(qk, pv);
}

}  // namespace
}  // namespace paroattn
