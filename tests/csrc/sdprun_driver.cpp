// SDprun's kernels in the simulator against plain loops, for the sanitizers: 0 if every bit agrees.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/narrow.h"
#include "cuda/sdprun.h"

namespace fastprune {
namespace {

// With thresholds about the root mean square of the accumulators, so that groups of each layer are
// pruned and others kept; by the second row nearly all, so that the least number is put back.
constexpr SdprunSettings kSettings[2] = {{0.1, 0.9, 0, 0.001, 0.6, 1, 1, 0, 0},
                                         {0.2, 0, 1, 0.2, 0.7, 1, 3, 100, 9}};
constexpr SdprunProgress kProgress[2] = {{30, 1.0043}, {30, 1.02}};

template <typename T>
struct Data {
  std::vector<T> accumulator, momentum, weight, gradient;
  std::vector<BFloat16> narrow_weight, narrow_gradient;
  ChannelLayout layout;
  int64_t first_group;
  int32_t row;

  bool narrow() const { return !narrow_weight.empty(); }
  int64_t at(int64_t channel, int64_t i) const {
    return layout.begin(channel) + i / layout.inner * layout.columns * layout.inner +
           i % layout.inner;
  }
};

template <typename T>
Data<T> make(std::mt19937& random, ChannelLayout layout, int64_t first_group, int32_t row,
             bool narrow) {
  std::normal_distribution<float> normal;
  Data<T> d{{}, {}, {}, {}, {}, {}, layout, first_group, row};
  for (int64_t i = 0; i < layout.numel(); ++i) {
    d.accumulator.push_back(normal(random));
    d.momentum.push_back(normal(random));
    d.narrow_gradient.push_back(narrowed<BFloat16>(normal(random)));
    d.gradient.push_back(widen(d.narrow_gradient.back()));
  }
  d.weight.resize(layout.numel());
  if (row != 0) d.momentum.clear();
  narrow ? d.narrow_weight.resize(layout.numel()) : d.narrow_gradient.clear();
  return d;
}

template <typename T>
SdprunTensor tensor_of(Data<T>& d) {
  SdprunTensor t{};
  t.dtype = sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;
  t.weight_dtype = t.gradient_dtype = d.narrow() ? DType::kBFloat16 : t.dtype;
  t.accumulator = d.accumulator.data();
  t.momentum = d.momentum.empty() ? nullptr : d.momentum.data();
  t.weight = d.narrow() ? static_cast<void*>(d.narrow_weight.data()) : d.weight.data();
  t.gradient = d.narrow() ? static_cast<void*>(d.narrow_gradient.data()) : d.gradient.data();
  t.first_group = d.first_group;
  t.layout = d.layout;
  t.row = d.row;
  return t;
}

template <typename T>
void step(Data<T>& d, double scale) {
  const SdprunSettings& s = kSettings[d.row];
  const auto factor = static_cast<T>((s.maximize != 0 ? -1 : 1) / scale);
  for (size_t i = 0; i < d.accumulator.size(); ++i) {
    T direction = d.gradient[i] * factor;
    if (!d.momentum.empty()) {
      const T kept = static_cast<T>(s.momentum) * d.momentum[i];
      direction = d.momentum[i] = kept + direction;
    }
    d.accumulator[i] = std::fma(direction, static_cast<T>(-s.lr), d.accumulator[i]);
  }
}

template <typename T>
void set_weight(Data<T>& d, int64_t at, T value) {
  if (d.narrow()) d.narrow_weight[at] = narrowed<BFloat16>(static_cast<float>(value));
  if (!d.narrow()) d.weight[at] = value;
}

template <typename T>
double squares(const Data<T>& d, int64_t channel) {
  double lanes[kSdprunLanes] = {};
  for (int64_t i = 0; i < d.layout.size(); ++i) {
    const double x = d.accumulator[d.at(channel, i)];
    lanes[i % kSdprunLanes] += x * x;
  }
  for (int half = kSdprunLanes / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

// The largest `min_groups` norms if too few are kept; lower channels first among equal ones.
std::vector<bool> guarded(const std::vector<double>& norms, double threshold, double min_groups) {
  double kept = 0;
  for (const double norm : norms) kept += is_pruned(norm, threshold) ? 0 : 1;
  std::vector<bool> found(norms.size(), false);
  for (double n = 0; kept < min_groups && n < min_groups && n < norms.size(); ++n) {
    size_t best = norms.size();
    for (size_t i = 0; i < norms.size(); ++i) {
      if (!found[i] && (best == norms.size() || norms[i] > norms[best])) best = i;
    }
    found[best] = true;
  }
  return found;
}

template <typename T>
void shrink(std::vector<Data<T>*> layer, const SdprunProgress* progress, double* norms) {
  const Data<T>& first = *layer[0];
  int64_t size = 0;
  for (const Data<T>* d : layer) size += d->layout.size();
  const double threshold = group_threshold(progress[first.row], kSettings[first.row], size);
  std::vector<double> own;
  for (int64_t c = 0; c < first.layout.channels(); ++c) {
    double total = 0;
    for (const Data<T>* d : layer) total += squares(*d, c);
    own.push_back(norms[first.first_group + c] = std::sqrt(total));
  }
  const std::vector<bool> restored = guarded(own, threshold, kSettings[first.row].min_groups);
  for (Data<T>* d : layer) {
    for (int64_t c = 0; c < d->layout.channels(); ++c) {
      const auto factor = static_cast<T>(group_factor(own[c], threshold));
      for (int64_t i = 0; i < d->layout.size(); ++i) {
        const T v = d->accumulator[d->at(c, i)];
        const T scaled = is_pruned(own[c], threshold) ? T{0} : v * factor;
        set_weight(*d, d->at(c, i), restored[c] ? v : scaled);
      }
    }
  }
}

template <typename T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <typename T>
bool run(unsigned seed, float found) {
  std::mt19937 random(seed);
  std::vector<Data<T>> ours;
  int64_t groups = 0;
  int64_t chunks = 0;
  const auto add = [&](std::vector<ChannelLayout> layer, bool narrow) {
    const auto row = static_cast<int32_t>(chunks++ % 2);
    for (const ChannelLayout& layout : layer) {
      ours.push_back(make<T>(random, layout, groups, row, narrow && sizeof(T) == sizeof(float)));
    }
    groups += layer[0].channels();
  };
  // Rows of a warp, of a block, on the chip of a multiprocessor and beyond it; coupled ones.
  add({{1, 1, 67, 131}}, seed % 2 != 0);
  add({{1, 1, 30, 20}, {1, 1, 30, 1}, {1, 1, 30, 0}}, false);
  add({{1, 1, 5, 1500}, {1, 1, 5, 3}}, true);
  add({{1, 1, 4, 6500}}, false);
  add({{1, 1, 3, 8000}, {1, 1, 3, 4500}}, true);
  // Strided channels in short and in long runs.
  add({{3, 40, 6, 2}, {1, 1, 18, 1}}, false);
  add({{2, 21, 5, 16}}, true);
  ours.push_back(make<T>(random, {1, 1, 1, 4500}, -1, 0, true && sizeof(T) == sizeof(float)));
  std::vector<Data<T>> expected = ours;

  std::vector<SdprunTensor> tensors;
  std::vector<SdprunWhole> wholes;
  for (Data<T>& d : ours) {
    tensors.push_back(tensor_of(d));
    wholes.push_back({d.first_group, d.layout.channels()});
  }
  SdprunProgress progress[2] = {kProgress[0], kProgress[1]}, expected_progress[2];
  for (int row = 0; row < 2; ++row) {
    expected_progress[row] = found == 0 ? advanced(progress[row], kSettings[row]) : progress[row];
  }
  const float scale = 4;
  std::vector<double> norms(groups), expected_norms(groups);
  std::vector<double> scratch(sdprun_update_scratch(tensors) / sizeof(double) + 1);
  std::vector<double> guard_scratch(sdprun_guard_scratch(tensors) / sizeof(double) + 1);
  const SdprunNumbers numbers{progress, kSettings, &scale, &found};
  sdprun_threshold(progress, kSettings, 2, &found, nullptr);
  sdprun_update(tensors, numbers, norms.data(), scratch.data(), 2, 40 << 10, nullptr);
  sdprun_guard(tensors, wholes, numbers, norms.data(), guard_scratch.data(), 3, nullptr);

  if (found == 0) {
    for (Data<T>& d : expected) step(d, scale);
    for (size_t i = 0; i < expected.size();) {
      std::vector<Data<T>*> layer{&expected[i]};
      while (++i < expected.size() && expected[i].first_group == layer[0]->first_group) {
        layer.push_back(&expected[i]);
      }
      if (layer[0]->first_group >= 0) {
        shrink(layer, expected_progress, expected_norms.data());
      } else {
        for (int64_t e = 0; e < layer[0]->layout.numel(); ++e) {
          set_weight(*layer[0], e, layer[0]->accumulator[e]);
        }
      }
    }
  }
  bool right = std::memcmp(progress, expected_progress, sizeof(progress)) == 0 &&
               equal(norms, expected_norms);
  for (size_t t = 0; t < ours.size(); ++t) {
    const bool same = equal(ours[t].accumulator, expected[t].accumulator) &&
                      equal(ours[t].momentum, expected[t].momentum) &&
                      equal(ours[t].weight, expected[t].weight) &&
                      equal(ours[t].narrow_weight, expected[t].narrow_weight);
    if (!same) std::fprintf(stderr, "tensor %zu is wrong\n", t);
    right = right && same;
  }
  if (!right) std::fprintf(stderr, "seed %u, found_inf %g: wrong\n", seed, found);
  return right;
}

}  // namespace
}  // namespace fastprune

int main() {
  bool right = fastprune::run<float>(0, 0);
  right = fastprune::run<float>(1, 0) && right;
  right = fastprune::run<double>(2, 0) && right;
  right = fastprune::run<float>(3, 1) && right;
  return right ? 0 : 1;
}
