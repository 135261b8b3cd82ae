// ASWL's step in the simulator against plain loops, for the sanitizers: 0 if every bit agrees.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "common/aswl.h"
#include "common/narrow.h"
#include "cuda/aswl.h"

namespace fastprune {
namespace {

// Each part is memory of its own that ends with its last element.
struct Weights {
  int32_t layer;  // negative: none
  bool is_pruned, is_scaled;
  std::vector<float> parameter, dense, momentum, gradient;
  std::vector<BFloat16> narrow_parameter, narrow_gradient;  // instead, where there are any
  size_t first;  // elements before it belong to nobody: vectors begin elsewhere
  int64_t position = -1;

  size_t size() const { return dense.size() - first; }
};

struct Model {
  AswlSettings settings{0.1, 0.9, 0.01, 1e-3, 1, 0.4, 1, 0.3};
  double multiplier = 0;
  bool keep_ties = false;
  std::vector<Weights> weights;
  std::vector<AswlAttention> attention;
  std::vector<int64_t> tie_end;

  int64_t pool_size(int32_t layer) const {
    int64_t size = 0;
    for (const Weights& w : weights) {
      if (w.layer == layer && w.is_pruned) size += static_cast<int64_t>(w.size());
    }
    return size;
  }
};

Weights make(std::mt19937& random, size_t size, int32_t layer, bool is_pruned, bool is_scaled,
             size_t first, bool narrow, float levels) {
  std::normal_distribution<float> normal;
  Weights w{layer, is_pruned, is_scaled, {}, {}, {}, {}, {}, {}, first};
  for (size_t i = 0; i < first + size; ++i) {
    const float x = normal(random);
    w.dense.push_back(levels == 0 ? x : std::round(x * levels) / levels);
    w.momentum.push_back(0.01f * normal(random));
    w.narrow_gradient.push_back(narrowed<BFloat16>(0.01f * normal(random)));
    w.gradient.push_back(widen(w.narrow_gradient.back()));
  }
  if (narrow) {
    w.narrow_parameter.resize(first + size);
  } else {
    w.parameter.resize(first + size);
    w.narrow_gradient.clear();
  }
  return w;
}

AswlTensor tensor_of(Weights& w) {
  AswlTensor t{};
  const bool narrow = !w.narrow_gradient.empty();
  t.parameter = narrow ? static_cast<void*>(w.narrow_parameter.data() + w.first)
                       : static_cast<void*>(w.parameter.data() + w.first);
  t.dense = w.dense.data() + w.first;
  t.momentum = w.momentum.data() + w.first;
  t.gradient = narrow ? static_cast<const void*>(w.narrow_gradient.data() + w.first)
                      : static_cast<const void*>(w.gradient.data() + w.first);
  t.numel = static_cast<int64_t>(w.size());
  t.position = w.position;
  t.layer = w.layer;
  t.is_scaled = w.is_scaled;
  t.dtype = DType::kFloat32;
  t.parameter_dtype = t.gradient_dtype = narrow ? DType::kBFloat16 : DType::kFloat32;
  return t;
}

double sum_of_lanes(const std::vector<double>& values, size_t run) {
  std::vector<double> sums;
  for (size_t begin = 0; begin < values.size(); begin += run) {
    double lanes[kAswlLanes] = {};
    for (size_t i = begin; i < std::min(begin + run, values.size()); ++i) {
      lanes[i % kAswlLanes] += values[i];
    }
    for (int half = kAswlLanes / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    }
    sums.push_back(lanes[0]);
  }
  return sums.size() > 1 ? sum_of_lanes(sums, SIZE_MAX / 2) : sums.empty() ? 0 : 0 + sums[0];
}

bool is_kept(const Model& m, const Weights& w, size_t i) {
  if (!w.is_pruned) return true;
  const auto threshold = static_cast<float>(m.attention[w.layer].threshold);
  const float magnitude = std::fabs(w.dense[w.first + i]);
  return magnitude > threshold ||
         (magnitude == threshold && w.position + static_cast<int64_t>(i) < m.tie_end[w.layer]);
}

// Returns <gradient, kept weights>.
double move(const Model& m, Weights& w, float factor) {
  const AswlSettings& s = m.settings;
  const auto attention = static_cast<float>(w.is_scaled ? m.attention[w.layer].value : 1);
  std::vector<double> products;
  for (size_t i = 0; i < w.size(); ++i) {
    float& x = w.dense[w.first + i];
    float& z = w.momentum[w.first + i];
    const float g = w.gradient[w.first + i] * factor;
    const float shown = is_kept(m, w, i) ? x : 0;
    products.push_back(is_kept(m, w, i) ? static_cast<double>(g) * shown : 0);
    float step = g * attention;
    if (w.is_pruned) step = std::fma(shown, static_cast<float>(2 * s.l2), step);
    z = std::fma(step, 1.0f, static_cast<float>(s.momentum) * z);
    x = std::fma(z, static_cast<float>(-s.lr), x);
  }
  return w.is_scaled ? sum_of_lanes(products, kAswlRun) : 0;
}

void select(Model& m, int32_t layer) {
  std::vector<float> pool;
  for (const Weights& w : m.weights) {
    if (w.layer != layer || !w.is_pruned) continue;
    for (size_t i = w.first; i < w.dense.size(); ++i) pool.push_back(std::fabs(w.dense[i]));
  }
  const auto size = static_cast<int64_t>(pool.size());
  std::vector<int64_t> order(pool.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return pool[a] > pool[b]; });
  const int64_t kept = num_kept(m.attention[layer].value, size, m.settings.alpha);
  const float threshold = pool[order[kept - 1]];
  const bool cuts = kept < size && pool[order[kept]] == threshold;
  m.attention[layer].threshold = threshold;
  m.tie_end[layer] = m.keep_ties ? INT64_MAX : cuts ? order[kept] : size;
}

void show(const Model& m, Weights& w) {
  const auto attention = static_cast<float>(w.is_scaled ? m.attention[w.layer].value : 1);
  for (size_t i = 0; i < w.size(); ++i) {
    const float shown = is_kept(m, w, i) ? w.dense[w.first + i] * attention : 0;
    if (!w.parameter.empty()) w.parameter[w.first + i] = shown;
    if (!w.narrow_parameter.empty()) w.narrow_parameter[w.first + i] = narrowed<BFloat16>(shown);
  }
}

void step(Model& m, float scale) {
  const AswlSettings& s = m.settings;
  const size_t count = m.attention.size();
  std::vector<double> sizes(count), slopes(count), inner(count);
  double total = 0, density = 0;
  for (const Weights& w : m.weights) {
    if (w.position == 0) total += sizes[w.layer] = static_cast<double>(w.size());
  }
  for (size_t l = 0; l < count; ++l) {
    density += density_term(m.attention[l].value, sizes[l] / total, s.alpha);
    slopes[l] = density_slope(m.attention[l].value, sizes[l] / total, s.alpha);
  }
  AswlGap gap{density - s.target};
  for (size_t l = 0; l < count; ++l) gap.add(m.attention[l], slopes[l]);
  const double push = advanced_push(m.multiplier, gap, s);
  for (Weights& w : m.weights) {
    const double sum = move(m, w, static_cast<float>(1 / static_cast<double>(scale)));
    if (w.layer >= 0) inner[w.layer] += sum;
  }
  for (size_t l = 0; l < count; ++l) {
    advance(m.attention[l], inner[l], push, slopes[l], s);
    select(m, static_cast<int32_t>(l));
  }
  for (Weights& w : m.weights) show(m, w);
}

template <typename T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

bool equal(const Model& a, const Model& b) {
  bool right = equal(a.attention, b.attention) && equal(a.tie_end, b.tie_end) &&
               a.multiplier == b.multiplier;
  for (size_t t = 0; t < a.weights.size(); ++t) {
    const Weights &x = a.weights[t], &y = b.weights[t];
    right = right && equal(x.parameter, y.parameter) && equal(x.dense, y.dense) &&
            equal(x.momentum, y.momentum) && equal(x.narrow_parameter, y.narrow_parameter);
  }
  return right;
}

void run_kernels(Model& m, const float* scale, const float* found) {
  std::vector<AswlTensor> tensors;
  for (Weights& w : m.weights) tensors.push_back(tensor_of(w));
  const std::unique_ptr<char[]> scratch(new char[aswl_step_scratch(tensors)]);
  const AswlNumbers numbers{&m.settings, scale, found, m.keep_ties};
  const AswlState state{m.attention.data(), m.tie_end.data(), &m.multiplier};
  aswl_step(tensors, numbers, state, scratch.get(), 3, nullptr);
}

bool run(unsigned seed, float levels, float found) {
  std::mt19937 random(seed);
  Model ours;
  ours.keep_ties = seed % 3 == 2;
  const bool narrow = seed % 2 == 1;
  // A pool of two tensors, one that carries the attention alone, none at all, one that is pruned
  // alone beside two that carry its attention, and a layer of one element.
  ours.weights.push_back(make(random, 24001, 0, true, true, 0, narrow, levels));
  ours.weights.push_back(make(random, 130, 0, true, true, 1, false, levels));
  ours.weights.push_back(make(random, 33, 0, false, true, 2, narrow, levels));
  ours.weights.push_back(make(random, 515, -1, false, false, 3, narrow, levels));
  ours.weights.push_back(make(random, 4099, 1, true, false, 3, false, levels));
  ours.weights.push_back(make(random, 63, 1, false, true, 0, false, levels));
  ours.weights.push_back(make(random, 64, 1, false, true, 0, narrow, levels));
  ours.weights.push_back(make(random, 1, 2, true, true, 0, false, levels));
  ours.attention.assign(3, {0.4, 0, 0});
  ours.attention[2].value = 1;
  ours.tie_end.assign(3, 0);
  for (int32_t l = 0; l < 3; ++l) {
    int64_t position = 0;
    for (Weights& w : ours.weights) {
      if (w.layer != l || !w.is_pruned) continue;
      w.position = position;
      position += static_cast<int64_t>(w.size());
    }
    select(ours, l);
  }
  Model expected = ours;
  const float scale = 4;
  const bool is_scaled = seed % 2 == 0;
  bool right = true;
  for (int n = 0; n < 3; ++n) {
    run_kernels(ours, is_scaled ? &scale : nullptr, &found);
    if (found == 0) step(expected, is_scaled ? scale : 1);
    right = right && equal(ours, expected);
    ours.settings.attention_lr = expected.settings.attention_lr *= 30;  // then it moves far
  }
  if (!right) std::fprintf(stderr, "seed %u, levels %g: wrong\n", seed, levels);
  return right;
}

}  // namespace
}  // namespace fastprune

int main() {
  bool right = true;
  for (unsigned seed = 0; seed < 3; ++seed) {
    right = fastprune::run(seed, 0, 0) && right;
    right = fastprune::run(seed, 2, 0) && right;
  }
  right = fastprune::run(3, 0, 1) && right;
  return right ? 0 : 1;
}
