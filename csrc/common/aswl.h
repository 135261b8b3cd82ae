// ASWL's numbers: how attention moves and what it prunes. Shared by all kernels, so that every
// device decides alike.
#pragma once

#include <cmath>

#include "common/aswl_tensors.h"
#include "common/elementary.h"

namespace fastprune {

constexpr double kAswlFloor = 0.01;
constexpr double kAswlNear = 0.02;  // what the multiplier sees of a wider gap

// The exponents that common alphas lead to are exact, or rounded once.
FASTPRUNE_INLINE double aswl_power(double base, double exponent) {
  if (exponent == 0) return 1;
  if (exponent == 1 || base != base) return base;
  if (exponent == 2) return base * base;
  if (exponent == 0.5) return sqrt(base);
  if (exponent == -0.5) return 1 / sqrt(base);
  return power_of(base, exponent);
}

FASTPRUNE_INLINE double pruned_share(double attention, double alpha) {
  return aswl_power(1 - attention, alpha);
}

// What a layer adds to the density; `share` is that of its weight in all weights.
FASTPRUNE_INLINE double density_term(double attention, double share, double alpha) {
  return (1 - pruned_share(attention, alpha)) * share;
}

// How the density answers to a layer's attention. At an attention of 1 it would be infinite for an
// alpha below 1, and 0 for ever for one above.
FASTPRUNE_INLINE double density_slope(double attention, double share, double alpha) {
  const double rest = 1 - attention < kAswlFloor ? kAswlFloor : 1 - attention;
  return share * alpha * aswl_power(rest, alpha - 1);
}

// What the density and the target are to all layers: the gap between them, and sums over the layers
// that can follow it.
struct AswlGap {
  double gap;
  double reach = 0;  // of squared slopes
  double speed = 0;  // of slopes times velocities

  FASTPRUNE_INLINE void add(const AswlAttention& a, double slope) {
    const bool follows = gap > 0 ? a.value > kAswlFloor : a.value < 1;
    reach += follows ? slope * slope : 0;
    speed += follows ? slope * a.momentum : 0;
  }
};

// Advances the multiplier; returns what pushes each attention along its slope.
FASTPRUNE_INLINE double advanced_push(double& multiplier, const AswlGap& g, const AswlSettings& s) {
  const double weight = 2 * s.density_weight;
  const double stiffness = weight * s.attention_lr * g.reach;
  const double root = sqrt(stiffness);
  const double most = stiffness / (1 - s.momentum);
  const double least = root < most ? root : most;
  const double rate = least > 1 ? 1 : least;
  const double near = g.gap < -kAswlNear ? -kAswlNear : g.gap > kAswlNear ? kAswlNear : g.gap;
  multiplier += weight * near * (s.gain * rate);
  const double over = s.momentum - (1 - root) * (1 - root);
  const double excess = over < 0 ? 0 : over;
  const double damping = g.reach > 0 ? excess * g.speed / g.reach : 0;
  return weight * g.gap + multiplier - damping;
}

// `inner` is <G, w_hat> of the layer.
FASTPRUNE_INLINE void advance(AswlAttention& a, double inner, double push, double slope,
                              const AswlSettings& s) {
  a.momentum = a.momentum * s.momentum + (inner + push * slope);
  const double value = a.value - s.attention_lr * a.momentum;
  a.value = value < kAswlFloor ? kAswlFloor : value > 1 ? 1 : value;
}

// How many of a pool stay, one at least. A NaN of a training that diverged prunes nothing.
FASTPRUNE_INLINE int64_t num_kept(double attention, int64_t pool_size, double alpha) {
  const double count = floor(static_cast<double>(pool_size) * pruned_share(attention, alpha));
  if (!(count >= 1)) return pool_size;
  const auto pruned = static_cast<int64_t>(count);
  return pool_size - (pruned < pool_size - 1 ? pruned : pool_size - 1);
}

}  // namespace fastprune
