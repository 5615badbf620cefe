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

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "tile.h"

namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr float LOWEST = -2e38f;  // a mask's lowest finite number: added to any logit it is all that is left

struct Call {
  const void *query, *key, *value, *new_key, *new_value, *mask;
  const int64_t* segments;
  void* out;
  float* weights;  // null: not wanted
  float* kept;  // where the logits go, [batch, heads, keys], -inf so far; null: nowhere
  const float* logits;  // another layer's logits, laid out like `kept`; null: none are inherited
  const int64_t* inherited;  // ranges of the keys whose logits are
  const void* anchor_key;  // or that are themselves another layer's; null: none
  int64_t batch, heads, kv_heads, keys, head_dim, value_dim;
  int64_t entries;  // negative: no segments are given, and every key is read
  int64_t inherited_entries;  // negative: all logits are, where any are given
  int64_t mask_kind, threads;
  int64_t query_batch, query_head, key_batch, key_head, key_row, value_batch, value_head, value_row;
  int64_t new_key_batch, new_key_head, new_value_batch, new_value_head, mask_batch, mask_head, mask_key;
  int64_t left_out;  // keys that are missing: the first inherited ones of each batch row
  int64_t anchor_keys, anchor_batch, anchor_head, anchor_row;
  float scale;
};

struct Range {
  int64_t start, length;
  bool inherited = false;  // its logits, or its keys, are another layer's
  int64_t missing = 0;  // keys before it that are left out
};

// What the mask adds to a logit: -inf hides.
inline float bias_of(const Call& c, int64_t at) {
  float bias = 0.0f;
  switch (c.mask_kind) {
    case 1: return static_cast<const uint8_t*>(c.mask)[at] ? 0.0f : NOTHING;
    case 2: bias = static_cast<const float*>(c.mask)[at]; break;
    case 3: bias = number(static_cast<const Half*>(c.mask)[at]); break;
    case 4: bias = number(static_cast<const BFloat*>(c.mask)[at]); break;
    default: bias = number(static_cast<const double*>(c.mask)[at]); break;
  }
  return bias == NOTHING || bias > LOWEST || bias != bias ? bias : LOWEST;
}

// Whether the mask hides `key` from all query heads.
bool hidden(const Call& c, int64_t batch_row, int64_t key) {
  const int64_t at = batch_row * c.mask_batch + key * c.mask_key;
  for (int64_t h = 0; h < (c.mask_head == 0 ? 1 : c.heads); ++h)
    if (bias_of(c, at + h * c.mask_head) != NOTHING) return false;
  return true;
}

// The bytes of a mask that is boolean, contiguous and one for all heads, from `key` on; null: it is none of these.
const uint8_t* bytes_of(const Call& c, int64_t batch_row, int64_t key) {
  const bool is_plain = c.mask_kind == 1 && c.mask_head == 0 && c.mask_key == 1;
  return is_plain ? static_cast<const uint8_t*>(c.mask) + batch_row * c.mask_batch + key : nullptr;
}

// Without hidden keys at either end; maybe nothing is left.
Range shown(const Call& c, int64_t batch_row, Range range) {
  if (const uint8_t* bytes = bytes_of(c, batch_row, range.start)) {
    // Static buffers are made for long answers: eight keys at a time from their end.
    for (uint64_t eight; range.length >= 8; range.length -= 8) {
      std::memcpy(&eight, bytes + range.length - 8, 8);
      if (eight != 0) break;
    }
  }
  while (range.length > 0 && hidden(c, batch_row, range.start + range.length - 1)) --range.length;
  while (range.length > 0 && hidden(c, batch_row, range.start)) ++range.start, --range.length;
  return range;
}

// Whether the mask is known to hide nothing of `range`.
bool is_open(const Call& c, int64_t batch_row, Range range) {
  const uint8_t* bytes = bytes_of(c, batch_row, range.start);
  return bytes && std::memchr(bytes, 0, range.length) == nullptr;
}

// The keys that one batch row reads, in ascending order.
struct Reading {
  std::vector<Range> ranges;
  int64_t keys = 0;
  bool masked = false;  // the mask has to be asked about them
};

// Appends `range` in pieces, each inherited as a whole or not at all. `from`: the inherited ranges, ascending.
// `left_out`: so many inherited keys, the first ones, are missing.
void append_pieces(std::vector<Range>& to, Range range, const std::vector<Range>& from, int64_t left_out) {
  const int64_t end = range.start + range.length;
  int64_t at = range.start, before = 0;  // inherited keys before `at`
  for (const Range& other : from) {
    if (other.start >= end) break;
    const int64_t first = std::max(at, other.start), last = std::min(end, other.start + other.length);
    if (first < last) {
      if (first > at) to.push_back({at, first - at, false, std::min(before, left_out)});
      to.push_back({first, last - first, true});
      at = last;
    }
    before += other.length;
  }
  if (end > at) to.push_back({at, end - at, false, std::min(before, left_out)});
}

std::vector<Range> inherited_of(const Call& c, int64_t batch_row) {
  std::vector<Range> result;
  if (!c.logits && !c.anchor_key) return result;
  const int64_t keys = c.anchor_key ? std::min(c.keys, c.anchor_keys) : c.keys;
  if (c.inherited_entries < 0) result.push_back({0, keys});
  for (int64_t s = 0; s < c.inherited_entries; ++s) {
    const int64_t* at = c.inherited + (batch_row * c.inherited_entries + s) * 2;
    if (at[1] > 0 && at[0] < keys) result.push_back({at[0], std::min(at[1], keys - at[0])});
  }
  std::sort(result.begin(), result.end(), [](Range x, Range y) { return x.start < y.start; });
  return result;
}

Reading reading_of(const Call& c, int64_t batch_row) {
  Reading result;
  const std::vector<Range> inherited = inherited_of(c, batch_row);
  const int64_t whole[2] = {0, c.keys};
  const int64_t* segments = c.entries < 0 ? whole : c.segments + batch_row * c.entries * 2;
  for (int64_t s = 0; s < (c.entries < 0 ? 1 : c.entries); ++s) {
    Range range = {segments[2 * s], std::min(segments[2 * s + 1], c.keys - segments[2 * s])};
    if (c.mask_kind != 0) range = shown(c, batch_row, range);
    if (range.length <= 0) continue;
    append_pieces(result.ranges, range, inherited, c.left_out);
    result.keys += range.length;
    result.masked |= c.mask_kind != 0 && !is_open(c, batch_row, range);
  }
  std::sort(result.ranges.begin(), result.ranges.end(), [](Range x, Range y) { return x.start < y.start; });
  return result;
}

// Results of one task: per query head of the group the largest logit, the sum of weights, and the weighted values.
struct Part { float *most, *total, *out; };

template <typename T, int64_t DIM>
void attend(const Call& c, int64_t batch_row, int64_t kv_head, const Reading& reading, int64_t first, int64_t end,
            Part part, float* logits_out, int64_t logits_stride, float* scratch) {
  const float* taken = c.logits ? c.logits + (batch_row * c.heads + kv_head * (c.heads / c.kv_heads)) * c.keys : nullptr;
  float* kept = c.kept ? c.kept + (batch_row * c.heads + kv_head * (c.heads / c.kv_heads)) * c.keys : nullptr;
  const int64_t group = c.heads / c.kv_heads;
  const std::vector<Range>& ranges = reading.ranges;
  const T* keys = static_cast<const T*>(c.key) + batch_row * c.key_batch + kv_head * c.key_head;
  const T* anchors = static_cast<const T*>(c.anchor_key) + batch_row * c.anchor_batch + kv_head * c.anchor_head;
  const T* values = static_cast<const T*>(c.value) + batch_row * c.value_batch + kv_head * c.value_head;
  float* queries = scratch;
  float* logits = queries + group * c.head_dim;
  float* dots = logits + group * TILE;
  float* factors = dots + group * TILE;
  for (int64_t g = 0; g < group; ++g) {
    part.most[g] = NOTHING, part.total[g] = 0.0f;
    std::fill_n(part.out + g * c.value_dim, c.value_dim, 0.0f);
    if (!c.query) continue;  // all logits are inherited
    const T* row = static_cast<const T*>(c.query) + batch_row * c.query_batch + (kv_head * group + g) * c.query_head;
    for (int64_t i = 0; i < c.head_dim; ++i) queries[g * c.head_dim + i] = number(row[i]) * c.scale;
  }
  const auto key_at = [&](const Range& range, int64_t position) {
    return range.inherited ? anchors + position * c.anchor_row : keys + (position - range.missing) * c.key_row;
  };
  const T* k[TILE];
  const T* v[TILE];
  int64_t number_of[TILE];  // place among the keys that the batch row reads
  int64_t position_of[TILE];
  int64_t own[TILE];  // which keys of the tile are multiplied with
  int64_t range = 0, before = 0;
  while (range < static_cast<int64_t>(ranges.size()) && before + ranges[range].length <= first)
    before += ranges[range++].length;
  int64_t at = first;
  while (at < end) {
    int64_t count = 0, owned = 0, next_key = 0, next_value = 0;
    while (at - before >= ranges[range].length) before += ranges[range++].length;
    const int64_t left = std::min(end, before + ranges[range].length) - at;
    if (!reading.masked && left >= TILE) {
      // Most tiles: they lie in one range, and no key has to be looked at by itself.
      const bool inherited = ranges[range].inherited;
      const int64_t position = ranges[range].start + at - before, key_row = inherited ? c.anchor_row : c.key_row;
      const T* key = key_at(ranges[range], position);
      const T* value = values + position * c.value_row;
      const bool is_further = left >= TILE + AHEAD;
      next_value = is_further ? AHEAD * c.value_row : 0;
      if (inherited && taken) {
        for (int64_t g = 0; g < group; ++g) std::copy_n(taken + g * c.keys + position, TILE, logits + g * TILE);
      } else {
        next_key = is_further ? AHEAD * key_row : 0;
        for (; owned < TILE; ++owned) k[owned] = key + owned * key_row;
      }
      for (; count < TILE; ++count, ++at) {
        v[count] = value + count * c.value_row, number_of[count] = at, position_of[count] = position + count;
      }
    }
    while (at < end && count < TILE) {
      while (at - before >= ranges[range].length) before += ranges[range++].length;
      const int64_t position = ranges[range].start + at - before;
      bool seen = !reading.masked;
      if (reading.masked) {
        const int64_t base = batch_row * c.mask_batch + kv_head * group * c.mask_head + position * c.mask_key;
        for (int64_t g = 0; g < group; ++g) {
          const float bias = bias_of(c, base + g * c.mask_head);
          logits[g * TILE + count] = bias;
          seen |= bias != NOTHING;
        }
      }
      if (seen) {
        if (ranges[range].inherited && taken) {
          for (int64_t g = 0; g < group; ++g) {
            float& logit = logits[g * TILE + count];
            if (!reading.masked || logit != NOTHING) logit = taken[g * c.keys + position];
          }
        } else {
          own[owned] = count;
          k[owned++] = key_at(ranges[range], position);
        }
        position_of[count] = position;
        v[count] = values + position * c.value_row;
        number_of[count++] = at;
      }
      ++at;
    }
    const int64_t padded = (count + WIDTH - 1) / WIDTH * WIDTH;
    const bool plain = !reading.masked && owned == count;
    if (owned)
      in_heads(group, [&](int64_t first_head, auto heads) {
        float* to = (plain ? logits : dots) + first_head * TILE;
        products<DIM, heads()>(queries + first_head * c.head_dim, k, next_key, owned, c.head_dim, to);
      });
    for (int64_t g = 0; g < group; ++g) {
      float* row = logits + g * TILE;
      const float* own_dots = dots + g * TILE;
      if (!plain && !reading.masked) {
        for (int64_t t = 0; t < owned; ++t) row[own[t]] = own_dots[t];
      } else if (!plain) {
        // What is hidden stays hidden, whatever the product with it is.
        for (int64_t t = 0; t < owned; ++t) {
          float& logit = row[own[t]];
          logit = logit == NOTHING ? NOTHING : logit + own_dots[t];
        }
      }
      if (kept)
        for (int64_t t = 0; t < count; ++t) kept[g * c.keys + position_of[t]] = row[t];
      std::fill(row + count, row + padded, NOTHING);
      if (logits_out)
        for (int64_t t = 0; t < count; ++t) logits_out[g * logits_stride + number_of[t]] = row[t];
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
      accumulate<heads()>(part.out + first_head * c.value_dim, factors + first_head, logits + first_head * TILE, v,
                          next_value, count, c.value_dim);
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
  const int64_t tasks = pairs * splits, stride = group * (c.value_dim + 2);
  std::vector<float> parts(tasks * stride);
  std::vector<float> logits(c.weights ? c.batch * c.heads * most_keys : 0, NOTHING);
  auto part = [&](int64_t task) {
    float* at = parts.data() + task * stride;
    return Part{at, at + group, at + 2 * group};
  };
  // Threads cost some microseconds to wake.
  const int64_t threads = all_keys * c.kv_heads * c.value_dim < 32768 ? 1 : std::min(c.threads, tasks);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch(std::max(group * (c.head_dim + 1 + 2 * TILE), c.value_dim));
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t pair = task / splits, split = task % splits, b = pair / c.kv_heads, h = pair % c.kv_heads;
      const int64_t keys = readings[b].keys, share = (keys + splits - 1) / splits;
      const int64_t first = std::min(split * share, keys), end = std::min(first + share, keys);
      float* row = c.weights ? logits.data() + pair * group * most_keys : nullptr;
      if (c.head_dim == 64)
        attend<T, 64>(c, b, h, readings[b], first, end, part(task), row, most_keys, scratch.data());
      else if (c.head_dim == 128)
        attend<T, 128>(c, b, h, readings[b], first, end, part(task), row, most_keys, scratch.data());
      else
        attend<T, 0>(c, b, h, readings[b], first, end, part(task), row, most_keys, scratch.data());
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
        for (int64_t s = 0; s < splits; ++s) most = std::max(most, part(pair * splits + s).most[g]);
        const float base = most == NOTHING ? 0.0f : most;
        std::fill_n(scratch.data(), c.value_dim, 0.0f);
        for (int64_t s = 0; s < splits; ++s) {
          const Part p = part(pair * splits + s);
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
  c.anchor_key = tensors[13];
  if (!weigh || *weigh == 0) c.weights = nullptr;
  std::memcpy(&c.batch, sizes, 30 * sizeof(int64_t));
  c.scale = scale;
  if (dtype == 0) run<float>(c);
  else if (dtype == 1) run<Half>(c);
  else run<BFloat>(c);
}
