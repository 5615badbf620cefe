// CPU kernel of avl::narrow_linear: a few rows times a weight. Each weight is read once for all rows, at the speed of
// memory, where a matrix product made for many rows packs or re-reads it.

#include "vectors.h"

namespace {

// ROWS rows of the input times COLUMNS rows of the weight.
template <int ROWS, int COLUMNS>
inline void block(const float* input, const float* weight, const float* bias, float* out, int64_t features, int64_t input_row,
                  int64_t weight_row, int64_t out_row) {
  Floats kept[ROWS][COLUMNS] = {};
  const int64_t whole = features / WIDTH * WIDTH;
  for (int64_t k = 0; k < whole; k += WIDTH) {
    Floats w[COLUMNS];
#pragma GCC unroll 4
    for (int n = 0; n < COLUMNS; ++n) w[n] = load(weight + n * weight_row + k);
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
      const Floats x = load(input + m * input_row + k);
#pragma GCC unroll 4
      for (int n = 0; n < COLUMNS; ++n) kept[m][n] += x * w[n];
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < COLUMNS; ++n) {
      float result = sum(kept[m][n]);
      for (int64_t k = whole; k < features; ++k)
        result += input[m * input_row + k] * weight[n * weight_row + k];
      out[m * out_row + n] = result + (bias ? bias[n] : 0.0f);
    }
}

template <int COLUMNS>
inline void columns(const float* input, const float* weight, const float* bias, float* out, int64_t rows, int64_t features,
                    int64_t input_row, int64_t weight_row, int64_t out_row) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4)
    block<4, COLUMNS>(input + m * input_row, weight, bias, out + m * out_row, features, input_row, weight_row, out_row);
  for (; m + 2 <= rows; m += 2)
    block<2, COLUMNS>(input + m * input_row, weight, bias, out + m * out_row, features, input_row, weight_row, out_row);
  for (; m < rows; ++m)
    block<1, COLUMNS>(input + m * input_row, weight, bias, out + m * out_row, features, input_row, weight_row, out_row);
}

}  // namespace

// input [rows, features], weight [wide, features], bias [wide] or null, out [rows, wide].
extern "C" void avl_narrow_linear(const float* input, const float* weight, const float* bias, float* out,
                                  const int64_t* sizes) {
  const int64_t rows = sizes[0], features = sizes[1], wide = sizes[2], input_row = sizes[3], weight_row = sizes[4],
                threads = sizes[5];
  // One row has the fewest sums under way: it takes four weight rows at a time, more rows take two.
  const int64_t pairs = (wide + 3) / 4;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < pairs; ++task) {
    for (int64_t n = task * 4, end = n + 4 < wide ? n + 4 : wide; n < end;) {
      const float *w = weight + n * weight_row, *b = bias ? bias + n : nullptr;
      if (rows == 1 && n + 4 <= end) {
        columns<4>(input, w, b, out + n, rows, features, input_row, weight_row, wide);
        n += 4;
      } else if (n + 2 <= end) {
        columns<2>(input, w, b, out + n, rows, features, input_row, weight_row, wide);
        n += 2;
      } else {
        columns<1>(input, w, b, out + n, rows, features, input_row, weight_row, wide);
        n += 1;
      }
    }
  }
}
