// The masked step in the simulator against a plain loop, for the sanitizers: 0 if every bit agrees.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "common/narrow.h"
#include "cuda/masked_sgd.h"

namespace fastprune {
namespace {

constexpr SgdSettings kSettings[2] = {{0.1, 0.9, 0, 5e-4, 0, 0}, {0.2, 0.5, 0.1, 0, 1, 1}};

// Each part is memory of its own that ends with its last element.
struct Weights {
  std::vector<float> weight, momentum, gradient;
  std::vector<BFloat16> narrow_gradient, copy;
  std::vector<uint8_t> mask;
  int32_t row;
  size_t first;  // elements before it belong to nobody: vectors begin elsewhere
};

Weights make(std::mt19937& random, size_t size, int32_t row, bool masked, bool buffer, bool narrow,
             size_t first) {
  std::normal_distribution<float> normal;
  Weights w;
  w.row = row;
  w.first = first;
  for (size_t i = 0; i < first + size; ++i) {
    w.weight.push_back(normal(random));
    if (buffer) w.momentum.push_back(normal(random));
    w.narrow_gradient.push_back(narrowed<BFloat16>(normal(random)));
    w.gradient.push_back(widen(w.narrow_gradient.back()));
  }
  if (narrow) w.copy.resize(first + size);
  if (!narrow) w.narrow_gradient.clear();
  for (size_t i = 0; masked && i < (size + 7) / 8; ++i) w.mask.push_back(random());
  return w;
}

bool is_kept(const Weights& w, size_t i) {
  return w.mask.empty() || (w.mask[i / 8] >> i % 8 & 1) != 0;
}

// What is pruned may have held anything.
void spoil(Weights& w) {
  for (size_t i = 0; i < w.weight.size() - w.first; i += 3) {
    if (!is_kept(w, i)) w.weight[w.first + i] = std::numeric_limits<float>::quiet_NaN();
  }
}

template <typename T>
T* begin_of(std::vector<T>& part, size_t first) {
  return part.empty() ? nullptr : part.data() + first;
}

MaskedWeight entry_of(Weights& w) {
  MaskedWeight entry{};
  entry.weight = begin_of(w.weight, w.first);
  entry.momentum = begin_of(w.momentum, w.first);
  entry.gradient = w.narrow_gradient.empty()
                       ? static_cast<const void*>(begin_of(w.gradient, w.first))
                       : static_cast<const void*>(begin_of(w.narrow_gradient, w.first));
  entry.copy = begin_of(w.copy, w.first);
  entry.numel = static_cast<int64_t>(w.weight.size() - w.first);
  entry.row = w.row;
  entry.dtype = DType::kFloat32;
  entry.gradient_dtype = w.narrow_gradient.empty() ? DType::kFloat32 : DType::kBFloat16;
  entry.copy_dtype = DType::kBFloat16;
  entry.mask = w.mask.empty() ? nullptr : w.mask.data();
  return entry;
}

void step(Weights& w, float scale) {
  SgdSettings s = kSettings[w.row];
  if (w.momentum.empty()) s.momentum = s.nesterov = 0;
  const float factor = static_cast<float>((s.maximize != 0 ? -1 : 1) / static_cast<double>(scale));
  const float beta = static_cast<float>(s.momentum);
  for (size_t i = w.first; i < w.weight.size(); ++i) {
    const bool kept = is_kept(w, i - w.first);
    float d = w.gradient[i] * factor, z = d;
    if (s.weight_decay != 0) z = d = std::fma(w.weight[i], static_cast<float>(s.weight_decay), d);
    if (!w.momentum.empty()) {
      z = std::fma(d, static_cast<float>(1 - s.dampening), beta * w.momentum[i]);
      w.momentum[i] = kept ? z : 0;
    }
    const float direction = s.nesterov != 0 ? std::fma(z, beta, d) : z;
    w.weight[i] = kept ? std::fma(direction, static_cast<float>(-s.lr), w.weight[i]) : 0;
    if (!w.copy.empty()) w.copy[i] = narrowed<BFloat16>(w.weight[i]);
  }
}

template <typename T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

bool run(unsigned seed, float found) {
  std::mt19937 random(seed);
  std::vector<Weights> ours;
  for (const size_t first : {0, 1, 2, 3}) {
    ours.push_back(make(random, 4101 - first, 0, true, true, false, first));
    ours.push_back(make(random, 8 * 9 - first, 1, true, true, true, first));
  }
  ours.push_back(make(random, 63, 1, true, false, false, 0));
  ours.push_back(make(random, 127, 0, false, true, true, 0));
  ours.push_back(make(random, 0, 0, false, true, false, 0));
  ours.push_back(make(random, 1, 0, true, true, false, 0));
  std::vector<MaskedWeight> entries;
  for (Weights& w : ours) {
    spoil(w);
    entries.push_back(entry_of(w));
  }
  std::vector<Weights> expected = ours;

  const float scale = 4;
  alignas(16) static char scratch[1 << 14];
  if (masked_sgd_scratch(entries) > sizeof(scratch)) return false;
  const MaskedSgdNumbers numbers{kSettings, seed % 2 == 0 ? &scale : nullptr, &found};
  masked_sgd(entries, numbers, scratch, 3, nullptr);

  bool right = true;
  for (size_t t = 0; t < ours.size(); ++t) {
    if (found == 0) step(expected[t], seed % 2 == 0 ? scale : 1);
    right = right && equal(ours[t].weight, expected[t].weight) &&
            equal(ours[t].momentum, expected[t].momentum) && equal(ours[t].copy, expected[t].copy);
  }
  if (!right) std::fprintf(stderr, "seed %u, found_inf %g: wrong\n", seed, found);
  return right;
}

}  // namespace
}  // namespace fastprune

int main() {
  bool right = true;
  for (unsigned seed = 0; seed < 4; ++seed) right = fastprune::run(seed, 0) && right;
  right = fastprune::run(4, 1) && right;
  return right ? 0 : 1;
}
