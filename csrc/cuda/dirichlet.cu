// Dirichlet distributions of many layers: a block for each layer, or for each sample of a layer.
#include <algorithm>

#include "cuda/block.cuh"
#include "cuda/dirichlet.h"

namespace fastprune {
namespace {

constexpr int kThreads = kDirichletLanes;  // a thread is a lane of the sums
using Scratch = BlockScratch<double, kThreads>;

struct LayerRange {
  int64_t begin, end;
};

__device__ __forceinline__ LayerRange layer_range(const DirichletLayers& layers, int64_t layer) {
  return {layers.offsets[layer], layers.offsets[layer + 1]};
}

__global__ void __launch_bounds__(kThreads)
    layer_kl(Reals concentration, DirichletLayers layers, Reals prior, Reals kl, Reals gradient) {
  __shared__ Scratch scratch;
  for (int64_t l = blockIdx.x; l < layers.count; l += gridDim.x) {
    const LayerRange range = layer_range(layers, l);
    double own_sum = 0;
    for (int64_t i = range.begin + threadIdx.x; i < range.end; i += kThreads) {
      own_sum += concentration.at(i);
    }
    const double sum = block_sum<kThreads>(own_sum, scratch);
    const DirichletTotal total(sum, range.end - range.begin, prior.at(l));
    double own_excess = 0;
    for (int64_t i = range.begin + threadIdx.x; i < range.end; i += kThreads) {
      const double phi = concentration.at(i);
      own_excess += log_gamma_excess(total.prior, phi);
      gradient.set(i, total.gradient(phi));
    }
    const double excess = block_sum<kThreads>(own_excess, scratch);
    if (threadIdx.x == 0) kl.set(l, total.kl(excess));
  }
}

// `logs` has a number for each element of each sample, which only the thread that wrote it reads.
__global__ void __launch_bounds__(kThreads)
    draw_layers(Reals concentration, DirichletLayers layers, int64_t num_samples, DirichletKey key,
                Reals samples, Reals slopes, double* logs) {
  __shared__ Scratch scratch;
  for (int64_t part = blockIdx.x; part < num_samples * layers.count; part += gridDim.x) {
    const int64_t sample = part / layers.count;
    const LayerRange range = layer_range(layers, part % layers.count);
    const int64_t first = sample * layers.elements;
    double own_largest = kLowestLog;
    for (int64_t i = range.begin + threadIdx.x; i < range.end; i += kThreads) {
      const LogGamma drawn = draw_log_gamma(gamma_shape(concentration.at(i)), i, sample, key);
      slopes.set(first + i, drawn.slope);
      logs[first + i] = drawn.value;
      own_largest = Max::combine(own_largest, drawn.value);
    }
    const double largest = block_max<kThreads>(own_largest, scratch);
    double own_sum = 0;
    for (int64_t i = range.begin + threadIdx.x; i < range.end; i += kThreads) {
      const double weight = exp_of(logs[first + i] - largest);
      logs[first + i] = weight;
      own_sum += weight;
    }
    const double sum = block_sum<kThreads>(own_sum, scratch);
    for (int64_t i = range.begin + threadIdx.x; i < range.end; i += kThreads) {
      samples.set(first + i, logs[first + i] / sum);
    }
  }
}

// means[layer, sample]: sum of g s.
__global__ void __launch_bounds__(kThreads)
    layer_means(Reals grad, Reals samples, int64_t num_samples, DirichletLayers layers,
                double* means) {
  __shared__ Scratch scratch;
  for (int64_t part = blockIdx.x; part < num_samples * layers.count; part += gridDim.x) {
    const int64_t sample = part / layers.count, layer = part % layers.count;
    const LayerRange range = layer_range(layers, layer);
    const int64_t first = sample * layers.elements;
    double own = 0;
    for (int64_t i = range.begin + threadIdx.x; i < range.end; i += kThreads) {
      own += grad.at(first + i) * samples.at(first + i);
    }
    const double mean = block_sum<kThreads>(own, scratch);
    if (threadIdx.x == 0) means[layer * num_samples + sample] = mean;
  }
}

__global__ void __launch_bounds__(kThreads)
    layer_gradients(Reals grad, Reals samples, Reals slopes, int64_t num_samples,
                    DirichletLayers layers, const double* means, Reals gradient) {
  for (int64_t l = blockIdx.x; l < layers.count; l += gridDim.x) {
    const LayerRange range = layer_range(layers, l);
    for (int64_t i = range.begin + threadIdx.x; i < range.end; i += kThreads) {
      double sum = 0;
      for (int64_t sample = 0; sample < num_samples; ++sample) {
        const int64_t at = sample * layers.elements + i;
        const double along = slopes.at(at) * samples.at(at);
        sum += along * (grad.at(at) - means[l * num_samples + sample]);
      }
      gradient.set(i, sum);
    }
  }
}

unsigned blocks_for(int64_t parts, int max_blocks) {
  return static_cast<unsigned>(std::min<int64_t>(parts, max_blocks));
}

}  // namespace

void dirichlet_kl(Reals concentration, const DirichletLayers& layers, Reals prior, Reals kl,
                  Reals gradient, int max_blocks, Stream stream) {
  if (layers.count == 0) return;
  launch(layer_kl, blocks_for(layers.count, max_blocks), kThreads, 0, stream, concentration, layers,
         prior, kl, gradient);
}

size_t dirichlet_sample_scratch(const DirichletLayers& layers, int64_t num_samples) {
  return static_cast<size_t>(num_samples * layers.elements) * sizeof(double);
}

void dirichlet_sample(Reals concentration, const DirichletLayers& layers, int64_t num_samples,
                      const DirichletKey& key, Reals samples, Reals slopes, void* scratch,
                      int max_blocks, Stream stream) {
  const int64_t parts = num_samples * layers.count;
  if (parts == 0) return;
  launch(draw_layers, blocks_for(parts, max_blocks), kThreads, 0, stream, concentration, layers,
         num_samples, key, samples, slopes, static_cast<double*>(scratch));
}

size_t dirichlet_backward_scratch(const DirichletLayers& layers, int64_t num_samples) {
  return static_cast<size_t>(num_samples * layers.count) * sizeof(double);
}

void dirichlet_sample_backward(Reals grad, Reals samples, Reals slopes, int64_t num_samples,
                               const DirichletLayers& layers, Reals gradient, void* scratch,
                               int max_blocks, Stream stream) {
  if (layers.count == 0) return;
  auto* const means = static_cast<double*>(scratch);
  const int64_t parts = num_samples * layers.count;
  if (parts != 0) {
    launch(layer_means, blocks_for(parts, max_blocks), kThreads, 0, stream, grad, samples,
           num_samples, layers, means);
  }
  launch(layer_gradients, blocks_for(layers.count, max_blocks), kThreads, 0, stream, grad, samples,
         slopes, num_samples, layers, means, gradient);
}

}  // namespace fastprune
