#pragma once
// SDprun on the GPU: SGD on accumulators, whose groups the weights shrink towards zero. All
// pointers but the vectors are to device memory; nothing is read back, every launch is asynchronous
// on `stream` and capturable. Scratch is aligned to 16 bytes.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/sdprun.h"
#include "common/sdprun_tensors.h"
#include "cuda/launch.h"

namespace fastprune {

struct SdprunNumbers {
  const SdprunProgress* progress;  // a row for each of the settings'
  const SdprunSettings* settings;
  const float* grad_scale;  // null: the gradients are not scaled
  const float* found_inf;   // null, or: if it is not 0, nothing changes
};

// One thread for each row.
void sdprun_threshold(SdprunProgress* progress, const SdprunSettings* settings, int64_t rows,
                      const float* found_inf, Stream stream);

// The tensors of a layer (see sdprun_layers) have one type and number of channels. `max_blocks`
// bounds the grid: a small multiple of the number of multiprocessors. `max_shared` is the memory
// that a block may ask for, in bytes.
//
// At most six launches for float and as many for double accumulators, after those that bring the
// table to the device. Layers of rows take one pass: 16 bytes a float parameter, and 8 more with
// momentum. Others take two, of 12 (20) and 8 bytes.
size_t sdprun_update_scratch(const std::vector<SdprunTensor>& tensors);
void sdprun_update(const std::vector<SdprunTensor>& tensors, const SdprunNumbers& numbers,
                   double* norms, void* scratch, int max_blocks, size_t max_shared, Stream stream);

// Puts back the largest groups of layers that keep too few; `wholes` has an entry for each tensor.
// One launch of a block for each layer, after those that bring the table to the device.
size_t sdprun_guard_scratch(const std::vector<SdprunTensor>& tensors);
void sdprun_guard(const std::vector<SdprunTensor>& tensors, const std::vector<SdprunWhole>& wholes,
                  const SdprunNumbers& numbers, const double* norms, void* scratch, int max_blocks,
                  Stream stream);

}  // namespace fastprune
