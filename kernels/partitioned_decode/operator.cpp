// The operators of this kernel for PyTorch's dispatcher, by its stable ABI: of a short cache, a call that passes through
// Python takes longer than its attention. What the kernel is not made for, and what does not fit, goes on to Python.

#include "call.h"

namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

template <typename... Arguments>
std::array<StableIValue, sizeof...(Arguments)> stack_of(const Arguments&... arguments) {
  return {from(arguments)...};
}

Given given_of(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& new_key, const Maybe& new_value,
               const Maybe& mask, const Maybe& segments, const Maybe& weigh) {
  return {&query, &key, &value, maybe(new_key), maybe(new_value), maybe(mask), maybe(segments), maybe(weigh)};
}

// Calls an operator's implementation in Python. `arguments` makes a stack of them, which each call uses up.
template <typename Arguments>
auto in_python(const std::string& name, Arguments arguments) {
  // An error would lose its words on the way back: it is asked for first.
  auto stack = arguments();
  call_python((name + "_error").c_str(), stack);
  const std::string error = to<std::string>(stack[0]);
  STD_TORCH_CHECK(error.empty(), error);
  stack = arguments();
  call_python((name + "_in_python").c_str(), stack);
  return stack;
}

// Runs the kernel; the attention and its weights.
std::tuple<Tensor, Tensor> answer(Call& c, const Given& given) {
  const Tensor &value = *given.value, *weigh = given.weigh;
  const int64_t seen = c.keys + (given.new_value != nullptr);
  Tensor out = empty({c.batch, c.heads, 1, c.value_dim}, value.scalar_type());
  Tensor weights = empty({c.batch, c.kv_heads, weigh ? seen : 0}, ScalarType::Float);
  c.out = out.data_ptr();
  if (weigh && *static_cast<const int32_t*>(weigh->data_ptr()) != 0)
    c.weights = static_cast<float*>(weights.data_ptr());
  const int64_t kind = kind_of(value.scalar_type());
  if (kind == 0) run<float>(c);
  else if (kind == 1) run<Half>(c);
  else run<BFloat>(c);
  return {out, weights};
}

std::tuple<Tensor, Tensor> partitioned_decode(const Tensor& query, const Tensor& key, const Tensor& value,
                                              const Maybe& new_key, const Maybe& new_value, const Maybe& mask,
                                              const Maybe& segments, const Maybe& weigh, double scale) {
  const Given given = given_of(query, key, value, new_key, new_value, mask, segments, weigh);
  Call c{};
  if (fits(given, scale, c)) return answer(c, given);
  const auto stack = in_python("avl::partitioned_decode", [&] {
    return stack_of(query, key, value, new_key, new_value, mask, segments, weigh, scale);
  });
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor, Tensor> anchor_decode(const Tensor& query, const Tensor& key, const Tensor& value,
                                                 const Maybe& new_key, const Maybe& new_value, const Maybe& mask,
                                                 const Maybe& segments, const Maybe& weigh, double scale) {
  const Given given = given_of(query, key, value, new_key, new_value, mask, segments, weigh);
  Call c{};
  if (fits(given, scale, c)) {
    const int64_t seen = c.keys + new_value.has_value();
    Tensor kept = empty({c.batch, c.heads, seen}, ScalarType::Float);
    c.kept = static_cast<float*>(kept.data_ptr());
    std::fill_n(c.kept, c.batch * c.heads * seen, NOTHING);
    const auto [out, weights] = answer(c, given);
    return {out, weights, kept};
  }
  const auto stack = in_python("avl::anchor_decode", [&] {
    return stack_of(query, key, value, new_key, new_value, mask, segments, weigh, scale);
  });
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

Tensor inherited_decode(const Maybe& logits, const Maybe& query, const Maybe& key, const Tensor& value,
                        const Maybe& new_key, const Maybe& new_value, const Maybe& mask, const Maybe& segments,
                        const Maybe& inherited, double scale, const Maybe& anchor_key) {
  const Given given{maybe(query),    maybe(key), &value,        maybe(new_key),   maybe(new_value), maybe(mask),
                    maybe(segments), nullptr,    maybe(logits), maybe(inherited), maybe(anchor_key)};
  Call c{};
  // Either logits are inherited or keys are; without a query it is all logits.
  const bool is_whole = logits.has_value() != anchor_key.has_value() && query.has_value() == inherited.has_value();
  if (is_whole && fits(given, scale, c)) return std::get<0>(answer(c, given));
  const auto stack = in_python("avl::inherited_decode", [&] {
    return stack_of(logits, query, key, value, new_key, new_value, mask, segments, inherited, scale, anchor_key);
  });
  return to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor> latent_decode(const Tensor& query, const Tensor& latents, const Tensor& rotated,
                                         const Maybe& new_latents, const Maybe& new_rotated, const Maybe& mask,
                                         const Maybe& segments, const Maybe& weigh, double scale) {
  Given given{&query, &latents, &latents, nullptr, maybe(new_latents), maybe(mask), maybe(segments), maybe(weigh)};
  given.rotated = &rotated, given.new_rotated = maybe(new_rotated);
  Call c{};
  if (fits(given, scale, c)) return answer(c, given);
  const auto stack = in_python("avl::latent_decode", [&] {
    return stack_of(query, latents, rotated, new_latents, new_rotated, mask, segments, weigh, scale);
  });
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avl, CPU, library) {
  library.impl("partitioned_decode", TORCH_BOX(&partitioned_decode));
  library.impl("anchor_decode", TORCH_BOX(&anchor_decode));
  library.impl("inherited_decode", TORCH_BOX(&inherited_decode));
  library.impl("latent_decode", TORCH_BOX(&latent_decode));
}
