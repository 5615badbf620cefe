// Numbers as weights and caches hold them, and as they are computed with: float32.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

inline float number(float x) { return x; }
inline float number(double x) { return static_cast<float>(x); }
inline float number(BFloat x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline float number(Half x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, 2);
  return static_cast<float>(value);
}

inline void put(float x, float* at) { *at = x; }
inline void put(float x, Half* at) {
  const _Float16 value = static_cast<_Float16>(x);
  std::memcpy(&at->bits, &value, 2);
}
inline void put(float x, BFloat* at) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // Round to nearest even; NaN stays NaN.
  at->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

typedef uint16_t Shorts __attribute__((vector_size(16)));
typedef uint32_t Unsigned __attribute__((vector_size(32)));
typedef _Float16 Halves __attribute__((vector_size(16)));

// Eight numbers from `at` on.
inline Floats load(const Half* at) {
#if defined(__F16C__)  // of the lines below GCC makes eight conversions
  return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#else
  Halves halves;
  std::memcpy(&halves, at, sizeof(halves));
  return __builtin_convertvector(halves, Floats);
#endif
}
inline Floats load(const BFloat* at) {
#if defined(__AVX2__)  // of the lines below GCC makes five instructions
  const Unsigned wide = Unsigned(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#else
  Shorts shorts;
  std::memcpy(&shorts, at, sizeof(shorts));
  const Unsigned wide = __builtin_convertvector(shorts, Unsigned);
#endif
  const Unsigned bits = wide << 16;
  Floats result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

}  // namespace
