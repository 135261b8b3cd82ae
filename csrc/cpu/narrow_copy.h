// Floats as a 16-bit tensor.
#pragma once

#include <cstdint>

#include "common/score_key.h"

namespace fastprune {

// `dtype` is that of the copy: bfloat16 or float16.
void narrow_copy(const void* from, void* copy, DType dtype, int64_t size);

}  // namespace fastprune
