// exp2 on the compiler's vector types, so that one text serves every vector width.
#pragma once

#include <cstring>

#include "attention.h"

namespace paroattn {
namespace {

// A vector of LANES floats, and of as many integers.
template <int LANES>
struct Vector {
  typedef float Float __attribute__((vector_size(4 * LANES)));
  typedef uint32_t Int __attribute__((vector_size(4 * LANES)));
};

template <int LANES>
inline typename Vector<LANES>::Float load_vector(const float* x) {
  typename Vector<LANES>::Float vector;
  std::memcpy(&vector, x, sizeof vector);
  return vector;
}

template <class Float>
inline void store_vector(float* out, Float x) {
  std::memcpy(out, &x, sizeof x);
}

// Whether a comparison of vectors holds anywhere.
template <class Int>
inline bool any(Int condition) {
  uint64_t words[sizeof condition / 8], all = 0;
  std::memcpy(words, &condition, sizeof condition);
  for (uint64_t word : words) all |= word;
  return all != 0;
}

inline float sum_of_16(const float* x) {
  float sums[4] = {};
  for (int i = 0; i < 16; ++i) sums[i % 4] += x[i];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

constexpr float kRoundingConstant = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even

// 2^x for x <= 126; what is below 2^-125 becomes 2^-125, NaN stays NaN, 0 gives exactly 1. The relative error is that
// of the Taylor series of 2^f for |f| <= 0.5: 4e-5 for DEGREE 4, below float's own for DEGREE 6.
template <int LANES, int DEGREE>
PAROATTN_INLINE typename Vector<LANES>::Float exp2_clamped(typename Vector<LANES>::Float x) {
  using Float = typename Vector<LANES>::Float;
  using Int = typename Vector<LANES>::Int;
  constexpr float kTaylor[] = {1.0f,          6.9314718e-1f, 2.4022651e-1f, 5.5504109e-2f,
                               9.6181291e-3f, 1.3333558e-3f, 1.5403530e-4f};
  x = x < -125.0f ? Float{} - 125.0f : x;
  const Float shifted = x + kRoundingConstant;
  const Float f = x - (shifted - kRoundingConstant);
  Float p = Float{} + kTaylor[DEGREE];
#pragma GCC unroll 6
  for (int i = DEGREE - 1; i >= 0; --i) p = p * f + kTaylor[i];
  const Int power = ((Int)shifted << 23) + (127u << 23);  // 2^n from the integer n at the bottom of `shifted`
  return p * (Float)power;
}

}  // namespace
}  // namespace paroattn
