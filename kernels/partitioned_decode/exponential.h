// The exponential of the logits.

#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

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
