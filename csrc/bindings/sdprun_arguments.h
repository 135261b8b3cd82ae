// The lists that SDprun's operators take, checked, as the plain data that the kernels take.
#pragma once

#include <vector>

#include "bindings/tensor_list.h"
#include "common/sdprun.h"
#include "common/sdprun_tensors.h"

namespace fastprune {

struct SdprunArguments {
  const Tensors& accumulators;  // an empty one: the weight, not pruned, is its own
  const Tensors& momenta;       // no list or an empty tensor: no buffer
  const Tensors& weights;
  const Tensors& gradients;  // an empty one: none
  const Tensor& norms;
  const Tensor& progress;
  const Tensor& settings;
  const std::vector<int64_t>& rows;
  const std::vector<int64_t>& first_groups;
  const std::vector<int64_t>& column_groups;
};

inline void check_numbers(const Tensor& progress, const Tensor& settings) {
  const auto is_table = [](const Tensor& t, size_t columns) {
    return t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.dim() == 2 &&
           t.size(1) == static_cast<int64_t>(columns);
  };
  STD_TORCH_CHECK(is_table(progress, sizeof(SdprunProgress) / sizeof(double)) &&
                      is_table(settings, sizeof(SdprunSettings) / sizeof(double)) &&
                      progress.size(0) == settings.size(0),
                  "progress and settings must be contiguous float64 matrices with equally many "
                  "rows, of ",
                  sizeof(SdprunProgress) / sizeof(double), " and ",
                  sizeof(SdprunSettings) / sizeof(double), " columns");
}

inline void check_lists(const SdprunArguments& a) {
  const size_t count = a.weights.size();
  STD_TORCH_CHECK(a.accumulators.size() == count && a.rows.size() == count &&
                      (a.momenta.empty() || a.momenta.size() == count) &&
                      (a.gradients.empty() || a.gradients.size() == count) &&
                      a.first_groups.size() == count && a.column_groups.size() == count,
                  "every list must have one entry per weight");
  STD_TORCH_CHECK(a.norms.scalar_type() == ScalarType::Double && a.norms.is_contiguous(),
                  "norms must be a contiguous float64 tensor");
  check_numbers(a.progress, a.settings);
}

inline void check_dense(const Tensor& weight, size_t i) {
  Layout layout;
  const auto sizes = weight.sizes(), strides = weight.strides();
  STD_TORCH_CHECK(
      make_layout(sizes.data(), strides.data(), static_cast<int>(sizes.size()), &layout),
      "weights[", i, "] must be dense in memory; call .contiguous() on it");
}

inline ChannelLayout channel_layout(const Tensor& weight, int64_t column_groups, size_t i) {
  const auto sizes = weight.sizes(), strides = weight.strides();
  const int64_t numel = weight.numel();
  const size_t dim = column_groups > 0 ? 1 : 0;
  STD_TORCH_CHECK(sizes.size() > dim && column_groups >= 0, "weights[", i,
                  "] must have a dimension of channels");
  const int64_t outer = column_groups > 0 ? column_groups : 1, columns = sizes[dim];
  STD_TORCH_CHECK(
      outer == 1 || (sizes[0] % outer == 0 && (numel == 0 || strides[0] * sizes[0] == numel)),
      "weights[", i, "] must have its convolution groups in dimension 0, the outermost in memory");
  if (numel == 0) return {outer, 1, columns, 0};
  if (columns == 1) return {outer, 1, 1, numel / outer};  // its stride says nothing
  return {outer, numel / (outer * columns * strides[dim]), columns, strides[dim]};
}

inline SdprunTensor sdprun_tensor(const SdprunArguments& a, size_t i) {
  const Tensor& weight = a.weights[i];
  const bool pruned = a.first_groups[i] >= 0;
  const bool has_own = !pruned && a.accumulators[i].numel() == 0;
  const Tensor& accumulator = has_own ? weight : a.accumulators[i];
  SdprunTensor t{};
  t.first_group = -1;
  if (!pruned && weight.numel() == 0) return t;
  check_dense(weight, i);
  t.dtype = dtype_of(accumulator);
  t.weight_dtype = dtype_of(weight);
  STD_TORCH_CHECK((t.dtype == DType::kFloat32 || t.dtype == DType::kFloat64) &&
                      may_pair(t.dtype, t.weight_dtype) && same_layout(accumulator, weight),
                  "accumulators[", i, "] must be float32 or float64 in the layout of weights[", i,
                  "], which has the same type, or 16 bits beside float32");
  STD_TORCH_CHECK(a.rows[i] >= 0 && a.rows[i] < a.settings.size(0), "rows[", i, "] is not a row");
  t.accumulator = accumulator.data_ptr();
  t.weight = weight.data_ptr();
  if (pruned) t.first_group = a.first_groups[i];
  t.row = static_cast<int32_t>(a.rows[i]);
  t.layout = pruned ? channel_layout(weight, a.column_groups[i], i)
                    : ChannelLayout{1, 1, 1, weight.numel()};
  STD_TORCH_CHECK(!pruned || t.first_group + t.layout.channels() <= a.norms.numel(),
                  "first_groups[", i, "] must leave room for its channels in norms");
  if (!a.momenta.empty() && a.momenta[i].numel() != 0) {
    STD_TORCH_CHECK(dtype_of(a.momenta[i]) == t.dtype && same_layout(a.momenta[i], weight),
                    "momenta[", i, "] must have the type of accumulators[", i,
                    "] and the layout of weights[", i, "]");
    t.momentum = a.momenta[i].data_ptr();
  }
  if (!a.gradients.empty() && a.gradients[i].numel() != 0) {
    t.gradient_dtype = dtype_of(a.gradients[i]);
    STD_TORCH_CHECK(may_pair(t.dtype, t.gradient_dtype) && same_layout(a.gradients[i], weight),
                    "gradients[", i, "] must have the layout of weights[", i,
                    "] and the type of its accumulator, or 16 bits");
    t.gradient = a.gradients[i].data_ptr();
  }
  return t;
}

// Neighbours may be one layer only if the kernels can treat them alike.
inline std::vector<SdprunTensor> sdprun_tensors(const SdprunArguments& a) {
  std::vector<SdprunTensor> tensors;
  tensors.reserve(a.weights.size());
  for (size_t i = 0; i < a.weights.size(); ++i) tensors.push_back(sdprun_tensor(a, i));
  for (const std::vector<size_t>& layer : sdprun_layers(tensors)) {
    const SdprunTensor& first = tensors[layer[0]];
    for (const size_t i : layer) {
      STD_TORCH_CHECK(tensors[i].layout.channels() == first.layout.channels() &&
                          tensors[i].dtype == first.dtype,
                      "weights[", i, "] must have as many channels as weights[", layer[0],
                      "], with which it is coupled, and an accumulator of the same type");
    }
  }
  return tensors;
}

// For layers that are whole here.
inline std::vector<SdprunWhole> own_wholes(const std::vector<SdprunTensor>& tensors) {
  std::vector<SdprunWhole> wholes;
  for (const SdprunTensor& t : tensors) wholes.push_back({t.first_group, t.layout.channels()});
  return wholes;
}

inline std::vector<SdprunWhole> sdprun_wholes(const std::vector<SdprunTensor>& tensors,
                                              const std::vector<int64_t>& layer_firsts,
                                              const std::vector<int64_t>& layer_sizes,
                                              int64_t num_norms) {
  STD_TORCH_CHECK(layer_firsts.size() == tensors.size() && layer_sizes.size() == tensors.size(),
                  "layer_firsts and layer_sizes must have one entry per weight");
  std::vector<SdprunWhole> wholes;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const SdprunWhole whole{layer_firsts[i], layer_sizes[i]};
    STD_TORCH_CHECK(tensors[i].first_group < 0 || (whole.first >= 0 && whole.size >= 0 &&
                                                   whole.first + whole.size <= num_norms),
                    "layer_firsts[", i, "] and layer_sizes[", i, "] must be a part of norms");
    wholes.push_back(whole);
  }
  return wholes;
}

}  // namespace fastprune
