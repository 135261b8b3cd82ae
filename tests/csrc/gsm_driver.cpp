// GSM's update in the simulator against a plain loop, for the sanitizers: 0 if every bit agrees.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/narrow.h"
#include "cuda/gsm.h"

namespace fastprune {
namespace {

constexpr SgdSettings kSettings[2] = {{0.1, 0.9, 0, 5e-4, 0, 0}, {0.2, 0.5, 0.1, 0, 1, 1}};
constexpr int64_t kOutputs = 5, kInputs = 7, kTaps = 9;

struct Weights {
  std::vector<float> weight, momentum, gradient;
  std::vector<BFloat16> narrow_gradient, copy;
  int64_t position;
  int32_t row;
  bool narrow;
  Layout layout;
};

Weights make(std::mt19937& random, int64_t size, int64_t position, int32_t row, bool narrow) {
  // Few values, so that many scores tie.
  std::uniform_int_distribution<int> few(-3, 3);
  Weights w{{}, {}, {}, {}, {}, position, row, narrow, {}};
  for (int64_t i = 0; i < size; ++i) {
    w.weight.push_back(few(random) * 0.25f);
    w.momentum.push_back(few(random) * 0.1f);
    w.gradient.push_back(few(random) * 0.5f);
    w.narrow_gradient.push_back(narrowed<BFloat16>(w.gradient.back()));
  }
  w.copy.resize(narrow ? size : 0);
  return w;
}

GsmWeight entry_of(Weights& w) {
  GsmWeight entry{};
  entry.weight = w.weight.data();
  entry.momentum = w.momentum.data();
  entry.gradient = w.narrow ? static_cast<const void*>(w.narrow_gradient.data())
                            : static_cast<const void*>(w.gradient.data());
  entry.copy = w.narrow ? w.copy.data() : nullptr;
  entry.numel = static_cast<int64_t>(w.weight.size());
  entry.position = w.position;
  entry.row = w.row;
  entry.dtype = DType::kFloat32;
  entry.gradient_dtype = w.narrow ? DType::kBFloat16 : DType::kFloat32;
  entry.copy_dtype = DType::kBFloat16;
  entry.layout = w.layout;
  return entry;
}

bool is_active(const Weights& w, int64_t i, const bool* gate, float threshold, int64_t tie_end) {
  if (w.position < 0) return true;
  const int64_t position = position_of(w.layout, i);
  if (gate != nullptr) {  // blocks of (2, 3)
    const int64_t output = position / (kInputs * kTaps), in_output = position % (kInputs * kTaps);
    const int64_t input = in_output / kTaps, tap = in_output % kTaps;
    return gate[(output / 2 * 3 + input / 3) * kTaps + tap];
  }
  const float score = std::fabs(w.weight[i] * w.gradient[i]);
  return score > threshold || (score == threshold && w.position + position < tie_end);
}

void step(Weights& w, const bool* gate, float threshold, int64_t tie_end, float scale) {
  const SgdSettings& s = kSettings[w.row];
  const float factor = static_cast<float>((s.maximize != 0 ? -1 : 1) / static_cast<double>(scale));
  const float beta = static_cast<float>(s.momentum);
  for (size_t i = 0; i < w.weight.size(); ++i) {
    float d = w.gradient[i] * factor;
    if (!is_active(w, static_cast<int64_t>(i), gate, threshold, tie_end)) d = 0;
    if (s.weight_decay != 0) d = std::fma(w.weight[i], static_cast<float>(s.weight_decay), d);
    const float z = std::fma(d, static_cast<float>(1 - s.dampening), beta * w.momentum[i]);
    const float direction = s.nesterov != 0 ? std::fma(z, beta, d) : z;
    w.momentum[i] = z;
    w.weight[i] = std::fma(direction, static_cast<float>(-s.lr), w.weight[i]);
    if (w.narrow) w.copy[i] = narrowed<BFloat16>(w.weight[i]);
  }
}

template <typename T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

bool run(unsigned seed, bool gated, float found) {
  std::mt19937 random(seed);
  const Layout channels_last{3, {kInputs * kTaps, kInputs, 1}, {kInputs * kTaps, 1, kTaps}};
  std::vector<Weights> ours;
  ours.push_back(make(random, kOutputs * kInputs * kTaps, 0, 0, false));
  ours.back().layout = channels_last;
  ours.push_back(make(random, 4099, gated ? -1 : 315, 1, true));
  ours.push_back(make(random, 0, gated ? -1 : 4414, 0, false));
  ours.push_back(make(random, 129, -1, 0, false));
  std::vector<Weights> expected = ours;

  const float threshold = 0.25f, scale = 4, *no_scale = gated ? nullptr : &scale;
  const int64_t tie_end = 2000;
  bool kept[3 * 3 * kTaps];
  for (bool& k : kept) k = random() % 2 == 0;
  std::vector<GsmWeight> entries;
  std::vector<GsmGate> gates;
  for (Weights& w : ours) {
    entries.push_back(entry_of(w));
    if (gated)
      gates.push_back(w.position < 0 ? GsmGate{nullptr, 1, 1} : GsmGate{kept, kInputs, kTaps});
  }
  alignas(16) static char scratch[1 << 14];
  if (gsm_update_scratch(entries, gated) > sizeof(scratch)) return false;
  const GsmNumbers numbers{&threshold, &tie_end, kSettings, no_scale, &found};
  gsm_update(entries, gates, {2, 3}, numbers, scratch, 3, nullptr);

  bool right = true;
  for (size_t t = 0; t < ours.size(); ++t) {
    if (found == 0) {
      const bool* gate = gated && expected[t].position >= 0 ? kept : nullptr;
      step(expected[t], gate, threshold, tie_end, gated ? 1 : scale);
    }
    right = right && equal(ours[t].weight, expected[t].weight) &&
            equal(ours[t].momentum, expected[t].momentum) && equal(ours[t].copy, expected[t].copy);
  }
  if (!right) std::fprintf(stderr, "seed %u, gated %d, found_inf %g: wrong\n", seed, gated, found);
  return right;
}

}  // namespace
}  // namespace fastprune

int main() {
  bool right = true;
  for (unsigned seed = 0; seed < 3; ++seed) {
    for (const bool gated : {false, true}) {
      right = fastprune::run(seed, gated, 0) && right;
    }
  }
  right = fastprune::run(3, false, 1) && right;
  return right ? 0 : 1;
}
