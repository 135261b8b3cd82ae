// Momentum SGD of a pruned network on the CPU: pruned weights are zero after every step.
#pragma once

#include <vector>

#include "common/masked_sgd_tensors.h"
#include "cpu/parallel.h"

namespace fastprune {

// `gradient_factor` is 1, or one over the loss scale.
void masked_sgd(const std::vector<MaskedWeight>& weights, const SgdSettings* settings,
                double gradient_factor, ParallelFor parallel_for);

}  // namespace fastprune
