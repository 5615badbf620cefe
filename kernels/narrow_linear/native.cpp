// CPU kernel of avl::narrow_linear: a few rows times a weight. Each weight is read once for all rows, at the speed of
// memory, where a matrix product made for many rows packs or re-reads it.
//
// A core fetches ahead of what it reads as long as that goes on in one direction. So a thread walks through its part of
// the weight in a few streams, each from its beginning to its end: neighbouring rows taken together would begin anew a
// few kilobytes further on each time, and wait for memory there.

#include "numbers.h"

namespace {

constexpr int STREAMS = 3;
// Sums under way, one vector from each stream and one of the input have to fit into the registers. As many rows as that
// share a load of the weight: with half as many, the second half computes while memory waits.
#if defined(__AVX512VL__)
constexpr int ROWS_AT_ONCE = 8;
#else
constexpr int ROWS_AT_ONCE = 4;
#endif
// The more rows share a weight, the later a core asks for the next one by itself: bytes to ask for in advance.
constexpr int64_t AHEAD = 2048;

// ROWS rows of the input times one row of the weight from each of COUNT streams.
template <int ROWS, int COUNT, bool FETCH, typename T>
inline void block(const float* input, const T* const* weight, const T* const* bias, T* const* out, int64_t features,
                  int64_t input_row, int64_t out_row) {
  Floats kept[ROWS][COUNT] = {};
  const int64_t whole = features / WIDTH * WIDTH;
  for (int64_t k = 0; k < whole; k += WIDTH) {
    Floats w[COUNT];
#pragma GCC unroll 8
    for (int n = 0; n < COUNT; ++n) {
      w[n] = load(weight[n] + k);
      if (FETCH) __builtin_prefetch(weight[n] + k + AHEAD / sizeof(T), 0, 2);
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const Floats x = load(input + m * input_row + k);
#pragma GCC unroll 8
      for (int n = 0; n < COUNT; ++n) kept[m][n] += x * w[n];
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < COUNT; ++n) {
      float result = sum(kept[m][n]);
      for (int64_t k = whole; k < features; ++k) result += input[m * input_row + k] * number(weight[n][k]);
      put(result + (bias[n] ? number(*bias[n]) : 0.0f), out[n] + m * out_row);
    }
}

// All rows of the input times rows first, first + apart, ... of the weight, one from each of COUNT streams.
template <int COUNT, typename T>
inline void rows_of(const float* input, const T* weight, const T* bias, T* out, const int64_t* sizes, int64_t first,
                    int64_t apart) {
  const int64_t rows = sizes[0], features = sizes[1], wide = sizes[2], input_row = sizes[3], weight_row = sizes[4];
  const T *w[COUNT], *b[COUNT];
  T* o[COUNT];
  for (int n = 0; n < COUNT; ++n) {
    const int64_t row = first + n * apart;
    w[n] = weight + row * weight_row;
    b[n] = bias ? bias + row : nullptr;
    o[n] = out + row;
  }
  const int64_t blocks = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  for (int64_t i = 0, m = 0; i < blocks; ++i) {
    const int64_t count = rows * (i + 1) / blocks - m;
    const auto multiply = [&](auto number) {
      if (number() != count) return;
      const float* given = input + m * input_row;
      if (i == 0)
        block<number(), COUNT, true>(given, w, b, o, features, input_row, wide);
      else  // the weight is near by now
        block<number(), COUNT, false>(given, w, b, o, features, input_row, wide);
    };
    multiply(constant<1>), multiply(constant<2>), multiply(constant<3>), multiply(constant<4>);
    if constexpr (ROWS_AT_ONCE > 4)
      multiply(constant<5>), multiply(constant<6>), multiply(constant<7>), multiply(constant<8>);
    m += count;
    for (int n = 0; n < COUNT; ++n) o[n] += count * wide;
  }
}

template <typename T>
void multiply(const float* input, const T* weight, const T* bias, T* out, const int64_t* sizes) {
  const int64_t wide = sizes[2];
  // Threads cost some microseconds to wake.
  const int64_t threads = wide * sizes[1] * sizes[0] < 32768 ? 1 : sizes[5];
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t thread = 0; thread < threads; ++thread) {
    const int64_t begin = wide * thread / threads, end = wide * (thread + 1) / threads, each = (end - begin) / STREAMS;
    for (int64_t row = begin; row < begin + each; ++row) rows_of<STREAMS>(input, weight, bias, out, sizes, row, each);
    for (int64_t row = begin + STREAMS * each; row < end; ++row)
      rows_of<1>(input, weight, bias, out, sizes, row, 0);
  }
}

}  // namespace

// input [rows, features], weight [wide, features], bias [wide] or null, out [rows, wide]; all but the input, which is
// float32, hold elements of one kind: 0 float32, 1 float16, 2 bfloat16.
extern "C" void avl_narrow_linear(const float* input, const void* weight, const void* bias, void* out,
                                  const int64_t* sizes) {
  const auto of = [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    multiply(input, static_cast<const T*>(weight), static_cast<const T*>(bias), static_cast<T*>(out), sizes);
  };
  switch (sizes[6]) {
    case 0: return of(static_cast<float*>(nullptr));
    case 1: return of(static_cast<Half*>(nullptr));
    case 2: return of(static_cast<BFloat*>(nullptr));
  }
}
