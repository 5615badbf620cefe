// avl::narrow_linear for PyTorch's dispatcher, by its stable ABI: a call that passes through Python takes as long as it
// takes to read a hundred kilobytes of weight. What this kernel is not made for goes on to Python.

#include "operator.h"

#include "native.cpp"

namespace {

constexpr int64_t MAX_ROWS = 32;  // as in schema.py

Tensor in_python(const Tensor& input, const Tensor& weight, const Maybe& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(input), from(weight), from(bias)};
  call_python("avl::narrow_linear_in_python", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <typename T>
const float* widened(const void* input, int64_t count) {
  static thread_local std::vector<float> kept;
  kept.resize(count);
  const T* given = static_cast<const T*>(input);
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store(load(given + i), kept.data() + i);
  for (; i < count; ++i) kept[i] = number(given[i]);
  return kept.data();
}

Tensor narrow_linear(const Tensor& input, const Tensor& weight, const Maybe& bias) {
  const ScalarType dtype = weight.scalar_type();
  const int64_t kind = kind_of(dtype), dims = input.dim();
  if (kind < 0 || input.scalar_type() != dtype || weight.dim() != 2 || dims == 0 || !input.is_contiguous())
    return in_python(input, weight, bias);
  // Python's error would lose its words on the way back.
  STD_TORCH_CHECK(input.size(dims - 1) == weight.size(1), "avl::narrow_linear: the rows of the input have ",
                  input.size(dims - 1), " elements, those of the weight ", weight.size(1));
  const int64_t wide = weight.size(0), features = weight.size(1), count = input.numel();
  if (features == 0 || weight.stride(1) != 1 || count > MAX_ROWS * features) return in_python(input, weight, bias);
  if (bias && (bias->scalar_type() != dtype || bias->dim() != 1 || bias->size(0) != wide || !bias->is_contiguous()))
    return in_python(input, weight, bias);

  std::vector<int64_t> shape(dims);
  for (int64_t d = 0; d + 1 < dims; ++d) shape[d] = input.size(d);
  shape[dims - 1] = wide;
  Tensor out = empty(shape, dtype);
  const void* given = input.data_ptr();
  const int64_t sizes[] = {count / features, features, wide, features, weight.stride(0),
                           torch::stable::get_num_threads(), kind};
  const float* x = kind == 0   ? static_cast<const float*>(given)
                   : kind == 1 ? widened<Half>(given, count)
                               : widened<BFloat>(given, count);
  avl_narrow_linear(x, weight.data_ptr(), address(bias), out.data_ptr(), sizes);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avl, CPU, library) { library.impl("narrow_linear", TORCH_BOX(&narrow_linear)); }
