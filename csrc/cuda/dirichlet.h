#pragma once
// Dirichlet distributions of many layers on the GPU. All pointers are to device memory; nothing is
// read back, every launch is asynchronous on `stream` and capturable. `max_blocks` bounds the grid.
// The offsets, which the host does not see, must go from 0 to the number of elements.
#include <cstddef>

#include "common/dirichlet.h"
#include "cuda/launch.h"

namespace fastprune {

// One launch for all layers. kl has a number for each layer, the gradient one for each element.
void dirichlet_kl(Reals concentration, const DirichletLayers& layers, Reals prior, Reals kl,
                  Reals gradient, int max_blocks, Stream stream);

// One launch. samples and slopes are [num_samples, elements]; `scratch` is aligned to 8 bytes.
size_t dirichlet_sample_scratch(const DirichletLayers& layers, int64_t num_samples);
void dirichlet_sample(Reals concentration, const DirichletLayers& layers, int64_t num_samples,
                      const DirichletKey& key, Reals samples, Reals slopes, void* scratch,
                      int max_blocks, Stream stream);

// Two launches: a mean for each sample of a layer, then the sum over the samples.
size_t dirichlet_backward_scratch(const DirichletLayers& layers, int64_t num_samples);
void dirichlet_sample_backward(Reals grad, Reals samples, Reals slopes, int64_t num_samples,
                               const DirichletLayers& layers, Reals gradient, void* scratch,
                               int max_blocks, Stream stream);

}  // namespace fastprune
