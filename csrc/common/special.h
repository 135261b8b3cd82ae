// The gamma function's relatives on the positive numbers: digamma, trigamma, and its logarithm as
// the Kullback-Leibler divergence needs it. Arguments are raised by ten with the recurrence, then
// Stirling's series serves. Same bits on every device.
#pragma once

#include "common/elementary.h"

namespace fastprune {

constexpr int kRaised = 10;

// x (x + 1) ... (x + 9) and its first two derivatives.
struct Rising {
  double value, slope, curvature;
};

FASTPRUNE_FORCED_INLINE Rising rising(double x) {
  Rising r{x, 1, 0};
  FASTPRUNE_UNROLLED
  for (int k = 1; k < kRaised; ++k) {
    r.curvature = fused(r.curvature, x + k, 2 * r.slope);
    r.slope = fused(r.slope, x + k, r.value);
    r.value *= x + k;
  }
  return r;
}

// Sum of coefficients times powers of x, the constant last.
template <typename... Coefficients>
FASTPRUNE_FORCED_INLINE double polynomial(double x, Coefficients... coefficients) {
  double sum = 0;
  ((sum = fused(sum, x, coefficients)), ...);
  return sum;
}

// What remains of Stirling's logarithm, and of its derivatives, for x of at least 10.
FASTPRUNE_FORCED_INLINE double stirling_rest(double x) {
  const double w = 1 / (x * x);
  return polynomial(w, 1.0 / 156, -691.0 / 360360, 1.0 / 1188, -1.0 / 1680, 1.0 / 1260, -1.0 / 360,
                    1.0 / 12) /
         x;
}
FASTPRUNE_FORCED_INLINE double stirling_slope(double x) {
  const double w = 1 / (x * x);
  return -w * polynomial(w, 1.0 / 12, -691.0 / 32760, 1.0 / 132, -1.0 / 240, 1.0 / 252, -1.0 / 120,
                         1.0 / 12);
}
FASTPRUNE_FORCED_INLINE double stirling_curvature(double x) {
  const double w = 1 / (x * x);
  return w / x *
         polynomial(w, 7.0 / 6, -691.0 / 2730, 5.0 / 66, -1.0 / 30, 1.0 / 42, -1.0 / 30, 1.0 / 6);
}

FASTPRUNE_FORCED_INLINE double digamma(double x) {
  const Rising r = rising(x);
  const double y = x + kRaised;
  return log_of(y) - 0.5 / y + stirling_slope(y) - r.slope / r.value;
}

FASTPRUNE_FORCED_INLINE double trigamma(double x) {
  const Rising r = rising(x);
  const double y = x + kRaised;
  const double slope = r.slope / r.value;
  const double terms = fused(slope, slope, -r.curvature / r.value);  // sum of 1 / (x + k)^2
  return terms + (1 / y + 0.5 / (y * y) + stirling_curvature(y));
}

// ln(b / a) - 2 s, s = (b - a) / (b + a); exact to its last places however close they are.
FASTPRUNE_FORCED_INLINE double log_ratio_beyond(double a, double b, double s) {
  return s > -1.0 / 3 && s < 1.0 / 3 ? log_beyond(s) : log_of(b / a) - 2 * s;
}

// ln G(y) - ln G(x) - (y - x) digamma(x): how far the convex ln G is above its tangent at x.
// Differences are formed before any logarithm, so it stays exact where x and y are close or large.
FASTPRUNE_FORCED_INLINE double log_gamma_excess(double y, double x) {
  const double difference = y - x;
  // Both raised by ten. The products' difference is a sum of terms of one sign.
  double low = x, high = y, grown = difference;
  FASTPRUNE_UNROLLED
  for (int k = 1; k < kRaised; ++k) {
    grown = fused(grown, x + k, high * difference);
    low *= x + k;
    high *= y + k;
  }
  const double t = grown / (low + high);
  const Rising r = rising(x);
  const double from_products =
      fused(difference, r.slope / r.value, -fused(2, t, log_ratio_beyond(low, high, t)));
  // With a = x + 10, b = y + 10: b ln(b / a) - (b - a), and half of (b - a) / a - ln(b / a).
  const double a = x + kRaised, b = y + kRaised;
  const double s = difference / (a + b);
  const double beyond = log_ratio_beyond(a, b, s);
  const double main = fused(difference, s, b * beyond);
  const double half = 0.5 * fused(difference / a, s, -beyond);
  const double rest = stirling_rest(b) - stirling_rest(a) - difference * stirling_slope(a);
  return from_products + (main + half + rest);
}

}  // namespace fastprune
