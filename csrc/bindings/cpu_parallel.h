// torch's thread pool, as the kernels take it.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include "cpu/parallel.h"

namespace fastprune {

inline void run_in_torch(int64_t begin, int64_t end, int64_t grain, ParallelFor::Body body,
                         void* context) {
  torch_parallel_for(begin, end, grain, body, context);
}
constexpr ParallelFor kTorchThreads{run_in_torch};

}  // namespace fastprune
