// Numbers as caches hold them, and as they are computed with: float32.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
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
  Shorts shorts;
  std::memcpy(&shorts, at, sizeof(shorts));
  const Unsigned bits = __builtin_convertvector(shorts, Unsigned) << 16;
  Floats result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

typedef int32_t Ints __attribute__((vector_size(32)));

// e^x for x <= 0 to about one unit in the last place. NaN stays NaN; below -87, and at -inf, it is 0.
inline Floats exponential(Floats x) {
  const Ints low = x < all(-87.0f);
  const Floats bounded = low ? all(-87.0f) : x;
  const Floats shifted = bounded * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const Floats n = shifted - 12582912.0f;
  const Floats r = bounded - n * 0.693359375f - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4b400000 + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof(power));
  return low ? all(0.0f) : p * power;
}
inline float exponential(float x) { return exponential(all(x))[0]; }

}  // namespace
