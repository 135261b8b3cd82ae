// The lists that ASWL's operator takes, checked, as the plain data that the kernels take.
#pragma once

#include <vector>

#include "bindings/tensor_list.h"
#include "common/aswl_tensors.h"

namespace fastprune {

struct AswlArguments {
  const Tensors& parameters;
  const Tensors& dense;    // an empty one: the parameter, of no layer, is its own
  const Tensors& momenta;  // no list or an empty tensor: no buffer
  const Tensor& attention;
  const Tensor& tie_end;
  const Tensor& multiplier;
  const Tensors& gradients;  // an empty one: none
  const Tensor& settings;
  const std::vector<int64_t>& layers;
  const std::vector<int64_t>& roles;
};

enum AswlRole : int64_t { kPlain, kBoth, kScaled, kPruned };

inline void check_lists(const AswlArguments& a) {
  const size_t count = a.parameters.size();
  STD_TORCH_CHECK(a.dense.size() == count && a.gradients.size() == count &&
                      (a.momenta.empty() || a.momenta.size() == count) &&
                      a.layers.size() == count && a.roles.size() == count,
                  "every list must have one entry per parameter");
  const auto is_double = [](const Tensor& t) {
    return t.scalar_type() == ScalarType::Double && t.is_contiguous();
  };
  STD_TORCH_CHECK(is_double(a.attention) && a.attention.dim() == 2 && a.attention.size(1) == 3 &&
                      a.tie_end.scalar_type() == ScalarType::Long && a.tie_end.is_contiguous() &&
                      a.tie_end.dim() == 1 && a.tie_end.size(0) == a.attention.size(0),
                  "attention must be a contiguous float64 matrix of 3 columns and tie_end hold an "
                  "int64 number for each of its rows");
  STD_TORCH_CHECK(is_double(a.multiplier) && a.multiplier.numel() == 1,
                  "multiplier must be one float64 number");
  constexpr int64_t kSettings = sizeof(AswlSettings) / sizeof(double);
  STD_TORCH_CHECK(is_double(a.settings) && a.settings.dim() == 1 && a.settings.size(0) == kSettings,
                  "settings must be ", kSettings, " contiguous float64 numbers");
}

inline AswlTensor aswl_tensor(const AswlArguments& a, size_t i) {
  const Tensor& parameter = a.parameters[i];
  const bool is_own = a.dense[i].numel() == 0 && a.roles[i] == kPlain;
  const Tensor& dense = is_own ? parameter : a.dense[i];
  AswlTensor t{};
  t.position = -1;
  t.layer = static_cast<int32_t>(a.layers[i]);
  if (is_own && parameter.numel() == 0) return t;
  t.dtype = dtype_of(dense);
  t.parameter_dtype = dtype_of(parameter);
  STD_TORCH_CHECK((t.dtype == DType::kFloat32 || t.dtype == DType::kFloat64) &&
                      may_pair(t.dtype, t.parameter_dtype) && same_layout(dense, parameter),
                  "dense[", i, "] must be float32 or float64 in the layout of parameters[", i,
                  "], which has the same type, or 16 bits beside float32");
  const auto sizes = dense.sizes();
  STD_TORCH_CHECK(
      make_layout(sizes.data(), dense.strides().data(), static_cast<int>(sizes.size()), &t.layout),
      "parameters[", i, "] must be dense in memory; call .contiguous() on it");
  t.parameter = parameter.data_ptr();
  t.dense = dense.data_ptr();
  t.numel = dense.numel();
  t.is_scaled = a.roles[i] == kBoth || a.roles[i] == kScaled;
  if (!a.momenta.empty() && a.momenta[i].numel() != 0) {
    STD_TORCH_CHECK(dtype_of(a.momenta[i]) == t.dtype && same_layout(a.momenta[i], dense),
                    "momenta[", i, "] must have the type and the layout of dense[", i, "]");
    t.momentum = a.momenta[i].data_ptr();
  }
  if (a.gradients[i].numel() != 0) {
    t.gradient_dtype = dtype_of(a.gradients[i]);
    STD_TORCH_CHECK(may_pair(t.dtype, t.gradient_dtype) && same_layout(a.gradients[i], dense),
                    "gradients[", i, "] must have the layout of dense[", i,
                    "] and its type, or 16 bits beside float32");
    t.gradient = a.gradients[i].data_ptr();
  }
  return t;
}

// Layers are all there, each a run of neighbours that has a pool of one type.
inline std::vector<AswlTensor> aswl_tensors(const AswlArguments& a) {
  check_lists(a);
  std::vector<AswlTensor> tensors;
  tensors.reserve(a.parameters.size());
  int64_t layer = -1, pool = 1;
  DType pool_dtype{};
  for (size_t i = 0; i < a.parameters.size(); ++i) {
    STD_TORCH_CHECK(a.roles[i] >= kPlain && a.roles[i] <= kPruned &&
                        (a.roles[i] == kPlain) == (a.layers[i] < 0),
                    "roles[", i, "] must be 0 for a tensor of no layer, else 1, 2 or 3");
    AswlTensor t = aswl_tensor(a, i);
    if (t.layer >= 0 && t.layer != layer) {
      STD_TORCH_CHECK(t.layer == layer + 1 && pool > 0, "layers[", i,
                      "] must continue its neighbour's layer or begin the next one, and each "
                      "layer have a tensor that is pruned");
      layer = t.layer;
      pool = 0;
    }
    const bool is_pruned = a.roles[i] == kBoth || a.roles[i] == kPruned;
    if (is_pruned) {
      STD_TORCH_CHECK(pool == 0 || t.dtype == pool_dtype, "dense[", i,
                      "] must have the type of the others that its layer prunes");
      pool_dtype = t.dtype;
      t.position = pool;
      pool += t.numel;
    }
    tensors.push_back(t);
  }
  STD_TORCH_CHECK(layer + 1 == a.attention.size(0) && pool > 0,
                  "attention must have a row for each layer, and each layer a tensor that is "
                  "pruned");
  return tensors;
}

}  // namespace fastprune
