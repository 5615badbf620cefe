// Cuts the keys of a thread's tasks into tiles, one task after another.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "reading.h"
#include "tile.h"

namespace {

// A key/value head of a batch row, and an equal share of the keys that this row reads.
struct Task {
  int64_t batch_row, kv_head, first, end;
};

struct Tasks {
  const Call& call;
  const std::vector<Reading>& readings;
  int64_t splits;

  Task operator[](int64_t task) const {
    const int64_t pair = task / splits, split = task % splits, row = pair / call.kv_heads;
    const int64_t keys = readings[row].keys, share = (keys + splits - 1) / splits, first = std::min(split * share, keys);
    return {row, pair % call.kv_heads, first, std::min(first + share, keys)};
  }
};

// Up to TILE keys of one task that some head of its group sees. Pointers behind the last are those of the last.
template <typename T>
struct Tile {
  int64_t task = -1, count = 0, owned = 0;
  bool masked = false;
  const T* k[TILE];
  const T* v[TILE];
  const T* r[TILE];  // what stands behind the keys in `k`, where there is something
  int64_t number_of[TILE];  // place among the keys that the batch row reads
  int64_t position_of[TILE];
  int64_t own[TILE];  // which keys of the tile are multiplied with
  float* logits;  // [group, TILE]: of the others the inherited ones; where there is a mask, of the owned what it adds
};

template <typename T>
class Walk {
 public:
  // Tasks from `task` up to `last`.
  Walk(const Tasks& tasks, int64_t task, int64_t last) : tasks_(tasks), c_(tasks.call), task_(task), last_(last) {
    if (task_ < last_) begin();
  }

  // Makes `tile` the next one; without keys and with no task behind the last.
  void fill(Tile<T>& tile) {
    tile.count = tile.owned = 0;
    for (tile.task = -1; task_ < last_; ) {
      while (at_ < now_.end && tile.count == 0) gather(tile);
      if (tile.count) break;
      if (++task_ < last_) begin();
    }
    if (tile.count == 0) return;
    tile.task = task_, tile.masked = reading_->masked;
    if (tile.owned) {
      std::fill(tile.k + tile.owned, tile.k + TILE, tile.k[tile.owned - 1]);
      if (rotated_) std::fill(tile.r + tile.owned, tile.r + TILE, tile.r[tile.owned - 1]);
    }
    std::fill(tile.v + tile.count, tile.v + TILE, tile.v[tile.count - 1]);
  }

 private:
  void begin() {
    now_ = tasks_[task_], reading_ = &tasks_.readings[now_.batch_row];
    const int64_t group = c_.heads / c_.kv_heads, row = now_.batch_row, head = now_.kv_head;
    taken_ = c_.logits ? c_.logits + (row * c_.heads + head * group) * c_.keys : nullptr;
    keys_ = static_cast<const T*>(c_.key) + row * c_.key_batch + head * c_.key_head;
    anchors_ = static_cast<const T*>(c_.anchor_key) + row * c_.anchor_batch + head * c_.anchor_head;
    values_ = static_cast<const T*>(c_.value) + row * c_.value_batch + head * c_.value_head;
    rotated_ = c_.rotated ? static_cast<const T*>(c_.rotated) + row * c_.rotated_batch + head * c_.rotated_head : nullptr;
    at_ = now_.first, range_ = 0, before_ = 0;
  }

  // The range in which the next key lies.
  const Range& range() {
    while (at_ - before_ >= reading_->ranges[range_].length) before_ += reading_->ranges[range_++].length;
    return reading_->ranges[range_];
  }

  const T* key_at(const Range& range, int64_t position) const {
    return range.inherited ? anchors_ + position * c_.anchor_row : keys_ + (position - range.missing) * c_.key_row;
  }

  void gather(Tile<T>& tile) {
    const int64_t group = c_.heads / c_.kv_heads;
    const Range& whole = range();
    if (!reading_->masked && std::min(now_.end, before_ + whole.length) - at_ >= TILE) {
      // Most tiles: they lie in one range, and no key has to be looked at by itself.
      const int64_t position = whole.start + at_ - before_, key_row = whole.inherited ? c_.anchor_row : c_.key_row;
      const T* key = key_at(whole, position);
      const T* value = values_ + position * c_.value_row;
      if (whole.inherited && taken_) {
        for (int64_t g = 0; g < group; ++g) std::copy_n(taken_ + g * c_.keys + position, TILE, tile.logits + g * TILE);
      } else {
        for (; tile.owned < TILE; ++tile.owned) tile.k[tile.owned] = key + tile.owned * key_row;
        for (int64_t t = 0; t < TILE && rotated_; ++t) tile.r[t] = rotated_ + (position + t) * c_.rotated_row;
      }
      for (; tile.count < TILE; ++tile.count, ++at_) {
        tile.v[tile.count] = value + tile.count * c_.value_row;
        tile.number_of[tile.count] = at_, tile.position_of[tile.count] = position + tile.count;
      }
    }
    for (; at_ < now_.end && tile.count < TILE; ++at_) {
      const Range& range = this->range();
      const int64_t position = range.start + at_ - before_;
      bool seen = !reading_->masked;
      if (reading_->masked) {
        const int64_t base =
            now_.batch_row * c_.mask_batch + now_.kv_head * group * c_.mask_head + position * c_.mask_key;
        for (int64_t g = 0; g < group; ++g) {
          const float bias = bias_of(c_, base + g * c_.mask_head);
          tile.logits[g * TILE + tile.count] = bias;
          seen |= bias != NOTHING;
        }
      }
      if (!seen) continue;
      if (range.inherited && taken_) {
        for (int64_t g = 0; g < group; ++g) {
          float& logit = tile.logits[g * TILE + tile.count];
          if (!reading_->masked || logit != NOTHING) logit = taken_[g * c_.keys + position];
        }
      } else {
        tile.own[tile.owned] = tile.count;
        if (rotated_) tile.r[tile.owned] = rotated_ + position * c_.rotated_row;
        tile.k[tile.owned++] = key_at(range, position);
      }
      tile.position_of[tile.count] = position;
      tile.v[tile.count] = values_ + position * c_.value_row;
      tile.number_of[tile.count++] = at_;
    }
  }

  const Tasks& tasks_;
  const Call& c_;
  int64_t task_, last_;
  Task now_{};
  const Reading* reading_ = nullptr;
  const float* taken_ = nullptr;
  const T *keys_ = nullptr, *anchors_ = nullptr, *values_ = nullptr, *rotated_ = nullptr;
  int64_t at_ = 0, range_ = 0, before_ = 0;
};

}  // namespace
