// The shared header's functions over arrays, for test_special_functions.py.
#include "common/dirichlet.h"

namespace {

template <typename Function>
void each(const double* x, double* y, int64_t size, const Function& f) {
  for (int64_t i = 0; i < size; ++i) y[i] = f(x[i]);
}

}  // namespace

extern "C" {

void digamma(const double* x, double* y, int64_t size) { each(x, y, size, fastprune::digamma); }
void trigamma(const double* x, double* y, int64_t size) { each(x, y, size, fastprune::trigamma); }

// ln G as the divergence has it: what it is above its tangent at 1, whose slope is Euler's number.
void log_gamma(const double* x, double* y, int64_t size) {
  constexpr double kEuler = 0.57721566490153286061;
  each(x, y, size, [](double v) { return fastprune::log_gamma_excess(v, 1) - kEuler * (v - 1); });
}

void log_of(const double* x, double* y, int64_t size) { each(x, y, size, fastprune::log_of); }
void exp_of(const double* x, double* y, int64_t size) { each(x, y, size, fastprune::exp_of); }
void expm1_of(const double* x, double* y, int64_t size) { each(x, y, size, fastprune::expm1_of); }
void cos_of_turns(const double* x, double* y, int64_t size) {
  each(x, y, size, fastprune::cos_of_turns);
}

// ln G(y) - ln G(x) - (y - x) psi(x) for pairs of x and y.
void log_gamma_excess(const double* pairs, double* result, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    result[i] = fastprune::log_gamma_excess(pairs[2 * i + 1], pairs[2 * i]);
  }
}

// d ln z / d a of Gamma(a) for pairs of a and ln z.
void implicit_slope(const double* pairs, double* result, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const double a = pairs[2 * i], log_z = pairs[2 * i + 1];
    const double z = fastprune::exp_of(log_z);
    result[i] = fastprune::implicit_slope(log_z, z, a, fastprune::digamma(a));
  }
}

void philox(const uint32_t* counter, uint64_t key, uint32_t* words) {
  const auto found = fastprune::philox({{counter[0], counter[1], counter[2], counter[3]}}, key);
  for (int i = 0; i < 4; ++i) words[i] = found.word[i];
}
}
