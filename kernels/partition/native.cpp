// CPU kernels of avl::partition_ and of the choice that leads to it: rows of a cache change places.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

// new[slot[i]] = old[source[i]] for every i, in each of `batch` x `heads` matrices of rows. Everything is in bytes, but
// `source` and `slots`, int64 [batch, groups, moves] with strides in elements (0 where all heads are alike).
extern "C" void avl_partition(char* cache, const int64_t* source, const int64_t* slots, const int64_t* sizes) {
  const int64_t batch = sizes[0], heads = sizes[1], moves = sizes[2], bytes = sizes[3], threads = sizes[4];
  const int64_t cache_batch = sizes[5], cache_head = sizes[6], cache_row = sizes[7];
  const int64_t source_batch = sizes[8], source_head = sizes[9], source_move = sizes[10];
  const int64_t slots_batch = sizes[11], slots_head = sizes[12], slots_move = sizes[13];
#pragma omp parallel num_threads(threads)
  {
    std::vector<char> rows(moves * bytes);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * heads; ++task) {
      const int64_t b = task / heads, h = task % heads;
      char* base = cache + b * cache_batch + h * cache_head;
      const int64_t* from = source + b * source_batch + h * source_head;
      const int64_t* to = slots + b * slots_batch + h * slots_head;
      for (int64_t i = 0; i < moves; ++i)
        if (to[i * slots_move] >= 0)
          std::memcpy(rows.data() + i * bytes, base + from[i * source_move] * cache_row, bytes);
      for (int64_t i = 0; i < moves; ++i)
        if (to[i * slots_move] >= 0) std::memcpy(base + to[i * slots_move] * cache_row, rows.data() + i * bytes, bytes);
    }
  }
}

// Picks core anew among secondary: `Partition.next_order`. Fills `source` and `target` [batch, groups, room] with swaps
// (all that enter, then all that leave; -1 in `target` behind them), updates `tokens` [batch, groups, visual], and
// returns how many entries the fullest row has.
extern "C" int64_t avl_reselect(const float* weights, const int64_t* slots, int64_t* tokens, const int64_t* core,
                                const int64_t* secondary, int64_t* source, int64_t* target, const int64_t* sizes) {
  const int64_t batch = sizes[0], heads = sizes[1], groups = sizes[2], keys = sizes[3], visual = sizes[4],
                room = sizes[5], threads = sizes[6];
  int64_t most = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(max : most)
  for (int64_t task = 0; task < batch * groups; ++task) {
    const int64_t b = task / groups, g = task % groups, kept = core[b], width = secondary[b];
    const int64_t* slot = slots + b * visual;
    int64_t* token = tokens + task * visual;
    std::vector<float> score(width, 0.0f);
    for (int64_t h = groups == 1 ? 0 : g; h < (groups == 1 ? heads : g + 1); ++h)
      for (int64_t j = 0; j < width; ++j) score[j] += weights[(b * heads + h) * keys + slot[j]];
    std::vector<int64_t> order(width);
    for (int64_t j = 0; j < width; ++j) {
      order[j] = j;
      if (score[j] != score[j]) score[j] = std::numeric_limits<float>::infinity();
    }
    // Equal scores go to the earlier token.
    auto better = [&](int64_t x, int64_t y) {
      return score[x] != score[y] ? score[x] > score[y] : token[x] < token[y];
    };
    if (kept < width) std::nth_element(order.begin(), order.begin() + kept, order.end(), better);
    std::vector<char> chosen(width, 0);
    for (int64_t i = 0; i < std::min(kept, width); ++i) chosen[order[i]] = 1;
    int64_t moves = 0;
    int64_t *from = source + task * room, *to = target + task * room;
    std::vector<int64_t> here, there;
    for (int64_t j = 0; j < width; ++j) {
      if (j < kept && !chosen[j]) here.push_back(j);
      if (j >= kept && chosen[j]) there.push_back(j);
    }
    for (size_t i = 0; i < there.size(); ++i) {
      const int64_t leaving = slot[here[i]], entering = slot[there[i]];
      to[moves] = leaving, from[moves++] = entering;
      to[moves] = entering, from[moves++] = leaving;
      std::swap(token[here[i]], token[there[i]]);
    }
    most = std::max(most, moves);
    for (; moves < room; ++moves) to[moves] = -1, from[moves] = 0;
  }
  return most;
}
