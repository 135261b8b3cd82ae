// Logarithm, exponential, cosine and powers of doubles by fused multiply-adds, divisions and
// integer arithmetic alone: unlike a vendor's, they give the same bits on every device. Errors stay
// within a few units in the last place, those of a power grow with its exponent's size.
#pragma once

#include <cmath>
#include <utility>

#include "common/score_key.h"

namespace fastprune {

FASTPRUNE_FORCED_INLINE double fused(double a, double b, double c) { return fma(a, b, c); }

constexpr double kLn2High = 0x1.62e42fefa38p-1;  // the last bits are 0: times an exponent is exact
constexpr double kLn2Low = 0x1.ef35793c7673p-45;
constexpr double kLog2E = 0x1.71547652b82fep+0;
constexpr double kTwoPi = 0x1.921fb54442d18p+2;

template <int k>
constexpr int64_t kFactorial = k * kFactorial<k - 1>;  // up to 20 a double holds it too
template <>
constexpr int64_t kFactorial<0> = 1;
template <int k>
constexpr double kInverseFactorial = 1 / static_cast<double>(kFactorial<k>);

// Polynomials are written out by the compiler: their coefficients are then constants of the code.
template <int... i>
FASTPRUNE_FORCED_INLINE double odd_inverses(double x, std::integer_sequence<int, i...>) {
  double sum = 0;
  ((sum = fused(sum, x, 1.0 / (2 * static_cast<int>(sizeof...(i) - i) + 1))), ...);
  return sum;  // x^(n - 1) / (2 n + 1) + ... + x / 5 + 1 / 3
}
template <int... i>
FASTPRUNE_FORCED_INLINE double inverse_factorials(double x, std::integer_sequence<int, i...>) {
  double sum = 0;
  ((sum = fused(sum, x, kInverseFactorial<static_cast<int>(sizeof...(i) - i) + 1>)), ...);
  return sum;  // x^(n - 1) / (n + 1)! + ... + x / 3! + 1 / 2!
}
template <int kFirst, int... i>
FASTPRUNE_FORCED_INLINE double every_other(double x, std::integer_sequence<int, i...>) {
  double sum = 0;
  ((sum = fused(sum, x, kInverseFactorial<kFirst + 2 * static_cast<int>(sizeof...(i) - 1 - i)>)),
   ...);
  return sum;  // x^(n - 1) / (first + 2 n - 2)! + ... + x / (first + 2)! + 1 / first!
}

// How many terms an argument needs: |s| up to 1/3, and up to that of a factor of sqrt(2).
constexpr int kThirdTerms = 17;
constexpr int kRootTerms = 10;

// What the logarithm of (1 + s) / (1 - s) is above 2 s, by its series, for |s| up to 1/3.
FASTPRUNE_FORCED_INLINE double log_beyond(double s) {
  const double square = s * s;
  return odd_inverses(square, std::make_integer_sequence<int, kThirdTerms>()) * square * (2 * s);
}

// 2 artanh(s): the logarithm of (1 + s) / (1 - s).
template <int kTerms>
FASTPRUNE_FORCED_INLINE double log_of_ratio(double s) {
  const double square = s * s;
  const double sum = odd_inverses(square, std::make_integer_sequence<int, kTerms>());
  return fused(sum * square, 2 * s, 2 * s);
}

// For x from -1/2 to 0.
FASTPRUNE_INLINE double log1p_of(double x) { return log_of_ratio<kThirdTerms>(x / (2 + x)); }

// For normal positive x.
FASTPRUNE_FORCED_INLINE double log_of(double x) {
  // The mantissa lies within a factor of sqrt(2) of 1. Its exponent, plus 1023, becomes a double by
  // bits alone, which every instruction set has a vector operation for.
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcdu;
  const uint64_t offset = bit_cast<uint64_t>(x) + (0x3ff0000000000000u - kRootHalf);
  const double exponent = bit_cast<double>((offset >> 52) + 0x4330000000000000u) - (0x1p52 + 1023);
  const double mantissa = bit_cast<double>((offset & 0x000fffffffffffffu) + kRootHalf);
  const double log = log_of_ratio<kRootTerms>((mantissa - 1) / (mantissa + 1));
  return fused(exponent, kLn2High, fused(exponent, kLn2Low, log));
}

// exp(x) - 1 by its series: 12 terms for |x| up to ln(2) / 2, 15 up to 1/2.
template <int kTerms>
FASTPRUNE_FORCED_INLINE double expm1_series(double x) {
  return fused(inverse_factorials(x, std::make_integer_sequence<int, kTerms>()), x * x, x);
}

// For x from -708 to 709.
FASTPRUNE_FORCED_INLINE double exp_within(double x) {
  const double shifted = fused(x, kLog2E, 0x1.8p52);  // its last bits are the exponent, rounded
  const double exponent = shifted - 0x1.8p52;
  const double rest = fused(-exponent, kLn2Low, fused(-exponent, kLn2High, x));
  const auto scale = bit_cast<double>((bit_cast<uint64_t>(shifted) + 1023) << 52);
  return fused(expm1_series<12>(rest), scale, scale);
}

// 0 below and infinite above the range of normal numbers.
FASTPRUNE_INLINE double exp_of(double x) {
  if (x != x) return x;
  if (x < -708) return 0;
  if (x > 709) return bit_cast<double>(uint64_t{0x7ff0000000000000u});
  return exp_within(x);
}

FASTPRUNE_INLINE double expm1_of(double x) {
  return x > -0.5 && x < 0.5 ? expm1_series<15>(x) : exp_of(x) - 1;
}

// For x of at least 0; those below the normal numbers count as 0.
FASTPRUNE_INLINE double power_of(double x, double y) {
  return x < 0x1p-1022 ? 0 : exp_of(y * log_of(x));
}

// cos(2 pi x) for x from 0 to 1.
FASTPRUNE_FORCED_INLINE double cos_of_turns(double x) {
  const double quarters = floor(fused(x, 4, 0.5));
  const double angle = (x - quarters / 4) * kTwoPi;  // within pi / 4; the difference is exact
  const double square = -(angle * angle);
  const auto quarter = static_cast<int>(quarters);
  const bool is_sine = (quarter & 1) != 0;
  const double value = is_sine
                           ? every_other<1>(square, std::make_integer_sequence<int, 9>()) * angle
                           : every_other<0>(square, std::make_integer_sequence<int, 10>());
  return quarter == 1 || quarter == 2 ? -value : value;
}

}  // namespace fastprune
