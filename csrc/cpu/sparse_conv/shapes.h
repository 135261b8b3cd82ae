// The sizes of what each step writes.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/sparse_conv/program.h"

namespace fastprune {
namespace sparse {

struct Shape {
  int64_t images, channels, height, width;
};

// Of step number `index`; `second` is null where there is none. Throws std::invalid_argument,
// naming the step, if the step cannot be done with inputs of these sizes.
Shape output_shape(int64_t index, const Step& step, const std::vector<WeightArray>& weights,
                   const Shape& in, const Shape* second);

}  // namespace sparse
}  // namespace fastprune
