// CPU kernel of avl::narrow_linear: a few rows times a weight. Each weight is read once for all rows, at the speed of
// memory, where a matrix product made for many rows packs or re-reads it.
//
// A core fetches ahead of what it reads as long as that goes on in one direction. So a thread walks through its part of
// the weight in a few streams, each from its beginning to its end: neighbouring rows taken together would begin anew a
// few kilobytes further on each time, and wait for memory there.

#include <type_traits>

#include "vectors.h"

namespace {

template <int N>
constexpr std::integral_constant<int, N> number{};

constexpr int STREAMS = 4;
// Sums under way, what is multiplied and one row of the input have to fit into the registers.
#if defined(__AVX512VL__)
constexpr int ROWS_AT_ONCE = 4;
#else
constexpr int ROWS_AT_ONCE = 2;
#endif
// Where a stream is multiplied by more rows than that, it is left waiting meanwhile: floats to ask for in advance.
constexpr int64_t AHEAD = 512;

// ROWS rows of the input times one row of the weight from each of COUNT streams.
template <int ROWS, int COUNT, bool FETCH>
inline void block(const float* input, const float* const* weight, const float* const* bias, float* const* out,
                  int64_t features, int64_t input_row, int64_t out_row) {
  Floats kept[ROWS][COUNT] = {};
  const int64_t whole = features / WIDTH * WIDTH;
  for (int64_t k = 0; k < whole; k += WIDTH) {
    Floats w[COUNT];
#pragma GCC unroll 4
    for (int n = 0; n < COUNT; ++n) {
      w[n] = load(weight[n] + k);
      if (FETCH) __builtin_prefetch(weight[n] + k + AHEAD, 0, 2);
    }
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
      const Floats x = load(input + m * input_row + k);
#pragma GCC unroll 4
      for (int n = 0; n < COUNT; ++n) kept[m][n] += x * w[n];
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < COUNT; ++n) {
      float result = sum(kept[m][n]);
      for (int64_t k = whole; k < features; ++k) result += input[m * input_row + k] * weight[n][k];
      out[n][m * out_row] = result + (bias[n] ? *bias[n] : 0.0f);
    }
}

// All rows of the input times rows first, first + apart, ... of the weight, one from each of COUNT streams.
template <int COUNT>
inline void rows_of(const float* input, const float* weight, const float* bias, float* out, const int64_t* sizes,
                    int64_t first, int64_t apart) {
  const int64_t rows = sizes[0], features = sizes[1], wide = sizes[2], input_row = sizes[3], weight_row = sizes[4];
  const float *w[COUNT], *b[COUNT];
  float* o[COUNT];
  for (int n = 0; n < COUNT; ++n) {
    const int64_t row = first + n * apart;
    w[n] = weight + row * weight_row;
    b[n] = bias ? bias + row : nullptr;
    o[n] = out + row;
  }
  int64_t m = 0;
  const auto multiply = [&](auto count, auto fetch) {
    block<count(), COUNT, fetch()>(input + m * input_row, w, b, o, features, input_row, wide);
    m += count();
    for (int n = 0; n < COUNT; ++n) o[n] += count() * wide;
  };
  if (rows > ROWS_AT_ONCE) multiply(number<ROWS_AT_ONCE>, std::true_type{});  // the others find the weight near
  while (m + ROWS_AT_ONCE <= rows) multiply(number<ROWS_AT_ONCE>, std::false_type{});
  if (ROWS_AT_ONCE > 2 && rows - m == 3) multiply(number<3>, std::false_type{});
  if (rows - m == 2) multiply(number<2>, std::false_type{});
  if (rows - m == 1) multiply(number<1>, std::false_type{});
}

}  // namespace

// input [rows, features], weight [wide, features], bias [wide] or null, out [rows, wide].
extern "C" void avl_narrow_linear(const float* input, const float* weight, const float* bias, float* out,
                                  const int64_t* sizes) {
  const int64_t wide = sizes[2], threads = sizes[5];
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t thread = 0; thread < threads; ++thread) {
    const int64_t begin = wide * thread / threads, end = wide * (thread + 1) / threads, each = (end - begin) / STREAMS;
    for (int64_t row = begin; row < begin + each; ++row) rows_of<STREAMS>(input, weight, bias, out, sizes, row, each);
    for (int64_t row = begin + STREAMS * each; row < end; ++row)
      rows_of<1>(input, weight, bias, out, sizes, row, 0);
  }
}
