// Dirichlet distributions of many layers: the divergence a layer at a time, draws a sample of a
// layer at a time. Sums go by lanes, as the CUDA kernels form them.
#include "cpu/dirichlet.h"

#include <algorithm>
#include <vector>

#include "cpu/isa.h"

namespace fastprune {
namespace {

// What is worth another thread, a third of a millisecond.
constexpr int64_t kElementGrain = 4096;
constexpr int64_t kDrawGrain = 2048;

// In layers, of which some may be empty.
int64_t grain_of(const DirichletLayers& layers, int64_t elements) {
  return std::max<int64_t>(1, elements * layers.count / std::max<int64_t>(1, layers.elements));
}

struct LayerRange {
  int64_t begin, end;
};

LayerRange layer_range(const DirichletLayers& layers, int64_t layer) {
  return {layers.offsets[layer], layers.offsets[layer + 1]};
}

// A sum of the values of a layer's elements, in the order of the lanes.
class LaneSum {
 public:
  void add(int64_t i, double x) { lanes_[i % kDirichletLanes] += x; }

  double total() {
    constexpr int kWarp = 32;
    for (int half = kWarp / 2; half > 0; half /= 2) {
      for (int first = 0; first < kDirichletLanes; first += kWarp) {
        for (int j = first; j < first + half; ++j) lanes_[j] += lanes_[j + half];
      }
    }
    double sum = lanes_[0];
    for (int first = kWarp; first < kDirichletLanes; first += kWarp) sum += lanes_[first];
    return sum;
  }

 private:
  double lanes_[kDirichletLanes] = {};
};

}  // namespace
}  // namespace fastprune

#define FASTPRUNE_ISA_BODY "cpu/dirichlet.inc"
#include "cpu/foreach_isa.h"

namespace fastprune {

void dirichlet_kl(Reals concentration, const DirichletLayers& layers, Reals prior, Reals kl,
                  Reals gradient, ParallelFor parallel_for) {
  const auto layer_kl = FASTPRUNE_FOR_ISA(best_isa(), layer_kl);
  parallel_for(layers.count, grain_of(layers, kElementGrain), [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l) {
      kl.set(l, layer_kl(concentration, layer_range(layers, l), prior.at(l), gradient));
    }
  });
}

void dirichlet_sample(Reals concentration, const DirichletLayers& layers, int64_t num_samples,
                      const DirichletKey& key, Reals samples, Reals slopes,
                      ParallelFor parallel_for) {
  if (layers.elements == 0) return;
  const Isa isa = best_isa();
  const auto draw_layer = FASTPRUNE_FOR_ISA(isa, draw_layer);
  std::vector<GammaShape> shapes(layers.elements);
  FASTPRUNE_FOR_ISA(isa, fill_shapes)(concentration, layers.elements, shapes.data());
  const int64_t grain = grain_of(layers, kDrawGrain);
  parallel_for(num_samples * layers.count, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> logs;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t sample = part / layers.count;
      const LayerRange range = layer_range(layers, part % layers.count);
      const int64_t first = sample * layers.elements;
      logs.resize(range.end - range.begin);
      draw_layer(shapes.data(), range, sample, key, logs.data(), first, samples, slopes);
    }
  });
}

void dirichlet_sample_backward(Reals grad, Reals samples, Reals slopes, int64_t num_samples,
                               const DirichletLayers& layers, Reals gradient,
                               ParallelFor parallel_for) {
  const auto layer_backward = FASTPRUNE_FOR_ISA(best_isa(), layer_backward);
  // A sum of products costs a hundredth of a draw.
  const int64_t grain = grain_of(layers, 100 * kDrawGrain / std::max<int64_t>(1, num_samples));
  parallel_for(layers.count, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> sums;
    for (int64_t l = begin; l < end; ++l) {
      const LayerRange range = layer_range(layers, l);
      sums.assign(range.end - range.begin, 0);
      for (int64_t sample = 0; sample < num_samples; ++sample) {
        layer_backward(grad, samples, slopes, range, sample * layers.elements, sums.data());
      }
      for (int64_t i = range.begin; i < range.end; ++i) gradient.set(i, sums[i - range.begin]);
    }
  });
}

}  // namespace fastprune
