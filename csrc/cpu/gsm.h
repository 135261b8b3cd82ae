// GSM's update on the CPU: momentum SGD whose loss gradient is gated.
#pragma once

#include <vector>

#include "common/gsm_tensors.h"
#include "cpu/parallel.h"

namespace fastprune {

// One set of hyper-parameters, as the columns of the operator's `settings`.
struct GsmSettings {
  double lr, momentum, dampening, weight_decay, nesterov, maximize;
};
static_assert(sizeof(GsmSettings) == kGsmSettings * sizeof(double), "one row");

struct GsmNumbers {
  const GsmSettings* settings;  // rows
  double threshold;             // with tie_end: which of the pool are active, if there are no gates
  int64_t tie_end;
  double gradient_factor;  // 1, or one over the loss scale
};

// `gates` is empty or has one entry per weight, which replaces the threshold.
void gsm_update(const std::vector<GsmWeight>& weights, const std::vector<GsmGate>& gates,
                GsmBlock block, const GsmNumbers& numbers, ParallelFor parallel_for);

}  // namespace fastprune
