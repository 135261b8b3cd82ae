// The Dirichlet kernels in the simulator against those of the CPU, for the sanitizers: 0 if every
// bit agrees.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/dirichlet.h"
#include "cuda/dirichlet.h"

namespace fastprune {
namespace {

constexpr ParallelFor kOneThread{[](int64_t begin, int64_t end, int64_t, ParallelFor::Body body,
                                    void* context) { body(begin, end, context); }};
constexpr int kMaxBlocks = 3;  // so that a block has several layers
constexpr int64_t kSamples = 3;

// Numbers of one type in memory that ends with the last of them.
struct Memory {
  std::vector<float> floats;
  std::vector<double> doubles;

  Memory(int64_t size, bool is_double) {
    if (is_double) {
      doubles.assign(size, NAN);
    } else {
      floats.assign(size, NAN);
    }
  }

  Reals reals() {
    return doubles.empty() ? Reals{floats.data(), false} : Reals{doubles.data(), true};
  }

  bool operator==(const Memory& other) const {
    return floats.size() == other.floats.size() && doubles.size() == other.doubles.size() &&
           (floats.empty() ||
            std::memcmp(floats.data(), other.floats.data(), floats.size() * sizeof(float)) == 0) &&
           (doubles.empty() || std::memcmp(doubles.data(), other.doubles.data(),
                                           doubles.size() * sizeof(double)) == 0);
  }
};

struct Results {
  Memory kl, gradient, samples, slopes, backward;

  Results(const DirichletLayers& layers, bool is_double)
      : kl(layers.count, is_double),
        gradient(layers.elements, is_double),
        samples(kSamples * layers.elements, is_double),
        slopes(kSamples * layers.elements, is_double),
        backward(layers.elements, is_double) {}

  bool operator==(const Results& other) const {
    return kl == other.kl && gradient == other.gradient && samples == other.samples &&
           slopes == other.slopes && backward == other.backward;
  }
};

void fill(Reals numbers, int64_t size, std::mt19937& random, double low, double high) {
  std::uniform_real_distribution<double> uniform(low, high);
  for (int64_t i = 0; i < size; ++i) numbers.set(i, std::exp(uniform(random)));
}

bool run(const std::vector<int64_t>& offsets, bool is_double, unsigned seed) {
  const auto count = static_cast<int64_t>(offsets.size()) - 1;
  const DirichletLayers layers{offsets.data(), count, offsets.back()};
  std::mt19937 random(seed);
  Memory concentration(layers.elements, is_double), prior(count, is_double);
  Memory grad(kSamples * layers.elements, is_double);
  fill(concentration.reals(), layers.elements, random, -7, 11);
  fill(prior.reals(), count, random, -7, 11);
  fill(grad.reals(), kSamples * layers.elements, random, -1, 1);
  const DirichletKey key{seed * 0x123456789abcdefu, seed};

  Results expected(layers, is_double), found(layers, is_double);
  const Reals phi = concentration.reals(), g = grad.reals();
  dirichlet_kl(phi, layers, prior.reals(), expected.kl.reals(), expected.gradient.reals(),
               kOneThread);
  dirichlet_sample(phi, layers, kSamples, key, expected.samples.reals(), expected.slopes.reals(),
                   kOneThread);
  dirichlet_sample_backward(g, expected.samples.reals(), expected.slopes.reals(), kSamples, layers,
                            expected.backward.reals(), kOneThread);

  std::vector<char> logs(dirichlet_sample_scratch(layers, kSamples));
  std::vector<char> means(dirichlet_backward_scratch(layers, kSamples));
  dirichlet_kl(phi, layers, prior.reals(), found.kl.reals(), found.gradient.reals(), kMaxBlocks,
               nullptr);
  dirichlet_sample(phi, layers, kSamples, key, found.samples.reals(), found.slopes.reals(),
                   logs.data(), kMaxBlocks, nullptr);
  dirichlet_sample_backward(g, found.samples.reals(), found.slopes.reals(), kSamples, layers,
                            found.backward.reals(), means.data(), kMaxBlocks, nullptr);
  if (found == expected) return true;
  std::fprintf(stderr, "%lld layers, %s, seed %u: bits differ\n", static_cast<long long>(count),
               is_double ? "double" : "float", seed);
  return false;
}

}  // namespace
}  // namespace fastprune

int main() {
  bool right = true;
  for (const bool is_double : {false, true}) {
    right = fastprune::run({0, 1, 4, 4, 131, 259, 388, 390, 690}, is_double, 1) && right;
    right = fastprune::run({0, 130}, is_double, 2) && right;
    right = fastprune::run({0}, is_double, 3) && right;
  }
  return right ? 0 : 1;
}
