// ASWL's step on the CPU: momentum SGD on dense weights, of which the parameters hold the largest
// of each layer, times the layer's attention.
#pragma once

#include <vector>

#include "common/aswl_tensors.h"
#include "cpu/parallel.h"

namespace fastprune {

// What the step changes beside the tensors: a row and a tie end for each layer.
struct AswlState {
  AswlAttention* attention;
  int64_t* tie_end;
  double* multiplier;
};

struct AswlNumbers {
  AswlSettings settings;
  double gradient_factor;  // 1, or one over the loss scale
  bool keep_ties;
};

// A layer's tensors are neighbours and layers ascend; each has one that is pruned.
void aswl_step(const std::vector<AswlTensor>& tensors, const AswlNumbers& numbers,
               const AswlState& state, ParallelFor parallel_for);

}  // namespace fastprune
