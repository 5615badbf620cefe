// CPU kernels of avl::partition_ and of the choice that leads to it: rows of a cache change places.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t LINE = 64;
// Pairs of rows to ask for in advance: where the next one lies no processor can guess.
constexpr int64_t AHEAD = 8;

// The moves of one matrix of rows, with strides in elements.
struct Moves {
  const int64_t *source, *slots;
  int64_t count, source_step, slots_step;

  int64_t from(int64_t i) const { return source[i * source_step]; }
  int64_t to(int64_t i) const { return slots[i * slots_step]; }
};

// Whether each two moves, one after the other, let two rows change places, or are none. So does `avl_reselect` name them.
bool are_swaps(const Moves& moves) {
  if (moves.count % 2) return false;
  for (int64_t i = 0; i < moves.count; i += 2) {
    const bool none = moves.to(i) < 0 && moves.to(i + 1) < 0;
    if (!none && (moves.to(i) != moves.from(i + 1) || moves.to(i + 1) != moves.from(i))) return false;
  }
  return true;
}

// Whether all that moves is one of the first `keys` rows.
bool are_within(const Moves& moves, int64_t keys) {
  for (int64_t i = 0; i < moves.count; ++i)
    if (moves.to(i) >= keys || (moves.to(i) >= 0 && (moves.from(i) < 0 || moves.from(i) >= keys))) return false;
  return true;
}

// Two rows of `bytes` change places, with nothing kept but in registers.
void swap_rows(char* x, char* y, int64_t bytes) {
  typedef char Line __attribute__((vector_size(LINE)));
  int64_t at = 0;
  for (; at + LINE <= bytes; at += LINE) {
    Line u, v;
    std::memcpy(&u, x + at, LINE), std::memcpy(&v, y + at, LINE);
    std::memcpy(x + at, &v, LINE), std::memcpy(y + at, &u, LINE);
  }
  std::swap_ranges(x + at, x + bytes, y + at);
}

void ask_for(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(row + at, 1, 3);
}

}  // namespace

// new[slot[i]] = old[source[i]] for every i, in each of `batch` x `heads` matrices of rows of each of `caches`, which are
// laid out alike. Everything is in bytes, but `source` and `slots`, int64 [orders, batch, groups, moves] with strides in
// elements (0 where all heads are alike); `orders` says which of these is a cache's. Returns how many of the matrices
// were asked for a row that they do not have: these are left as they are.
extern "C" int64_t avl_partition(char* const* caches, const int64_t* orders, const int64_t* source, const int64_t* slots,
                                 const int64_t* sizes) {
  const int64_t count = sizes[0], batch = sizes[1], heads = sizes[2], moves = sizes[3], bytes = sizes[4];
  const int64_t threads = sizes[5], cache_batch = sizes[6], cache_head = sizes[7], cache_row = sizes[8];
  const int64_t source_order = sizes[9], source_batch = sizes[10], source_head = sizes[11], source_move = sizes[12];
  const int64_t slots_order = sizes[13], slots_batch = sizes[14], slots_head = sizes[15], slots_move = sizes[16];
  const int64_t keys = sizes[17];
  int64_t outside = 0;
#pragma omp parallel num_threads(threads) reduction(+ : outside)
  {
    std::vector<char> rows;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < count * batch * heads; ++task) {
      const int64_t n = task / (batch * heads), b = task / heads % batch, h = task % heads, order = orders[n];
      char* base = caches[n] + b * cache_batch + h * cache_head;
      const Moves own = {source + order * source_order + b * source_batch + h * source_head,
                         slots + order * slots_order + b * slots_batch + h * slots_head, moves, source_move, slots_move};
      if (!are_within(own, keys)) {
        ++outside;
        continue;
      }
      if (are_swaps(own)) {
        for (int64_t i = 0; i < moves; i += 2) {
          const int64_t later = i + 2 * AHEAD;
          if (later < moves && own.to(later) >= 0)
            ask_for(base + own.to(later) * cache_row, bytes), ask_for(base + own.from(later) * cache_row, bytes);
          if (own.to(i) >= 0) swap_rows(base + own.to(i) * cache_row, base + own.from(i) * cache_row, bytes);
        }
        continue;
      }
      rows.resize(moves * bytes);
      for (int64_t i = 0; i < moves; ++i)
        if (own.to(i) >= 0) std::memcpy(rows.data() + i * bytes, base + own.from(i) * cache_row, bytes);
      for (int64_t i = 0; i < moves; ++i)
        if (own.to(i) >= 0) std::memcpy(base + own.to(i) * cache_row, rows.data() + i * bytes, bytes);
    }
  }
  return outside;
}

// Picks core anew among secondary, in several layers: `Partition.next_moves`. `weights` are [batch, heads, keys] of each
// layer and `tokens` [batch, groups, visual], which it updates. Fills `source` and `target` [layers, batch, groups, room]
// with swaps (-1 in `target` behind them), and returns how many entries the fullest row has.
extern "C" int64_t avl_reselect(const float* const* weights, const int64_t* slots, int64_t* const* tokens,
                                const int64_t* core, const int64_t* secondary, int64_t* source, int64_t* target,
                                const int64_t* sizes) {
  const int64_t layers = sizes[0], batch = sizes[1], heads = sizes[2], groups = sizes[3], keys = sizes[4],
                visual = sizes[5], room = sizes[6], threads = sizes[7];
  int64_t most = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(max : most)
  for (int64_t task = 0; task < layers * batch * groups; ++task) {
    const int64_t layer = task / (batch * groups), b = task / groups % batch, g = task % groups;
    const int64_t kept = core[b], width = secondary[b], *slot = slots + b * visual;
    int64_t* token = tokens[layer] + (b * groups + g) * visual;
    const float* own = weights[layer] + b * heads * keys;
    std::vector<float> score(width, 0.0f);
    for (int64_t h = groups == 1 ? 0 : g; h < (groups == 1 ? heads : g + 1); ++h)
      for (int64_t j = 0; j < width; ++j) score[j] += own[h * keys + slot[j]];
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
