// Reads a call of this kernel off the tensors that the operators in operator.cpp are given.

#pragma once

#include "operator.h"

#include <algorithm>

#include "native.cpp"

namespace {

constexpr int64_t MAX_SEGMENTS = 256;  // as in schema.py

// Null where there is none. Without a key, or a query, no product is wanted.
struct Given {
  const Tensor *query, *key, *value, *new_key, *new_value, *mask, *segments;
  const Tensor *weigh = nullptr, *logits = nullptr, *inherited = nullptr, *anchor_key = nullptr;
  const Tensor *rotated = nullptr, *new_rotated = nullptr;  // where keys are values with something behind them
};

inline const Tensor* maybe(const Maybe& tensor) { return tensor ? &*tensor : nullptr; }

bool has_shape(const Tensor& tensor, const std::vector<int64_t>& shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
  for (size_t d = 0; d < shape.size(); ++d)
    if (tensor.size(d) != shape[d]) return false;
  return true;
}

// Rows of numbers of `dtype`, each contiguous.
bool are_rows(const Tensor& tensor, ScalarType dtype, const std::vector<int64_t>& shape) {
  return tensor.scalar_type() == dtype && has_shape(tensor, shape) && tensor.stride(3) == 1;
}

bool are_ranges(const Tensor& ranges, int64_t batch) {
  return ranges.scalar_type() == ScalarType::Long && ranges.dim() == 3 && ranges.size(0) == batch &&
         ranges.size(1) <= MAX_SEGMENTS && ranges.size(2) == 2 && ranges.is_contiguous();
}

// `has_spare_row` of capacity.py.
bool has_spare_row(const Tensor& view, int64_t element_size) {
  std::array<std::pair<int64_t, int64_t>, 4> steps;
  for (int64_t d = 0; d < 4; ++d) steps[d] = {view.stride(d), view.size(d) + (d == 2)};
  std::sort(steps.begin(), steps.end());
  int64_t extent = 1, bytes = 0;
  for (const auto& [stride, size] : steps) {
    if (size > 1 && stride < extent) return false;
    extent += (size - 1) * stride;
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(view.get(), &bytes));
  return (view.storage_offset() + extent) * element_size <= bytes;
}

int64_t mask_kind_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool: return 1;
    case ScalarType::Float: return 2;
    case ScalarType::Half: return 3;
    case ScalarType::BFloat16: return 4;
    case ScalarType::Double: return 5;
    default: return 0;
  }
}

// The strides of the mask as if it were expanded to [batch, heads, 1, seen]; whether it can be.
bool expand(const Tensor& mask, const std::array<int64_t, 4>& shape, Call& call) {
  const int64_t dims = mask.dim();
  std::array<int64_t, 4> strides{};
  if (dims > 4) return false;
  for (int64_t d = 4 - dims; d < 4; ++d) {
    const int64_t size = mask.size(d + dims - 4);
    if (size != shape[d] && size != 1) return false;
    if (size == shape[d]) strides[d] = mask.stride(d + dims - 4);
  }
  call.mask_batch = strides[0], call.mask_head = strides[1], call.mask_key = strides[3];
  return true;
}

// Fills `c`, except for what is returned; false: the kernel is not made for this, or it does not fit together.
bool fits(const Given& given, double scale, Call& c) {
  const Tensor &value = *given.value;
  const ScalarType dtype = value.scalar_type();
  if (kind_of(dtype) < 0 || value.dim() != 4) return false;
  c.batch = value.size(0), c.kv_heads = value.size(1), c.keys = value.size(2), c.value_dim = value.size(3);
  if (c.batch == 0 || c.kv_heads == 0 || c.keys == 0 || value.stride(3) != 1) return false;
  c.value = value.data_ptr();
  c.value_batch = value.stride(0), c.value_head = value.stride(1), c.value_row = value.stride(2);

  const int64_t element = kind_of(dtype) == 0 ? 4 : 2, seen = c.keys + (given.new_value != nullptr);
  if (given.new_value) {
    const Tensor& row = *given.new_value;
    if (!are_rows(row, dtype, {c.batch, c.kv_heads, 1, c.value_dim}) || !has_spare_row(value, element)) return false;
    c.new_value = row.data_ptr(), c.new_value_batch = row.stride(0), c.new_value_head = row.stride(1);
  }

  if ((given.query == nullptr) != (given.key == nullptr)) return false;
  if (given.query) {
    const Tensor &query = *given.query, &key = *given.key;
    if (query.dim() != 4 || key.dim() != 4) return false;
    const int64_t rows = key.size(2);
    c.heads = query.size(1), c.head_dim = key.size(3), c.left_out = c.keys - rows;
    c.rotated_dim = given.rotated && given.rotated->dim() == 4 ? given.rotated->size(3) : 0;
    if (rows == 0 || rows > c.keys || !are_rows(query, dtype, {c.batch, c.heads, 1, c.head_dim + c.rotated_dim}) ||
        !are_rows(key, dtype, {c.batch, c.kv_heads, rows, c.head_dim}))
      return false;
    c.query = query.data_ptr(), c.query_batch = query.stride(0), c.query_head = query.stride(1);
    c.key = key.data_ptr();
    c.key_batch = key.stride(0), c.key_head = key.stride(1), c.key_row = key.stride(2);
    if (given.rotated) {
      const Tensor& rotated = *given.rotated;
      if (!are_rows(rotated, dtype, {c.batch, c.kv_heads, rows, c.rotated_dim})) return false;
      c.rotated = rotated.data_ptr();
      c.rotated_batch = rotated.stride(0), c.rotated_head = rotated.stride(1), c.rotated_row = rotated.stride(2);
      if ((given.new_rotated == nullptr) != (given.new_value == nullptr)) return false;
      if (given.new_rotated) {
        const Tensor& row = *given.new_rotated;
        if (!are_rows(row, dtype, {c.batch, c.kv_heads, 1, c.rotated_dim}) || !has_spare_row(rotated, element)) return false;
        c.new_rotated = row.data_ptr(), c.new_rotated_batch = row.stride(0), c.new_rotated_head = row.stride(1);
      }
    } else if ((given.new_key == nullptr) != (given.new_value == nullptr)) {
      return false;
    }
    if (given.new_key) {
      const Tensor& row = *given.new_key;
      if (!are_rows(row, dtype, {c.batch, c.kv_heads, 1, c.head_dim}) || !has_spare_row(key, element)) return false;
      c.new_key = row.data_ptr(), c.new_key_batch = row.stride(0), c.new_key_head = row.stride(1);
    }
  } else if (given.new_key || !given.logits || given.logits->dim() != 3) {
    return false;
  } else {
    c.heads = given.logits->size(1);
  }
  if (c.heads % c.kv_heads != 0) return false;

  if (given.mask) {
    c.mask_kind = mask_kind_of(given.mask->scalar_type());
    if (c.mask_kind == 0 || !expand(*given.mask, {c.batch, c.heads, 1, seen}, c)) return false;
    c.mask = given.mask->data_ptr();
  }
  c.entries = c.inherited_entries = -1;
  if (given.segments) {
    if (!are_ranges(*given.segments, c.batch)) return false;
    c.entries = given.segments->size(1), c.segments = static_cast<const int64_t*>(given.segments->data_ptr());
  }
  if (given.inherited) {
    if (!are_ranges(*given.inherited, c.batch)) return false;
    c.inherited_entries = given.inherited->size(1);
    c.inherited = static_cast<const int64_t*>(given.inherited->data_ptr());
  }
  if (given.logits) {
    const Tensor& logits = *given.logits;
    if (logits.scalar_type() != ScalarType::Float || !has_shape(logits, {c.batch, c.heads, seen}) ||
        !logits.is_contiguous())
      return false;
    c.logits = static_cast<const float*>(logits.data_ptr());
  }
  if (given.anchor_key) {
    const Tensor& anchor = *given.anchor_key;
    if (!given.query || anchor.dim() != 4 || anchor.size(2) == 0 || anchor.size(2) > seen ||
        !are_rows(anchor, dtype, {c.batch, c.kv_heads, anchor.size(2), c.head_dim}))
      return false;
    c.anchor_key = anchor.data_ptr(), c.anchor_keys = anchor.size(2);
    c.anchor_batch = anchor.stride(0), c.anchor_head = anchor.stride(1), c.anchor_row = anchor.stride(2);
  }
  if (given.weigh && (given.weigh->scalar_type() != ScalarType::Int || !has_shape(*given.weigh, {1}))) return false;
  c.threads = torch::stable::get_num_threads();
  c.scale = static_cast<float>(scale);
  return true;
}

}  // namespace
