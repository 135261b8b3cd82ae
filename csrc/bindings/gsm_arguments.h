// The lists that GSM's operators take, checked, as the plain data that the kernels take.
#pragma once

#include <vector>

#include "bindings/tensor_list.h"
#include "common/gsm_tensors.h"

namespace fastprune {

struct GsmArguments {
  const Tensors& weights;
  const Tensors& momenta;
  const Tensors& copies;  // empty, or per weight its 16-bit parameter or an empty tensor
  const Tensors& gradients;
  const std::vector<int64_t>& positions;
  const Tensor& settings;
  const std::vector<int64_t>& rows;
};

inline void check_lists(const GsmArguments& a) {
  const size_t count = a.weights.size();
  STD_TORCH_CHECK(a.momenta.size() == count && a.gradients.size() == count &&
                      a.positions.size() == count && a.rows.size() == count &&
                      (a.copies.empty() || a.copies.size() == count),
                  "every list must have one entry per weight");
  STD_TORCH_CHECK(a.settings.scalar_type() == ScalarType::Double && a.settings.is_contiguous() &&
                      a.settings.dim() == 2 && a.settings.size(1) == kGsmSettings,
                  "settings must be a contiguous float64 matrix with ", kGsmSettings, " columns");
}

inline void set_copy(const Tensor& weight, const Tensor& copy, size_t i, GsmWeight* w) {
  w->copy_dtype = dtype_of(copy);
  STD_TORCH_CHECK(w->dtype == DType::kFloat32 && same_layout(weight, copy) &&
                      (w->copy_dtype == DType::kBFloat16 || w->copy_dtype == DType::kFloat16),
                  "copies[", i, "] must be a 16-bit tensor with the layout of weights[", i, "]");
  w->copy = copy.data_ptr();
}

inline GsmWeight gsm_weight(const GsmArguments& a, size_t i) {
  const Tensor &weight = a.weights[i], &momentum = a.momenta[i], &gradient = a.gradients[i];
  GsmWeight w{};
  w.dtype = dtype_of(weight);
  w.gradient_dtype = dtype_of(gradient);
  STD_TORCH_CHECK(
      (w.dtype == DType::kFloat32 || w.dtype == DType::kFloat64) &&
          momentum.scalar_type() == weight.scalar_type() && may_pair(w.dtype, w.gradient_dtype),
      "weights[", i, "] and momenta[", i, "] must both be float32 or float64, and gradients[", i,
      "] of the same type, or of 16 bits beside float32");
  const auto sizes = weight.sizes();
  STD_TORCH_CHECK(make_layout(sizes.data(), weight.strides().data(), static_cast<int>(sizes.size()),
                              &w.layout) &&
                      same_layout(weight, momentum) && same_layout(weight, gradient),
                  "weights[", i, "], momenta[", i, "] and gradients[", i,
                  "] must be dense, of one shape and one layout");
  STD_TORCH_CHECK(a.rows[i] >= 0 && a.rows[i] < a.settings.size(0), "rows[", i, "] is not a row");
  w.weight = weight.data_ptr();
  w.momentum = momentum.data_ptr();
  w.gradient = gradient.data_ptr();
  w.numel = weight.numel();
  w.position = a.positions[i];
  w.row = static_cast<int32_t>(a.rows[i]);
  if (!a.copies.empty() && a.copies[i].numel() != 0) set_copy(weight, a.copies[i], i, &w);
  return w;
}

inline std::vector<GsmWeight> gsm_weights(const GsmArguments& a) {
  std::vector<GsmWeight> weights;
  weights.reserve(a.weights.size());
  for (size_t i = 0; i < a.weights.size(); ++i) weights.push_back(gsm_weight(a, i));
  return weights;
}

// One per weight; empty if there are none.
inline std::vector<GsmGate> gsm_gates(const GsmArguments& a, const Tensors& gates, GsmBlock block) {
  const auto num_blocks = [](int64_t size, int64_t of) { return size / of + (size % of != 0); };
  STD_TORCH_CHECK(
      (gates.empty() || gates.size() == a.weights.size()) && block.outputs > 0 && block.inputs > 0,
      "gates must have one entry per weight, and block two positive numbers");
  std::vector<GsmGate> checked;
  for (size_t i = 0; i < gates.size(); ++i) {
    checked.push_back({nullptr, 1, 1});
    if (a.positions[i] < 0) continue;
    const Tensor &weight = a.weights[i], &gate = gates[i];
    STD_TORCH_CHECK(
        weight.dim() >= 2 && gate.scalar_type() == ScalarType::Bool && gate.is_contiguous(),
        "gates[", i, "] must be a contiguous bool tensor, weights[", i, "] a matrix");
    const int64_t matrix = weight.size(0) * weight.size(1);
    const GsmGate g{static_cast<const bool*>(gate.data_ptr()), weight.size(1),
                    matrix == 0 ? 0 : weight.numel() / matrix};
    STD_TORCH_CHECK(gate.numel() == num_blocks(weight.size(0), block.outputs) *
                                        num_blocks(weight.size(1), block.inputs) * g.taps ||
                        weight.numel() == 0,
                    "gates[", i, "] must hold one bool per block");
    checked.back() = g;
  }
  return checked;
}

// The pool, for the selection: its positions must be those of a list of tensors, one after another.
inline std::vector<TensorEntry> gsm_pool(const std::vector<GsmWeight>& weights) {
  std::vector<TensorEntry> pool;
  int64_t position = 0;
  for (const GsmWeight& w : weights) {
    if (w.position < 0) continue;
    STD_TORCH_CHECK(w.position == position,
                    "positions must count the elements of the pool, from 0 and without gaps");
    STD_TORCH_CHECK(pool.empty() || w.dtype == pool[0].dtype,
                    "weights of the pool must be all float64 or none");
    pool.push_back(
        {w.weight, w.gradient, w.numel, position, 0, w.dtype, w.gradient_dtype, w.layout});
    position += w.numel;
  }
  return pool;
}

}  // namespace fastprune
