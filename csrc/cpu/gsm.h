// GSM's update on the CPU: momentum SGD whose loss gradient is gated.
#pragma once

#include <cstdint>

#include "common/tensor_list.h"
#include "cpu/parallel.h"

namespace fastprune {

// One set of hyper-parameters, as the columns of the operator's `settings`.
struct GsmSettings {
  double lr, momentum, dampening, weight_decay, nesterov, maximize;
};

// A weight and what belongs to it; all have the weight's layout.
struct GsmTensor {
  void* weight;  // float or double
  void* momentum;
  const void* gradient;
  void* copy;  // the 16-bit parameter whose master the weight is, or null
  int64_t numel;
  int64_t position;  // in the pool; negative: outside it
  const GsmSettings* settings;
  DType dtype;
  DType gradient_dtype;
  DType copy_dtype;
  Layout layout;
  // A choice made elsewhere, one byte per block, in place of the threshold; null: none.
  const uint8_t* gate;
  int64_t block_outputs, block_inputs;
  int64_t outputs, inputs, taps;
};

struct GsmGate {
  double threshold;
  int64_t tie_end;
  double gradient_factor;  // 1, or one over the loss scale
};

void gsm_update(const GsmTensor* tensors, int64_t num_tensors, const GsmGate& gate,
                ParallelFor parallel_for);

}  // namespace fastprune
