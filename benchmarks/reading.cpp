// Reads arrays of floats and does nothing else: what no decode step can beat that reads them one after the other.

#include "vectors.h"

namespace {

// The sum of thread `thread`'s share of an array; sixteen loads under way.
inline float share_of(const float* at, int64_t count, int64_t thread, int64_t threads) {
  const int64_t block = 16 * WIDTH, blocks = count / block;
  const int64_t begin = blocks * thread / threads * block, end = blocks * (thread + 1) / threads * block;
  Floats kept[16] = {};
  for (int64_t k = begin; k < end; k += block) {
#pragma GCC unroll 16
    for (int n = 0; n < 16; ++n) kept[n] += load(at + k + n * WIDTH);
  }
  float total = 0.0f;
  for (int n = 0; n < 16; ++n) total += sum(kept[n]);
  if (thread == threads - 1)
    for (int64_t k = blocks * block; k < count; ++k) total += at[k];
  return total;
}

}  // namespace

// `sizes`: how many arrays, threads, and whether one parallel region serves all of them (with a barrier behind each, as
// each layer of a model waits for the one before). `totals`: a sum for each array and thread.
extern "C" void avl_read(const float* const* arrays, const int64_t* counts, float* totals, const int64_t* sizes) {
  const int64_t number = sizes[0], threads = sizes[1];
  if (sizes[2]) {
#pragma omp parallel num_threads(threads)
    for (int64_t i = 0; i < number; ++i) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < threads; ++t) totals[i * threads + t] = share_of(arrays[i], counts[i], t, threads);
    }
    return;
  }
  for (int64_t i = 0; i < number; ++i) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < threads; ++t) totals[i * threads + t] = share_of(arrays[i], counts[i], t, threads);
  }
}
