#pragma once
// ASWL's step on the GPU: momentum SGD on dense weights, of which the parameters hold the largest
// of each layer, times the layer's attention. All pointers but the vectors are to device memory;
// nothing is read back, every launch is asynchronous on `stream` and capturable. `max_blocks`
// bounds the grids: a small multiple of the number of multiprocessors.
#include <cstddef>
#include <vector>

#include "common/aswl_tensors.h"
#include "cuda/launch.h"

namespace fastprune {

// What the step changes beside the tensors: a row and a tie end for each layer.
struct AswlState {
  AswlAttention* attention;
  int64_t* tie_end;
  double* multiplier;
};

struct AswlNumbers {
  const AswlSettings* settings;
  const float* grad_scale;  // null: the gradients are not scaled
  const float* found_inf;   // null, or: if it is not 0, nothing changes
  bool keep_ties;
};

// A layer's tensors are neighbours and layers ascend; each has one that is pruned, with elements.
// `scratch` is aligned to 16 bytes. The number of launches depends on the types, and where the
// tables are more than one slice each (beyond some 180 tensors) on the number of tensors.
size_t aswl_step_scratch(const std::vector<AswlTensor>& tensors);
void aswl_step(const std::vector<AswlTensor>& tensors, const AswlNumbers& numbers,
               const AswlState& state, void* scratch, int max_blocks, Stream stream);

}  // namespace fastprune
