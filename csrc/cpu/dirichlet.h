// Dirichlet distributions of many layers on the CPU.
#pragma once

#include "common/dirichlet.h"
#include "cpu/parallel.h"

namespace fastprune {

// kl has a number for each layer, the gradient one for each element.
void dirichlet_kl(Reals concentration, const DirichletLayers& layers, Reals prior, Reals kl,
                  Reals gradient, ParallelFor parallel_for);

// samples and slopes are [num_samples, elements].
void dirichlet_sample(Reals concentration, const DirichletLayers& layers, int64_t num_samples,
                      const DirichletKey& key, Reals samples, Reals slopes,
                      ParallelFor parallel_for);

void dirichlet_sample_backward(Reals grad, Reals samples, Reals slopes, int64_t num_samples,
                               const DirichletLayers& layers, Reals gradient,
                               ParallelFor parallel_for);

}  // namespace fastprune
