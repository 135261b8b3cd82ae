// What GSM's update is given: the same plain data on the CPU and on the GPU.
#pragma once

#include <cstdint>

#include "common/sgd_tensors.h"

namespace fastprune {

struct GsmWeight : SgdTensor {
  int64_t position;  // in the pool; negative: outside it, never gated
};

// A choice of blocks made elsewhere: row-major [output blocks, input blocks, taps].
struct GsmGate {
  const bool* kept;
  int64_t inputs, taps;  // of the weight
};

struct GsmBlock {
  int64_t outputs, inputs;
};

}  // namespace fastprune
