// What ASWL's step is given: the same plain data on the CPU and on the GPU.
#pragma once

#include <cstdint>

#include "common/tensor_list.h"

namespace fastprune {

// The operator's `settings`.
struct AswlSettings {
  double lr, momentum, l2, attention_lr, alpha, target, density_weight, gain;
};

// One row of its `attention`.
struct AswlAttention {
  double value, momentum, threshold;
};

// A parameter and what belongs to it, all in the parameter's layout.
struct AswlTensor {
  void* parameter;       // as the dense values, or 16 bits beside float
  void* dense;           // float or double; may be the parameter itself
  void* momentum;        // as the dense values; null: the gradient is the direction
  const void* gradient;  // likewise, or 16 bits beside float; null: the dense values stay
  int64_t numel;
  int64_t position;  // in the pool that its layer selects from; negative: nothing is pruned
  int32_t layer;     // negative: of none, plain SGD
  bool is_scaled;    // the parameter holds its values times the layer's attention
  DType dtype, parameter_dtype, gradient_dtype;
  Layout layout;
};

// A tensor's elements, in their order in memory, are cut into runs. A run's elements go to the
// lanes, round and round; each lane adds up its own, then halves of the lanes are added to each
// other until one is left. The sums of the runs are added likewise, all in one run.
constexpr int kAswlLanes = 128;
constexpr int kAswlRun = 4 * kAswlLanes;

}  // namespace fastprune
