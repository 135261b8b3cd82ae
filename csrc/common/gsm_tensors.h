// What GSM's update is given: the same plain data on the CPU and on the GPU.
#pragma once

#include <cstdint>

#include "common/tensor_list.h"

namespace fastprune {

// A weight and what belongs to it, all in the weight's layout.
struct GsmWeight {
  void* weight;    // float or double
  void* momentum;  // as the weight
  const void* gradient;
  void* copy;  // the 16-bit parameter whose master the weight is, or null
  int64_t numel;
  int64_t position;  // in the pool; negative: outside it, never gated
  int32_t row;       // of the settings
  DType dtype;
  DType gradient_dtype;  // as the weight, or 16 bits beside float
  DType copy_dtype;
  Layout layout;
};

// A choice of blocks made elsewhere: row-major [output blocks, input blocks, taps].
struct GsmGate {
  const bool* kept;
  int64_t inputs, taps;  // of the weight
};

struct GsmBlock {
  int64_t outputs, inputs;
};

// lr, momentum, dampening, weight_decay, nesterov, maximize
constexpr int kGsmSettings = 6;

}  // namespace fastprune
