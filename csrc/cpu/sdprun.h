// SDprun's update on the CPU: SGD on accumulators, whose groups the weights shrink towards zero.
#pragma once

#include <vector>

#include "common/sdprun.h"
#include "common/sdprun_tensors.h"
#include "cpu/parallel.h"

namespace fastprune {

struct SdprunNumbers {
  const SdprunProgress* progress;  // a row for each of the settings'
  const SdprunSettings* settings;
  double gradient_factor;  // 1, or one over the loss scale
};

// Neighbours of the same first group are one layer, of one number of channels; tensors without
// channels are left out before.
void sdprun_update(const std::vector<SdprunTensor>& tensors, const SdprunNumbers& numbers,
                   double* norms, ParallelFor parallel_for);

// Puts back the largest groups of layers that keep too few; `wholes` has an entry for each tensor.
void sdprun_guard(const std::vector<SdprunTensor>& tensors, const std::vector<SdprunWhole>& wholes,
                  const SdprunNumbers& numbers, const double* norms);

}  // namespace fastprune
