// Logarithm, exponential and powers of doubles by fused multiply-adds, divisions and integer
// arithmetic alone: unlike a vendor's, they give the same bits on every device. Errors stay within
// a few units in the last place, those of a power grow with its exponent's size.
#pragma once

#include <cmath>

#include "common/score_key.h"

namespace fastprune {

FASTPRUNE_INLINE double fused(double a, double b, double c) { return fma(a, b, c); }

constexpr double kLn2High = 0x1.62e42fefa38p-1;  // the last bits are 0: times an exponent is exact
constexpr double kLn2Low = 0x1.ef35793c7673p-45;
constexpr double kLog2E = 0x1.71547652b82fep+0;

// 2 artanh(s) by its series, for |s| up to 1/3: the logarithm of (1 + s) / (1 - s).
FASTPRUNE_INLINE double log_of_ratio(double s) {
  const double square = s * s;
  double sum = 0;
  FASTPRUNE_ROLLED
  for (int k = 35; k >= 3; k -= 2) sum = fused(sum, square, 1.0 / k);
  return fused(sum * square, 2 * s, 2 * s);
}

// For x from -1/2 to 0.
FASTPRUNE_INLINE double log1p_of(double x) { return log_of_ratio(x / (2 + x)); }

// For normal positive x.
FASTPRUNE_INLINE double log_of(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x);
  // The mantissa lies within a factor of sqrt(2) of 1.
  const uint64_t offset = bits - 0x3fe6a09e667f3bcdu;
  const auto exponent = static_cast<double>(static_cast<int64_t>(offset) >> 52);
  const double mantissa = bit_cast<double>((offset & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu);
  const double log = log_of_ratio((mantissa - 1) / (mantissa + 1));
  return fused(exponent, kLn2High, fused(exponent, kLn2Low, log));
}

// exp(x) - 1 by its series, for |x| up to 0.7.
FASTPRUNE_INLINE double expm1_series(double x) {
  double sum = 0;
  FASTPRUNE_ROLLED
  for (int k = 20; k >= 2; --k) sum = fused(sum, x, 1) / k;
  return fused(sum, x * x, x);
}

// 0 below and infinite above the range of normal numbers.
FASTPRUNE_INLINE double exp_of(double x) {
  if (x != x) return x;
  if (x < -708) return 0;
  if (x > 709) return bit_cast<double>(uint64_t{0x7ff0000000000000u});
  const double exponent = floor(fused(x, kLog2E, 0.5));
  const double rest = fused(-exponent, kLn2Low, fused(-exponent, kLn2High, x));
  const auto scale = static_cast<uint64_t>(static_cast<int64_t>(exponent) + 1023) << 52;
  return fused(expm1_series(rest), bit_cast<double>(scale), bit_cast<double>(scale));
}

FASTPRUNE_INLINE double expm1_of(double x) {
  return x > -0.5 && x < 0.5 ? expm1_series(x) : exp_of(x) - 1;
}

// For x of at least 0; those below the normal numbers count as 0.
FASTPRUNE_INLINE double power_of(double x, double y) {
  return x < 0x1p-1022 ? 0 : exp_of(y * log_of(x));
}

}  // namespace fastprune
