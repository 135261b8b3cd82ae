// The lists that GSM's operators take, checked, as the plain data that the kernels take.
#pragma once

#include <vector>

#include "bindings/sgd_arguments.h"
#include "common/gsm_tensors.h"

namespace fastprune {

struct GsmArguments : SgdArguments {
  const std::vector<int64_t>& positions;
};

inline void check_lists(const GsmArguments& a) {
  check_lists(static_cast<const SgdArguments&>(a));
  STD_TORCH_CHECK(a.positions.size() == a.weights.size(),
                  "every list must have one entry per weight");
}

inline std::vector<GsmWeight> gsm_weights(const GsmArguments& a) {
  std::vector<GsmWeight> weights(a.weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    set_tensor(a, i, true, &weights[i]);
    weights[i].position = a.positions[i];
  }
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
