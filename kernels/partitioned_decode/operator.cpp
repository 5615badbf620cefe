// avl::partitioned_decode for PyTorch's dispatcher, by its stable ABI: of a short cache, a call that passes through Python
// takes longer than its attention. What this kernel is not made for, and what does not fit, goes on to Python.

#include "operator.h"

#include <algorithm>

#include "native.cpp"

namespace {

constexpr int64_t MAX_SEGMENTS = 64;  // as in schema.py

using Both = std::tuple<Tensor, Tensor>;

struct Arguments {
  const Tensor &query, &key, &value;
  const Maybe &new_key, &new_value, &mask, &segments, &weigh;
  double scale;

  std::array<StableIValue, 9> stack() const {
    using torch::stable::detail::from;
    return {from(query), from(key),      from(value), from(new_key), from(new_value),
            from(mask),  from(segments), from(weigh), from(scale)};
  }
};

Both in_python(const Arguments& given) {
  using torch::stable::detail::to;
  // An error would lose its words on the way back: it is asked for first.
  auto stack = given.stack();
  call_python("avl::partitioned_decode_error", stack);
  const std::string error = to<std::string>(stack[0]);
  STD_TORCH_CHECK(error.empty(), error);
  stack = given.stack();
  call_python("avl::partitioned_decode_in_python", stack);
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

bool has_shape(const Tensor& tensor, const std::array<int64_t, 4>& shape) {
  if (tensor.dim() != 4) return false;
  for (int64_t d = 0; d < 4; ++d)
    if (tensor.size(d) != shape[d]) return false;
  return true;
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

Both partitioned_decode(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& new_key,
                        const Maybe& new_value, const Maybe& mask, const Maybe& segments, const Maybe& weigh,
                        double scale) {
  const Arguments given{query, key, value, new_key, new_value, mask, segments, weigh, scale};
  const ScalarType dtype = query.scalar_type();
  const int64_t kind = kind_of(dtype);
  if (kind < 0 || key.scalar_type() != dtype || value.scalar_type() != dtype) return in_python(given);
  if (query.dim() != 4 || key.dim() != 4 || value.dim() != 4) return in_python(given);

  Call c{};
  c.batch = query.size(0), c.heads = query.size(1), c.head_dim = query.size(3);
  c.kv_heads = key.size(1), c.keys = key.size(2), c.value_dim = value.size(3);
  if (query.size(2) != 1 || c.batch == 0 || c.kv_heads == 0 || c.keys == 0 || c.heads % c.kv_heads != 0 ||
      !has_shape(key, {c.batch, c.kv_heads, c.keys, c.head_dim}) ||
      !has_shape(value, {c.batch, c.kv_heads, c.keys, c.value_dim}) || query.stride(3) != 1 || key.stride(3) != 1 ||
      value.stride(3) != 1)
    return in_python(given);
  c.query_batch = query.stride(0), c.query_head = query.stride(1);
  c.key_batch = key.stride(0), c.key_head = key.stride(1), c.key_row = key.stride(2);
  c.value_batch = value.stride(0), c.value_head = value.stride(1), c.value_row = value.stride(2);

  if (new_key.has_value() != new_value.has_value()) return in_python(given);
  int64_t seen = c.keys;
  if (new_key) {
    const int64_t element = kind == 0 ? 4 : 2;
    if (!has_shape(*new_key, {c.batch, c.kv_heads, 1, c.head_dim}) ||
        !has_shape(*new_value, {c.batch, c.kv_heads, 1, c.value_dim}) || new_key->scalar_type() != dtype ||
        new_value->scalar_type() != dtype || new_key->stride(3) != 1 || new_value->stride(3) != 1 ||
        !has_spare_row(key, element) || !has_spare_row(value, element))
      return in_python(given);
    c.new_key_batch = new_key->stride(0), c.new_key_head = new_key->stride(1);
    c.new_value_batch = new_value->stride(0), c.new_value_head = new_value->stride(1);
    ++seen;
  }
  if (mask) {
    c.mask_kind = mask_kind_of(mask->scalar_type());
    if (c.mask_kind == 0 || !expand(*mask, {c.batch, c.heads, 1, seen}, c)) return in_python(given);
  }
  c.entries = c.inherited_entries = -1;
  if (segments) {
    if (segments->scalar_type() != ScalarType::Long || segments->dim() != 3 || segments->size(0) != c.batch ||
        segments->size(1) > MAX_SEGMENTS || segments->size(2) != 2 || !segments->is_contiguous())
      return in_python(given);
    c.entries = segments->size(1);
  }
  if (weigh && (weigh->scalar_type() != ScalarType::Int || weigh->dim() != 1 || weigh->size(0) != 1))
    return in_python(given);

  Tensor out = torch::stable::new_empty(query, std::vector<int64_t>{c.batch, c.heads, 1, c.value_dim});
  Tensor weights = torch::stable::new_empty(query, std::vector<int64_t>{c.batch, c.kv_heads, weigh ? seen : 0},
                                            ScalarType::Float);
  c.query = query.data_ptr(), c.key = key.data_ptr(), c.value = value.data_ptr();
  c.new_key = address(new_key), c.new_value = address(new_value), c.mask = address(mask);
  c.segments = static_cast<const int64_t*>(address(segments));
  c.out = out.data_ptr();
  if (weigh && *static_cast<const int32_t*>(weigh->data_ptr()) != 0)
    c.weights = static_cast<float*>(weights.data_ptr());
  c.threads = torch::stable::get_num_threads();
  c.scale = static_cast<float>(scale);
  if (kind == 0) run<float>(c);
  else if (kind == 1) run<Half>(c);
  else run<BFloat>(c);
  return {out, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avl, CPU, library) { library.impl("partitioned_decode", TORCH_BOX(&partitioned_decode)); }
