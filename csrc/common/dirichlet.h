// Draws of gamma distributions in logarithms with their pathwise derivatives, and the terms of the
// Kullback-Leibler divergence. Shared by all kernels, so that every device has the same bits.
#pragma once

#include "common/philox.h"
#include "common/special.h"

namespace fastprune {

// Numbers of a tensor of float or of double.
struct Reals {
  void* data;
  bool is_double;

  FASTPRUNE_INLINE double at(int64_t i) const {
    return is_double ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
  }
  FASTPRUNE_INLINE void set(int64_t i, double x) const {
    if (is_double) {
      static_cast<double*>(data)[i] = x;
    } else {
      static_cast<float*>(data)[i] = static_cast<float>(x);
    }
  }
};

// The elements of all layers one after the other; layer l begins at offsets[l].
struct DirichletLayers {
  const int64_t* offsets;
  int64_t count;
  int64_t elements;
};

struct DirichletKey {
  uint64_t seed;
  uint32_t offset;
};

// A layer's elements go to this many lanes, round and round; each lane adds its own in order. Then
// lanes j and j + 16 of each 32 are added, j and j + 8, down to one, and the four in their order.
constexpr int kDirichletLanes = 128;

constexpr double kLowestLog = -0x1p1023;  // below the logarithm of every draw

// A layer's sums, and with them its divergence and gradient.
struct DirichletTotal {
  int64_t size;
  double phi, prior, prior_sum, at_sum;

  FASTPRUNE_FORCED_INLINE DirichletTotal(double phi_sum, int64_t size, double prior)
      : size(size),
        phi(phi_sum),
        prior(prior),
        prior_sum(static_cast<double>(size) * prior),
        at_sum((phi_sum - prior_sum) * trigamma(phi_sum)) {}

  // From the sum of log_gamma_excess(prior, phi_j). Its formula regroups to this difference.
  FASTPRUNE_FORCED_INLINE double kl(double excess) const {
    return size == 0 ? 0 : excess - log_gamma_excess(prior_sum, phi);
  }
  FASTPRUNE_FORCED_INLINE double gradient(double own) const {
    return (own - prior) * trigamma(own) - at_sum;
  }
};

constexpr int kGammaRounds = 16;  // all are rejected once in 10^21 draws at most

// Of one gamma distribution, what every draw needs. Below 1 it is drawn from alpha + 1.
struct GammaShape {
  double alpha, shape, d, c, log_d, mean_log;
};

FASTPRUNE_FORCED_INLINE GammaShape gamma_shape(double alpha) {
  const double shape = alpha < 1 ? alpha + 1 : alpha;
  const double d = shape - 1.0 / 3;
  return {alpha, shape, d, 1 / sqrt(9 * d), log_of(d), digamma(shape)};
}

struct LogGamma {
  double value;  // ln z
  double slope;  // d ln z / d alpha
};

// The positive root of square x^2 + linear x = constant, without cancellation.
FASTPRUNE_FORCED_INLINE double positive_root(double square, double linear, double constant) {
  const double root = sqrt(fused(linear, linear, 4 * square * constant));
  return linear > 0 ? 2 * constant / (linear + root) : (root - linear) / (2 * square);
}

// Gauss-Legendre points of the integral over v from 0 to 1, as squares: {v, weight}.
constexpr int kGammaPoints = 16;
struct GammaPoint {
  double at, weight;
};

// -F_a(z) / (z f(z)) of Gamma(a): the derivative of ln z that keeps F, by the integral over one of
// the tails whose integrand is positive. Up to 1e-7 of it is exact for a from 1 to 1e5.
FASTPRUNE_FORCED_INLINE double implicit_slope(double log_z, double z, double a, double mean_log) {
  static constexpr GammaPoint kPoints[kGammaPoints] = {
      {2.8085044762807674e-05, 0.0001438953412208845},
      {0.0007679820168331747, 0.0017252000639547487},
      {0.0045137434429349576, 0.006393167398669998},
      {0.014956750863041532, 0.015241848480177341},
      {0.03650464114795701, 0.028582090534445197},
      {0.07343645332526383, 0.045839997730995626},
      {0.1290233645632422, 0.0655908224919272},
      {0.20475058933759308, 0.08572521623273001},
      {0.2997630991752306, 0.10372539422233865},
      {0.4106269153425011, 0.11701259255299644},
      {0.5314532309824911, 0.12331652166400701},
      {0.6543808855506008, 0.12101389828213151},
      {0.7703611592180446, 0.10938712277535674},
      {0.8701449458307668, 0.08876534428382261},
      {0.9453430050900657, 0.06052832387469271},
      {0.9894290200364128, 0.027008564070533293}};
  constexpr double kReach = 20;  // the exponent ends below its negative
  const double excess = log_z - mean_log;
  double terms[kGammaPoints];
  double end;
  if (excess > 0) {  // over r: exp((a - 1) ln(1 + r) - z r) (ln(1 + r) + excess)
    // ln(1 + r) <= r (6 + r) / (6 + 4 r)
    end = positive_root(4 * z - a + 1, 6 * (z - a + 1) - 4 * kReach, 6 * kReach);
    FASTPRUNE_UNROLLED
    for (int i = 0; i < kGammaPoints; ++i) {
      const double r = end * kPoints[i].at;
      const double log = log_of(1 + r);
      terms[i] = kPoints[i].weight * exp_within(fused(a - 1, log, -z * r)) * (log + excess);
    }
  } else {  // over u: exp(-a u + z (1 - exp(-u))) (u - excess)
    // 1 - exp(-u) <= u / (1 + u / 2)
    end = positive_root(a / 2, a - z - kReach / 2, kReach);
    FASTPRUNE_UNROLLED
    for (int i = 0; i < kGammaPoints; ++i) {
      const double u = end * kPoints[i].at;
      const double exponent = fused(z, 1 - exp_within(-u), -a * u);
      terms[i] = kPoints[i].weight * exp_within(exponent) * (u - excess);
    }
  }
  FASTPRUNE_UNROLLED
  for (int half = kGammaPoints / 2; half > 0; half /= 2) {
    FASTPRUNE_UNROLLED
    for (int i = 0; i < half; ++i) terms[i] += terms[i + half];
  }
  return terms[0] * end;
}

// Marsaglia and Tsang's draw of one element of one sample.
FASTPRUNE_FORCED_INLINE LogGamma draw_log_gamma(const GammaShape& gamma, int64_t element,
                                                int64_t sample, const DirichletKey& key) {
  double grown = 1, log_grown = 0;  // 1 + c x of the mode, if no round is accepted
  uint32_t boost = 0;
  FASTPRUNE_ROLLED
  for (uint32_t round = 0; round < kGammaRounds; ++round) {
    const PhiloxWords random =
        philox({{static_cast<uint32_t>(element), static_cast<uint32_t>(sample), round, key.offset}},
               key.seed);
    if (round == 0) boost = random.word[3];
    const double x = normal_of(random.word[0], random.word[1]);
    const double root = fused(gamma.c, x, 1);
    if (root <= 0) continue;
    const double log_root = log_of(root);
    const double v = root * root * root;
    const double limit = fused(gamma.d, 1 - v + 3 * log_root, 0.5 * x * x);
    if (log_of(uniform_of(random.word[2])) < limit) {
      grown = root;
      log_grown = log_root;
      break;
    }
  }
  const double log_z = fused(3, log_grown, gamma.log_d);
  const double z = gamma.d * (grown * grown * grown);
  const double slope = implicit_slope(log_z, z, gamma.shape, gamma.mean_log);
  if (gamma.alpha >= 1) return {log_z, slope};
  const double boosted = log_of(uniform_of(boost)) / gamma.alpha;
  return {log_z + boosted, slope - boosted / gamma.alpha};
}

}  // namespace fastprune
