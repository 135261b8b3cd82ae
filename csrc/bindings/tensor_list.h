// Tensors of the stable ABI as the plain data that kernels take, with the checks that keep memory
// accesses safe. Everything a user can get wrong is said earlier, by the public functions.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "common/tensor_list.h"

namespace fastprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline ScoreKind score_kind(const std::string& score) {
  if (score == "value") return ScoreKind::kValue;
  if (score == "magnitude") return ScoreKind::kMagnitude;
  STD_TORCH_CHECK(score == "saliency", "score must be 'value', 'magnitude' or 'saliency', got '",
                  score, "'");
  return ScoreKind::kSaliency;
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "values must be float32, float64, bfloat16 or float16");
  }
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), other_sizes = b.sizes();  // one call each: they add up in lists
  if (sizes.size() != other_sizes.size()) return false;
  const auto strides = a.strides(), other_strides = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != other_sizes[d]) return false;
    if (sizes[d] != 1 && strides[d] != other_strides[d]) return false;
  }
  return true;
}

// Parameters of 16 bits have float32 masters, so that a pair may be of two types.
inline bool may_pair(DType value, DType gradient) {
  const bool narrow = gradient == DType::kBFloat16 || gradient == DType::kFloat16;
  return value == gradient || (value == DType::kFloat32 && narrow);
}

// `segmented`: each tensor is a selection of its own.
inline std::vector<TensorEntry> tensor_entries(const Tensors& values, const Tensors& gradients,
                                               ScoreKind kind, bool segmented) {
  const bool saliency = kind == ScoreKind::kSaliency;
  STD_TORCH_CHECK(gradients.size() == (saliency ? values.size() : 0),
                  "gradients must have one tensor per value for score='saliency', else none");
  std::vector<TensorEntry> entries(values.size());
  int64_t position = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const Tensor& value = values[i];
    TensorEntry& entry = entries[i];
    entry.value = value.data_ptr();
    entry.gradient = nullptr;
    entry.numel = value.numel();
    entry.first_position = segmented ? 0 : position;
    entry.segment = segmented ? static_cast<int32_t>(i) : 0;
    entry.dtype = dtype_of(value);
    entry.gradient_dtype = saliency ? dtype_of(gradients[i]) : entry.dtype;
    STD_TORCH_CHECK((entry.dtype == DType::kFloat64) == (dtype_of(values[0]) == DType::kFloat64),
                    "values must be all float64 or none");
    const auto sizes = value.sizes();
    const auto strides = value.strides();
    STD_TORCH_CHECK(
        make_layout(sizes.data(), strides.data(), static_cast<int>(sizes.size()), &entry.layout),
        "values[", i, "] must be dense in memory; call .contiguous() on it");
    if (saliency) {
      STD_TORCH_CHECK(
          same_layout(value, gradients[i]) && may_pair(entry.dtype, entry.gradient_dtype),
          "gradients[", i, "] must have the shape and strides of values[", i,
          "], and its dtype or 16 bits beside float32");
      entry.gradient = gradients[i].data_ptr();
    }
    position += entry.numel;
  }
  return entries;
}

}  // namespace fastprune
