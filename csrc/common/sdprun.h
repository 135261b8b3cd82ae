// SDprun's numbers: how the threshold grows and what it does to a group. Shared by all kernels, so
// that every device decides alike.
#pragma once

#include "common/elementary.h"

namespace fastprune {

// One row of the operator's `settings`; zero and other numbers stand for false and true.
struct SdprunSettings {
  double lr, momentum, maximize, c, mu, scale, min_groups, total_steps, goal;
};

// One row of its `progress`.
struct SdprunProgress {
  double num_steps, threshold;
};

// A group's elements go to this many lanes, round and round; each lane sums its squares in order,
// then halves of the lanes are added to each other until one is left.
constexpr int kSdprunLanes = 128;

FASTPRUNE_INLINE SdprunProgress advanced(SdprunProgress progress, const SdprunSettings& s) {
  const double n = progress.num_steps + 1;
  const double power = power_of(n, s.mu);
  // n^mu - (n - 1)^mu without cancellation.
  const double growth = n == 1 ? 1 : -power * expm1_of(s.mu * log1p_of(-1 / n));
  double step;
  if (s.total_steps > 0) {  // towards the goal, by what is left of n^mu
    const double left = s.goal - progress.threshold;
    const double rest = power_of(s.total_steps, s.mu) - power + growth;
    step = left > 0 ? left * (n < s.total_steps ? growth / rest : 1) : 0;
  } else {
    const double rate = s.lr / (1 - s.momentum);
    step = s.c * power_of(rate, 0.5 + s.mu) * growth;
  }
  return {n, progress.threshold + step};
}

// The norm up to which a group of `size` elements is zero.
FASTPRUNE_INLINE double group_threshold(SdprunProgress progress, const SdprunSettings& settings,
                                        int64_t size) {
  const double eta = settings.scale != 0 ? sqrt(static_cast<double>(size)) : 1;
  return eta * progress.threshold;
}

// False for a norm of NaN, and as long as the threshold is 0.
FASTPRUNE_INLINE bool is_pruned(double norm, double threshold) {
  return threshold > 0 && norm <= threshold;
}

// What multiplies the accumulator of a group that is not pruned.
FASTPRUNE_INLINE double group_factor(double norm, double threshold) {
  return threshold == 0 ? 1 : 1 - threshold / norm;
}

}  // namespace fastprune
