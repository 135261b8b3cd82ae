// The channel switch on the CPU: every channel of an activation times its own factor.
#pragma once

#include "common/score_key.h"
#include "cpu/parallel.h"

namespace fastprune {

// Where the channels of an activation lie in memory. No size is 0.
struct SwitchShape {
  int64_t examples, channels, positions;
  bool channels_last;  // [examples, positions, channels], else [examples, channels, positions]
  bool per_example;    // the scale is [examples, channels], else [channels]
  DType dtype;
};

// The scale and its gradient are double where the activation is, else float.
//
// output = input * scale
void channel_switch(const SwitchShape& shape, const void* input, const void* scale,
                    ParallelFor parallel_for, void* output);

// grad_input = grad * scale, and in the same pass grad_scale = sums of grad * input.
void channel_switch_backward(const SwitchShape& shape, const void* grad, const void* input,
                             const void* scale, ParallelFor parallel_for, void* grad_input,
                             void* grad_scale);

}  // namespace fastprune
