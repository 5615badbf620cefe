// What is done with the keys and values of one tile, for the query heads of a group together.

#pragma once

#include <cstdint>
#include <cstring>

#include "exponential.h"
#include "numbers.h"

namespace {

constexpr int64_t TILE = 64;
// Elements of a line of the processor's cache.
template <typename T>
constexpr int64_t LINE = 64 / sizeof(T);

// Has a row's memory fetched meanwhile.
template <typename T>
inline void ask_for(const T* row, int64_t dim) {
  for (int64_t i = 0; i < dim; i += LINE<T>) __builtin_prefetch(row + i, 0, 2);
}

inline Quad sums(Floats a, Floats b, Floats c, Floats d) {
  const Quad qa = folded(a), qb = folded(b), qc = folded(c), qd = folded(d);
  const Quad ab = __builtin_shufflevector(qa, qb, 0, 4, 1, 5) + __builtin_shufflevector(qa, qb, 2, 6, 3, 7);
  const Quad cd = __builtin_shufflevector(qc, qd, 0, 4, 1, 5) + __builtin_shufflevector(qc, qd, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// So many query heads of a group share each load of a key or value.
constexpr int HEADS_AT_ONCE = 4;
// Vectors of sums under way; with what they are multiplied by they have to fit into the registers.
#if defined(__AVX512VL__)
constexpr int SUMS = 24;
#else
constexpr int SUMS = 12;
#endif

// Products of HEADS queries with `count` keys, a row of TILE for each query. Four keys at a time keep enough sums under
// way. DIM 0: any number. `later`: the keys to ask for meanwhile.
template <int64_t DIM, int HEADS, typename T>
inline void products(const float* q, const T* const* keys, const T* const* later, int64_t count, int64_t dim,
                     float* out) {
  const int64_t n = DIM ? DIM : dim, whole = n / WIDTH * WIDTH;
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) {
    const T* const* k = keys + t;
    Floats kept[HEADS][4] = {};
    for (int64_t i = 0; i < whole; i += WIDTH) {
      Floats row[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        row[j] = load(k[j] + i);
        if (i % LINE<T> == 0) __builtin_prefetch(later[t + j] + i, 0, 2);
      }
#pragma GCC unroll 4
      for (int h = 0; h < HEADS; ++h) {
        const Floats x = load(q + h * n + i);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) kept[h][j] += x * row[j];
      }
    }
    for (int h = 0; h < HEADS; ++h) {
      Quad four = sums(kept[h][0], kept[h][1], kept[h][2], kept[h][3]);
      for (int64_t i = whole; i < n; ++i)
        four += q[h * n + i] * Quad{number(k[0][i]), number(k[1][i]), number(k[2][i]), number(k[3][i])};
      std::memcpy(out + h * TILE + t, &four, sizeof(four));
    }
  }
  for (; t < count; ++t)
    for (int h = 0; h < HEADS; ++h) {
      Floats one = {};
      for (int64_t i = 0; i < whole; i += WIDTH) one += load(q + h * n + i) * load(keys[t] + i);
      float& result = out[h * TILE + t] = sum(one);
      for (int64_t i = whole; i < n; ++i) result += q[h * n + i] * number(keys[t][i]);
    }
}

// `CHUNKS` vectors of out = out * factor + sum over keys of weight * row for HEADS query heads, held in registers
// meanwhile.
template <int HEADS, int CHUNKS, typename T>
inline void accumulate_chunks(float* out, const float* factor, const float* weights, const T* const* rows,
                              const T* const* later, int64_t count, int64_t dim, int64_t at) {
  Floats kept[HEADS][CHUNKS];
  for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 8
    for (int i = 0; i < CHUNKS; ++i) kept[h][i] = load(out + h * dim + at + i * WIDTH) * factor[h];
  for (int64_t t = 0; t < count; ++t) {
    const T* row = rows[t] + at;
    Floats w[HEADS];
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; ++h) w[h] = all(weights[h * TILE + t]);
#pragma GCC unroll 8
    for (int i = 0; i < CHUNKS; ++i) {
      const Floats x = load(row + i * WIDTH);
      if (i * WIDTH % LINE<T> == 0) __builtin_prefetch(later[t] + at + i * WIDTH, 0, 2);
#pragma GCC unroll 4
      for (int h = 0; h < HEADS; ++h) kept[h][i] += w[h] * x;
    }
  }
  for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 8
    for (int i = 0; i < CHUNKS; ++i) store(kept[h][i], out + h * dim + at + i * WIDTH);
}

template <int HEADS, typename T>
inline void accumulate(float* out, const float* factor, const float* weights, const T* const* rows,
                       const T* const* later, int64_t count, int64_t dim) {
  constexpr int MANY = SUMS >= 8 * HEADS ? 8 : SUMS >= 4 * HEADS ? 4 : 2;
  int64_t at = 0;
  for (; at + MANY * WIDTH <= dim; at += MANY * WIDTH)
    accumulate_chunks<HEADS, MANY>(out, factor, weights, rows, later, count, dim, at);
  for (; at + WIDTH <= dim; at += WIDTH)
    accumulate_chunks<HEADS, 1>(out, factor, weights, rows, later, count, dim, at);
  for (; at < dim; ++at)
    for (int h = 0; h < HEADS; ++h) {
      float kept = out[h * dim + at] * factor[h];
      for (int64_t t = 0; t < count; ++t) kept += weights[h * TILE + t] * number(rows[t][at]);
      out[h * dim + at] = kept;
    }
}

// Calls `work(first head, how many of them)`, the number a constant, until the group is through.
template <typename Work>
inline void in_heads(int64_t group, const Work& work) {
  for (int64_t first = 0; first < group; first += HEADS_AT_ONCE) {
    const int64_t left = group - first;
    if (left >= 4) work(first, constant<4>);
    else if (left == 3) work(first, constant<3>);
    else if (left == 2) work(first, constant<2>);
    else work(first, constant<1>);
  }
}

}  // namespace
