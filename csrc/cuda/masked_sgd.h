#pragma once
// Momentum SGD of a pruned network on the GPU: pruned weights are zero after every step. All
// pointers but the vector are to device memory; nothing is read back, every launch is asynchronous
// on `stream` and capturable. `max_blocks` bounds the grid: a small multiple of the number of
// multiprocessors.
#include <cstddef>
#include <vector>

#include "common/masked_sgd_tensors.h"
#include "cuda/launch.h"

namespace fastprune {

struct MaskedSgdNumbers {
  const SgdSettings* settings;  // rows
  const float* grad_scale;      // null: the gradients are not scaled
  const float* found_inf;       // null, or: if it is not 0, nothing changes
};

// `scratch` is aligned to 16 bytes. One launch for float and one for double weights, where there
// are any, after those that bring the table to the device.
size_t masked_sgd_scratch(const std::vector<MaskedWeight>& weights);
void masked_sgd(const std::vector<MaskedWeight>& weights, const MaskedSgdNumbers& numbers,
                void* scratch, int max_blocks, Stream stream);

}  // namespace fastprune
