// The Dirichlet operators' tensors, checked, as the plain data that the kernels take.
#pragma once

#include <tuple>

#include "bindings/tensor_list.h"
#include "common/dirichlet.h"

namespace fastprune {

inline Reals reals(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name,
                  " must be float32 or float64");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return {tensor.data_ptr(), type == ScalarType::Double};
}

inline DirichletLayers dirichlet_layers(const Tensor& offsets, int64_t elements) {
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.dim() == 1 &&
                      offsets.is_contiguous() && offsets.numel() > 0,
                  "offsets must be contiguous int64 of one dimension, with one more than layers");
  return {offsets.const_data_ptr<int64_t>(), offsets.numel() - 1, elements};
}

inline DirichletKey dirichlet_key(int64_t num_samples, int64_t seed, int64_t offset) {
  STD_TORCH_CHECK(num_samples >= 0, "num_samples must be 0 or more, got ", num_samples);
  STD_TORCH_CHECK(offset >= 0 && offset < int64_t{1} << 32, "offset must be 0 to 2^32 - 1, got ",
                  offset);
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(offset)};
}

// kl and gradient, to be filled.
inline std::tuple<Tensor, Tensor> empty_kl(const Tensor& concentration, const Tensor& offsets,
                                           const Tensor& prior) {
  STD_TORCH_CHECK(prior.numel() + 1 == offsets.numel(), "prior must have one number per layer");
  return {torch::stable::new_empty(concentration, {offsets.numel() - 1}),
          torch::stable::new_empty(concentration, {concentration.numel()})};
}

// samples and log_derivatives, to be filled.
inline std::tuple<Tensor, Tensor> empty_samples(const Tensor& concentration, int64_t num_samples) {
  const int64_t elements = concentration.numel();
  return {torch::stable::new_empty(concentration, {num_samples, elements}),
          torch::stable::new_empty(concentration, {num_samples, elements})};
}

inline void check_backward(const Tensor& grad, const Tensor& samples, const Tensor& slopes) {
  for (const Tensor* tensor : {&grad, &samples, &slopes}) {
    STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == samples.size(0) &&
                        tensor->size(1) == samples.size(1),
                    "grad, samples and log_derivatives must have the same two dimensions");
  }
}

}  // namespace fastprune
