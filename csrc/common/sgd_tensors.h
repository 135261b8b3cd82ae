// What a step of momentum SGD is given: the same plain data on the CPU and on the GPU.
#pragma once

#include <cstdint>

#include "common/tensor_list.h"

namespace fastprune {

// A weight and what belongs to it, all in the weight's layout.
struct SgdTensor {
  void* weight;    // float or double
  void* momentum;  // as the weight, or null where the operator allows it
  const void* gradient;
  void* copy;  // the 16-bit parameter whose master the weight is, or null
  int64_t numel;
  int32_t row;  // of the settings
  DType dtype;
  DType gradient_dtype;  // as the weight, or 16 bits beside float
  DType copy_dtype;
  Layout layout;
};

// One set of hyper-parameters: a row of the operators' `settings`.
struct SgdSettings {
  double lr, momentum, dampening, weight_decay, nesterov, maximize;
};
constexpr int kSgdSettings = sizeof(SgdSettings) / sizeof(double);

}  // namespace fastprune
