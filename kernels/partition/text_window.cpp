// The choice of text rows that stay: `avl_fx.text_window`, which says what it means and has the same in Python.

#include <algorithm>
#include <cstdint>
#include <vector>

// For each batch row: adds this step's weight (less a quantile, unless `quantile` is negative) to the score of each
// candidate, keeps `budget` of them, and fills `source` and `target` [batch, room] with the swaps that bring those that
// stay to the front. Candidates are the first `prefix` slots and, if `appended`, the last, which entered at `age`.
// Returns the most entries.
extern "C" int64_t avl_forget(const float* weights, const int64_t* slots, int64_t* tokens, float* scores,
                              const int64_t* prefix, const int64_t* counts, const int64_t* budgets, int64_t* source,
                              int64_t* target, const int64_t* sizes, double quantile) {
  const int64_t batch = sizes[0], heads = sizes[1], keys = sizes[2], capacity = sizes[3], room = sizes[4],
                appended = sizes[5], age = sizes[6];
  int64_t most = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* slot = slots + b * capacity;
    int64_t* token = tokens + b * capacity;
    float* score = scores + b * capacity;
    int64_t *from = source + b * room, *to = target + b * room;
    std::vector<int64_t> candidates;
    for (int64_t j = 0; j < prefix[b]; ++j) candidates.push_back(j);
    if (appended && counts[b] > 0) {
      const int64_t last = counts[b] - 1;
      candidates.push_back(last);
      token[last] = age;
      score[last] = 0.0f;
    }
    const int64_t n = static_cast<int64_t>(candidates.size()), budget = std::min(n, budgets[b]);
    int64_t moves = 0;
    if (n > 0) {
      std::vector<float> weight(n, 0.0f);
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < n; ++i) weight[i] += weights[(b * heads + h) * keys + slot[candidates[i]]];
      for (float& w : weight) w /= static_cast<float>(heads);
      float threshold = 0.0f;
      if (quantile >= 0.0) {
        std::vector<float> sorted(weight);
        const double rank = quantile * static_cast<double>(n - 1);
        const int64_t below = static_cast<int64_t>(rank), above = std::min(below + 1, n - 1);
        std::nth_element(sorted.begin(), sorted.begin() + below, sorted.end());
        const float low = sorted[below];
        const float high = above == below ? low : *std::min_element(sorted.begin() + below + 1, sorted.end());
        threshold = low + static_cast<float>(rank - static_cast<double>(below)) * (high - low);
      }
      for (int64_t i = 0; i < n; ++i) score[candidates[i]] += weight[i] - threshold;
      std::vector<char> kept(counts[b], 0);
      if (n > budget) {
        const int64_t recent = budget / 2, heavy = budget - recent;
        std::sort(candidates.begin(), candidates.end(), [&](int64_t x, int64_t y) { return token[x] < token[y]; });
        for (int64_t i = n - recent; i < n; ++i) kept[candidates[i]] = 1;
        // Equal scores go to the earlier token.
        std::stable_sort(candidates.begin(), candidates.end() - recent,
                         [&](int64_t x, int64_t y) { return score[x] > score[y]; });
        for (int64_t i = 0; i < heavy; ++i) kept[candidates[i]] = 1;
      } else {
        for (int64_t j : candidates) kept[j] = 1;
      }
      int64_t outside = budget;
      for (int64_t hole = 0; hole < budget; ++hole) {
        if (kept[hole]) continue;
        while (!kept[outside]) ++outside;
        to[moves] = slot[hole], from[moves++] = slot[outside];
        to[moves] = slot[outside], from[moves++] = slot[hole];
        std::swap(token[hole], token[outside]);
        std::swap(score[hole], score[outside]);
        ++outside;
      }
    }
    most = std::max(most, moves);
    for (; moves < room; ++moves) to[moves] = -1, from[moves] = 0;
  }
  return most;
}
