// What a call is given, and which keys each batch row of it reads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "numbers.h"

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
  const void *rotated, *new_rotated;  // what stands behind each key, with a query's elements behind its own; null: nothing
  int64_t batch, heads, kv_heads, keys, head_dim, value_dim;
  int64_t entries;  // negative: no segments are given, and every key is read
  int64_t inherited_entries;  // negative: all logits are, where any are given
  int64_t mask_kind, threads;
  int64_t query_batch, query_head, key_batch, key_head, key_row, value_batch, value_head, value_row;
  int64_t new_key_batch, new_key_head, new_value_batch, new_value_head, mask_batch, mask_head, mask_key;
  int64_t left_out;  // keys that are missing: the first inherited ones of each batch row
  int64_t anchor_keys, anchor_batch, anchor_head, anchor_row;
  int64_t rotated_dim, rotated_batch, rotated_head, rotated_row, new_rotated_batch, new_rotated_head;
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

}  // namespace
