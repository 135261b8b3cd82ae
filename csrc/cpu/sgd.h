// What every step of momentum SGD on the CPU is composed of.
#pragma once

#include <algorithm>
#include <vector>

#include "common/sgd_tensors.h"
#include "cpu/advanced.h"
#include "cpu/key_tiles.h"
#include "cpu/parallel.h"

namespace fastprune {

inline float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fused_multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

// Differences and signs are formed in double, then rounded, as torch does with its scalars.
template <typename Weight>
struct SgdNumbers {
  Weight gradient_factor, weight_decay, momentum, undamped, minus_lr;
  bool has_momentum;

  // `gradient_factor` is 1, or one over the loss scale.
  SgdNumbers(const SgdSettings& s, double gradient_factor)
      : gradient_factor(static_cast<Weight>(s.maximize != 0 ? -gradient_factor : gradient_factor)),
        weight_decay(static_cast<Weight>(s.weight_decay)),
        momentum(static_cast<Weight>(s.momentum)),
        undamped(static_cast<Weight>(1 - s.dampening)),
        minus_lr(static_cast<Weight>(-s.lr)),
        has_momentum(s.momentum != 0) {}
};

// The arithmetic of torch.optim.SGD(foreach=False, fused=False): one fused multiply-add where torch
// has one, one rounding elsewhere. `gradient` has its factor.
template <bool kDecays, bool kNesterov, typename Weight>
inline void sgd_step(const SgdNumbers<Weight>& n, Weight gradient, Weight& weight,
                     Weight& momentum) {
  Weight step = gradient;
  if constexpr (kDecays) step = fused_multiply_add(weight, n.weight_decay, step);
  momentum = n.has_momentum ? fused_multiply_add(step, n.undamped, n.momentum * momentum) : step;
  const Weight direction = kNesterov ? fused_multiply_add(momentum, n.momentum, step) : momentum;
  weight = fused_multiply_add(direction, n.minus_lr, weight);
}

struct SgdWork {
  size_t tensor;
  int64_t offset;
  int64_t size;  // at most kChunk
};

// Calls run(work) for all elements of all tensors, on the caller's threads.
template <typename Tensor, typename Run>
void for_work(const std::vector<Tensor>& tensors, ParallelFor parallel_for, const Run& run) {
  std::vector<SgdWork> work;
  int64_t elements = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t numel = tensors[i].numel;
    elements += numel;
    for (int64_t offset = 0; offset < numel; offset += kChunk) {
      work.push_back({i, offset, std::min(kChunk, numel - offset)});
    }
  }
  parallel_for(work.size(), grain_of(work.size(), elements), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) run(work[i]);
  });
}

}  // namespace fastprune
