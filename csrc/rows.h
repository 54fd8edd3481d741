// Rows of float32, float16 and bfloat16 as float32, and back. Plain loops that compilers turn into vector code.
//
// This header and the others that kernels include have internal linkage: they are compiled for several CPUs, and the
// linker must not merge those versions.
#pragma once

#include <cstring>

#include "attention.h"

namespace paroattn {
namespace {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float from_bfloat16(uint16_t x) { return bit_cast<float>(uint32_t(x) << 16); }

// Rounds to nearest even; NaN stays NaN.
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? uint16_t(rounded) : uint16_t(0x7fc0);
}

inline float from_float16(uint16_t x) {
  const uint32_t magnitude = uint32_t(x & 0x7fff) << 13;
  const bool special = magnitude >= 0x0f800000;  // infinity or NaN
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t bits = special ? magnitude | 0x7f800000 : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(bits | uint32_t(x & 0x8000) << 16);
}

// Rounds to nearest even, overflows to infinity, keeps subnormals; NaN stays NaN.
inline uint16_t to_float16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves a subnormal's bits, correctly rounded, at the bottom of the sum.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t half = magnitude >= 0x47800000 ? special : magnitude < 0x38800000 ? subnormal : normal;
  return uint16_t(half | sign);
}

// An element type of tensors, as rows hold it.
struct Float32Rows {
  using Stored = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};

struct Float16Rows {
  using Stored = uint16_t;
  static float load(uint16_t x) { return from_float16(x); }
  static uint16_t store(float x) { return to_float16(x); }
};

struct Bfloat16Rows {
  using Stored = uint16_t;
  static float load(uint16_t x) { return from_bfloat16(x); }
  static uint16_t store(float x) { return to_bfloat16(x); }
};

// Calls `function` with the element type of the rows, once for many of them.
template <class Function>
inline auto with_type(const Rows& rows, Function function) {
  if (rows.type == DataType::kFloat32) return function(Float32Rows());
  if (rows.type == DataType::kBfloat16) return function(Bfloat16Rows());
  return function(Float16Rows());
}

// The token at a position of the reordered sequence.
inline int64_t token_at(const Head& head, int64_t position) { return head.order ? head.order[position] : position; }

template <class Type>
inline typename Type::Stored* row_at(const Rows& rows, int64_t token) {
  return static_cast<typename Type::Stored*>(rows.data) + token * rows.stride;
}

}  // namespace
}  // namespace paroattn
