#pragma once
// GSM's update on the GPU: momentum SGD whose loss gradient is gated. All pointers but the vectors
// are to device memory; nothing is read back, every launch is asynchronous on `stream` and
// capturable. `max_blocks` bounds the grid: a small multiple of the number of multiprocessors.
#include <cstddef>
#include <vector>

#include "common/gsm_tensors.h"
#include "cuda/launch.h"

namespace fastprune {

struct GsmNumbers {
  const void* threshold;    // of the weights' type; not read if no tensor is in the pool or gated
  const int64_t* tie_end;   // likewise
  const double* settings;   // rows of kGsmSettings
  const float* grad_scale;  // null: the gradients are not scaled
  const float* found_inf;   // null, or: if it is not 0, nothing changes
};

// `gates` is empty or has one entry per weight, which replaces the threshold. `scratch` is aligned
// to 16 bytes. One launch for float and one for double weights, where there are any, after those
// that bring the table to the device.
size_t gsm_update_scratch(const std::vector<GsmWeight>& weights, bool gated);
void gsm_update(const std::vector<GsmWeight>& weights, const std::vector<GsmGate>& gates,
                GsmBlock block, const GsmNumbers& numbers, void* scratch, int max_blocks,
                Stream stream);

}  // namespace fastprune
