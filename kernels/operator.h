// What the operators share that are given to PyTorch's dispatcher in C++, by its stable ABI.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// Calls an operator that is implemented in Python; the stack receives what it returns.
template <size_t N>
void call_python(const char* name, std::array<StableIValue, N>& stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
}

// What the kernels call the kinds of numbers that they compute with; -1: none of these.
inline int64_t kind_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return 0;
    case ScalarType::Half: return 1;
    case ScalarType::BFloat16: return 2;
    default: return -1;
  }
}

// A contiguous tensor of whatever is in the memory. `torch::stable::new_empty` goes by the dispatcher, which costs 2 us
// more, and 10 in a step, whose weights have pushed its code out of the processor's caches.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline const void* address(const Maybe& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

}  // namespace
