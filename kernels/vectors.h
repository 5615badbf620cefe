// Eight floats at a time: the compiler makes of it what the processor has.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

typedef float Floats __attribute__((vector_size(32)));
typedef float Quad __attribute__((vector_size(16)));
constexpr int64_t WIDTH = 8;

inline Floats load(const float* at) {
  Floats result;
  std::memcpy(&result, at, sizeof(result));
  return result;
}
inline void store(Floats x, float* at) { std::memcpy(at, &x, sizeof(x)); }
inline Floats all(float x) { return Floats{x, x, x, x, x, x, x, x}; }
inline Quad folded(Floats x) {
  return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
}
inline float sum(Floats x) {
  const Quad half = folded(x);
  return (half[0] + half[1]) + (half[2] + half[3]);
}

// A number as an argument that a lambda can use as a constant.
template <int N>
constexpr std::integral_constant<int, N> constant{};

}  // namespace
