// What the masked step is given: the same plain data on the CPU and on the GPU.
#pragma once

#include <cstdint>

#include "common/sgd_tensors.h"

namespace fastprune {

struct MaskedWeight : SgdTensor {
  // Bit i % 8 of byte i / 8: element i, in memory order, is kept. Null: all are.
  const uint8_t* mask;
};

constexpr int kMaskByte = 8;  // elements

}  // namespace fastprune
