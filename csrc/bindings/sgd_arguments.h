// The lists that a step of momentum SGD takes, checked, as the plain data that the kernels take.
#pragma once

#include <vector>

#include "bindings/tensor_list.h"
#include "common/sgd_tensors.h"

namespace fastprune {

struct SgdArguments {
  const Tensors& weights;
  const Tensors& momenta;
  const Tensors& copies;  // empty, or per weight its 16-bit parameter or an empty tensor
  const Tensors& gradients;
  const Tensor& settings;
  const std::vector<int64_t>& rows;
};

inline void check_lists(const SgdArguments& a) {
  const size_t count = a.weights.size();
  STD_TORCH_CHECK(a.momenta.size() == count && a.gradients.size() == count &&
                      a.rows.size() == count && (a.copies.empty() || a.copies.size() == count),
                  "every list must have one entry per weight");
  STD_TORCH_CHECK(a.settings.scalar_type() == ScalarType::Double && a.settings.is_contiguous() &&
                      a.settings.dim() == 2 && a.settings.size(1) == kSgdSettings,
                  "settings must be a contiguous float64 matrix with ", kSgdSettings, " columns");
}

inline void set_copy(const Tensor& weight, const Tensor& copy, size_t i, SgdTensor* t) {
  t->copy_dtype = dtype_of(copy);
  STD_TORCH_CHECK(t->dtype == DType::kFloat32 && same_layout(weight, copy) &&
                      (t->copy_dtype == DType::kBFloat16 || t->copy_dtype == DType::kFloat16),
                  "copies[", i, "] must be a 16-bit tensor with the layout of weights[", i, "]");
  t->copy = copy.data_ptr();
}

// `has_momentum`: false for a tensor that goes without a buffer.
inline void set_tensor(const SgdArguments& a, size_t i, bool has_momentum, SgdTensor* t) {
  const Tensor &weight = a.weights[i], &momentum = a.momenta[i], &gradient = a.gradients[i];
  t->dtype = dtype_of(weight);
  t->gradient_dtype = dtype_of(gradient);
  STD_TORCH_CHECK((t->dtype == DType::kFloat32 || t->dtype == DType::kFloat64) &&
                      (!has_momentum || momentum.scalar_type() == weight.scalar_type()) &&
                      may_pair(t->dtype, t->gradient_dtype),
                  "weights[", i, "] and momenta[", i,
                  "] must both be float32 or float64, and gradients[", i,
                  "] of the same type, or of 16 bits beside float32");
  const auto sizes = weight.sizes();
  STD_TORCH_CHECK(make_layout(sizes.data(), weight.strides().data(), static_cast<int>(sizes.size()),
                              &t->layout) &&
                      (!has_momentum || same_layout(weight, momentum)) &&
                      same_layout(weight, gradient),
                  "weights[", i, "], momenta[", i, "] and gradients[", i,
                  "] must be dense, of one shape and one layout");
  STD_TORCH_CHECK(a.rows[i] >= 0 && a.rows[i] < a.settings.size(0), "rows[", i, "] is not a row");
  t->weight = weight.data_ptr();
  t->momentum = has_momentum ? momentum.data_ptr() : nullptr;
  t->gradient = gradient.data_ptr();
  t->numel = weight.numel();
  t->row = static_cast<int32_t>(a.rows[i]);
  if (!a.copies.empty() && a.copies[i].numel() != 0) set_copy(weight, a.copies[i], i, t);
}

}  // namespace fastprune
