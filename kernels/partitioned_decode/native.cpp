// CPU kernel of avl::partitioned_decode: split-KV flash decoding over key ranges. What the operator means is said in
// schema.py; shapes and strides arrive in the order of `native.py`.
//
// One task is one key/value head and one split: an equal share of the keys that its batch row reads, however the ranges
// lie. What the mask hides from all heads at either end of a range (padding, rows of a static buffer that nothing is
// stored in yet) is cut off first: it is no work to be shared. The query heads of a group go over a tile together, so
// each key and value is read once for all of them. Splits are joined afterwards. Accumulation is in float32.
//
// avl::anchor_decode keeps the logits beside that, and avl::inherited_decode takes them in place of products with keys:
// for all keys, or for those in the ranges that it calls inherited. Or it takes the keys there from another cache. The
// first of the keys that are inherited may be missing in its own.
//
// avl::latent_decode has keys in two parts: latents, which are the values as well, and a rotated key behind each.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tile.h"
#include "walk.h"

namespace {

// Results of one task: per query head of the group the largest logit, the sum of weights, and the weighted values.
struct Part { float *most, *total, *out; };

// Where the results of tasks go.
struct Results {
  float* parts;
  float* logits;  // [batch, heads, most_keys], by the keys' places; null: not wanted
  int64_t group, value_dim, most_keys;

  Part part(int64_t task) const {
    float* at = parts + task * group * (value_dim + 2);
    return {at, at + group, at + 2 * group};
  }
};

// The tasks from `task` up to `last`. While a tile is looked at, the next one is asked for, of the next task if need be:
// a core that reads ahead by itself goes on where the rows end, and not where the next ones begin.
template <typename T, int64_t DIM>
void attend(const Tasks& tasks, int64_t task, int64_t last, const Results& results, float* scratch) {
  const Call& c = tasks.call;
  const int64_t group = c.heads / c.kv_heads;
  Walk<T> walk(tasks, task, last);
  Tile<T> tiles[2];
  Tile<T>*now = &tiles[0], *next = &tiles[1];
  const int64_t query_dim = c.head_dim + c.rotated_dim;
  float *queries = scratch, *rotations = queries + group * c.head_dim;
  now->logits = queries + group * query_dim;
  next->logits = now->logits + group * TILE;
  float* dots = next->logits + group * TILE;
  float* turned = dots + group * TILE;
  float* factors = turned + (c.rotated ? group * TILE : 0);
  for (; task < last; ++task) {
    const Part part = results.part(task);
    std::fill_n(part.most, group, NOTHING);
    std::fill_n(part.total, group * (1 + c.value_dim), 0.0f);
  }
  task = -1;
  Part part{};
  float *logits_out = nullptr, *kept = nullptr;
  for (walk.fill(*now); now->count; std::swap(now, next)) {
    walk.fill(*next);
    if (now->task != task) {
      task = now->task, part = results.part(task);
      const Task of = tasks[task];
      const int64_t head = of.kv_head * group;
      logits_out = results.logits ? results.logits + (of.batch_row * c.heads + head) * results.most_keys : nullptr;
      kept = c.kept ? c.kept + (of.batch_row * c.heads + head) * c.keys : nullptr;
      for (int64_t g = 0; g < group && c.query; ++g) {  // without a query all logits are inherited
        const T* row = static_cast<const T*>(c.query) + of.batch_row * c.query_batch + (head + g) * c.query_head;
        for (int64_t i = 0; i < c.head_dim; ++i) queries[g * c.head_dim + i] = number(row[i]) * c.scale;
        for (int64_t i = 0; i < c.rotated_dim; ++i)
          rotations[g * c.rotated_dim + i] = number(row[c.head_dim + i]) * c.scale;
      }
    }
    const int64_t count = now->count, owned = now->owned, padded = (count + WIDTH - 1) / WIDTH * WIDTH;
    const T* const* next_keys = next->owned ? next->k : now->k;
    const T* const* next_values = next->count ? next->v : now->v;
    for (int64_t t = owned; t < next->owned; ++t) ask_for(next->k[t], c.head_dim);
    for (int64_t t = count; t < next->count; ++t) ask_for(next->v[t], c.value_dim);
    const bool plain = !now->masked && owned == count;
    float* logits = now->logits;
    if (owned)
      in_heads(group, [&](int64_t first_head, auto heads) {
        float* to = (plain ? logits : dots) + first_head * TILE;
        products<DIM, heads()>(queries + first_head * c.head_dim, now->k, next_keys, owned, c.head_dim, to);
        if (!c.rotated) return;
        float* more = turned + first_head * TILE;
        products<0, heads()>(rotations + first_head * c.rotated_dim, now->r, next->owned ? next->r : now->r, owned,
                             c.rotated_dim, more);
        for (int64_t h = 0; h < heads(); ++h)
          for (int64_t t = 0; t < owned; ++t) to[h * TILE + t] += more[h * TILE + t];
      });
    for (int64_t g = 0; g < group; ++g) {
      float* row = logits + g * TILE;
      const float* own_dots = dots + g * TILE;
      if (!plain && !now->masked) {
        for (int64_t t = 0; t < owned; ++t) row[now->own[t]] = own_dots[t];
      } else if (!plain) {
        // What is hidden stays hidden, whatever the product with it is.
        for (int64_t t = 0; t < owned; ++t) {
          float& logit = row[now->own[t]];
          logit = logit == NOTHING ? NOTHING : logit + own_dots[t];
        }
      }
      if (kept)
        for (int64_t t = 0; t < count; ++t) kept[g * c.keys + now->position_of[t]] = row[t];
      std::fill(row + count, row + padded, NOTHING);
      if (logits_out)
        for (int64_t t = 0; t < count; ++t) logits_out[g * results.most_keys + now->number_of[t]] = row[t];
      Floats largest = all(part.most[g]);
      for (int64_t t = 0; t < padded; t += WIDTH) largest = load(row + t) > largest ? load(row + t) : largest;
      float most = largest[0];
      for (int64_t i = 1; i < WIDTH; ++i) most = largest[i] > most ? largest[i] : most;
      const float base = most == NOTHING ? 0.0f : most;
      const float factor = factors[g] = part.most[g] == NOTHING ? 0.0f : exponential(part.most[g] - base);
      Floats total = {};
      for (int64_t t = 0; t < padded; t += WIDTH) {
        const Floats weight = exponential(load(row + t) - base);
        total += weight;
        store(weight, row + t);
      }
      part.total[g] = part.total[g] * factor + sum(total);
      part.most[g] = most;
    }
    in_heads(group, [&](int64_t first_head, auto heads) {
      accumulate<heads()>(part.out + first_head * c.value_dim, factors + first_head, logits + first_head * TILE,
                          now->v, next_values, count, c.value_dim);
    });
  }
}

template <typename T>
void append(const void* cache, const void* rows, int64_t batch, int64_t heads, int64_t keys, int64_t dim,
            int64_t cache_batch, int64_t cache_head, int64_t cache_row, int64_t rows_batch, int64_t rows_head) {
  T* target = static_cast<T*>(const_cast<void*>(cache)) + keys * cache_row;
  const T* source = static_cast<const T*>(rows);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      std::memcpy(target + b * cache_batch + h * cache_head, source + b * rows_batch + h * rows_head, dim * sizeof(T));
}

template <typename T>
void run(Call c) {
  if (c.new_value) {
    if (c.new_key)
      append<T>(c.key, c.new_key, c.batch, c.kv_heads, c.keys - c.left_out, c.head_dim, c.key_batch, c.key_head, c.key_row,
                c.new_key_batch, c.new_key_head);
    append<T>(c.value, c.new_value, c.batch, c.kv_heads, c.keys, c.value_dim, c.value_batch, c.value_head, c.value_row,
              c.new_value_batch, c.new_value_head);
    if (c.new_rotated)
      append<T>(c.rotated, c.new_rotated, c.batch, c.kv_heads, c.keys, c.rotated_dim, c.rotated_batch, c.rotated_head,
                c.rotated_row, c.new_rotated_batch, c.new_rotated_head);
    ++c.keys;
  }
  const int64_t group = c.heads / c.kv_heads;
  std::vector<Reading> readings;
  int64_t most_keys = 0, all_keys = 0;
  for (int64_t b = 0; b < c.batch; ++b) {
    readings.push_back(reading_of(c, b));
    most_keys = std::max(most_keys, readings[b].keys);
    all_keys += readings[b].keys;
  }
  // Enough splits that every thread has the same to do; none so short that joining costs more than it saves.
  const int64_t pairs = c.batch * c.kv_heads;
  const bool even = pairs % c.threads == 0 && all_keys == most_keys * c.batch;
  const int64_t wanted = even || c.threads == 1 ? 1 : (4 * c.threads + pairs - 1) / pairs;
  const int64_t splits = std::max<int64_t>(1, std::min(wanted, most_keys / 256));
  const int64_t count = pairs * splits;
  std::vector<float> parts(count * group * (c.value_dim + 2));
  std::vector<float> logits(c.weights ? c.batch * c.heads * most_keys : 0, NOTHING);
  const Tasks tasks{c, readings, splits};
  const Results results{parts.data(), c.weights ? logits.data() : nullptr, group, c.value_dim, most_keys};
  // Threads cost some microseconds to wake.
  const int64_t threads = all_keys * c.kv_heads * c.value_dim < 32768 ? 1 : std::min(c.threads, count);
#pragma omp parallel num_threads(threads)
  {
    const int64_t tiles = c.rotated ? 4 : 3;
    std::vector<float> scratch(std::max(group * (c.head_dim + c.rotated_dim + 1 + tiles * TILE), c.value_dim));
#pragma omp for schedule(static)
    for (int64_t thread = 0; thread < threads; ++thread) {
      const int64_t first = count * thread / threads, last = count * (thread + 1) / threads;
      if (c.head_dim == 64) attend<T, 64>(tasks, first, last, results, scratch.data());
      else if (c.head_dim == 128) attend<T, 128>(tasks, first, last, results, scratch.data());
      else attend<T, 0>(tasks, first, last, results, scratch.data());
    }
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t b = pair / c.kv_heads, h = pair % c.kv_heads;
      float* row = nullptr;
      if (c.weights) {
        row = c.weights + pair * c.keys;
        std::fill_n(row, c.keys, 0.0f);
      }
      for (int64_t g = 0; g < group; ++g) {
        float most = NOTHING, total = 0.0f;
        for (int64_t s = 0; s < splits; ++s) most = std::max(most, results.part(pair * splits + s).most[g]);
        const float base = most == NOTHING ? 0.0f : most;
        std::fill_n(scratch.data(), c.value_dim, 0.0f);
        for (int64_t s = 0; s < splits; ++s) {
          const Part p = results.part(pair * splits + s);
          const float factor = p.most[g] == NOTHING && p.total[g] == 0.0f ? 0.0f : exponential(p.most[g] - base);
          const float weight = p.most[g] == NOTHING ? (p.total[g] == 0.0f ? 0.0f : 1.0f) : factor;
          total += p.total[g] * weight;
          for (int64_t i = 0; i < c.value_dim; ++i) scratch[i] += p.out[g * c.value_dim + i] * weight;
        }
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        T* out = static_cast<T*>(c.out) + (b * c.heads + h * group + g) * c.value_dim;
        for (int64_t i = 0; i < c.value_dim; ++i) put(scratch[i] * inverse, out + i);
        if (!row) continue;
        const float* own = logits.data() + (pair * group + g) * most_keys;
        const float share = inverse / static_cast<float>(group);
        int64_t at = 0;
        for (const Range& range : readings[b].ranges) {
          float* weight = row + range.start;
          int64_t j = 0;
          for (; j + WIDTH <= range.length; j += WIDTH)
            store(load(weight + j) + exponential(load(own + at + j) - base) * share, weight + j);
          for (; j < range.length; ++j) weight[j] += exponential(own[at + j] - base) * share;
          at += range.length;
        }
      }
    }
  }
}

}  // namespace

// `dtype`: 0 float32, 1 float16, 2 bfloat16. `tensors`: data pointers; `sizes`: sizes and strides, in elements.
extern "C" void avl_partitioned_decode(int64_t dtype, const void* const* tensors, const int64_t* sizes, float scale) {
  Call c;
  c.query = tensors[0], c.key = tensors[1], c.value = tensors[2], c.new_key = tensors[3], c.new_value = tensors[4];
  c.mask = tensors[5], c.segments = static_cast<const int64_t*>(tensors[6]);
  c.out = const_cast<void*>(tensors[7]), c.weights = static_cast<float*>(const_cast<void*>(tensors[9]));
  const int32_t* weigh = static_cast<const int32_t*>(tensors[8]);
  c.kept = static_cast<float*>(const_cast<void*>(tensors[10]));
  c.logits = static_cast<const float*>(tensors[11]), c.inherited = static_cast<const int64_t*>(tensors[12]);
  c.anchor_key = tensors[13], c.rotated = tensors[14], c.new_rotated = tensors[15];
  if (!weigh || *weigh == 0) c.weights = nullptr;
  std::memcpy(&c.batch, sizes, 36 * sizeof(int64_t));
  c.scale = scale;
  if (dtype == 0) run<float>(c);
  else if (dtype == 1) run<Half>(c);
  else run<BFloat>(c);
}
