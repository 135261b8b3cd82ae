// The Dirichlet operators on the CPU: unpack tensors, call the kernels.
#include "bindings/cpu_parallel.h"
#include "bindings/dirichlet_arguments.h"
#include "cpu/dirichlet.h"

namespace fastprune {
namespace {

using torch::stable::contiguous;

DirichletLayers checked_layers(const Tensor& offsets, int64_t elements) {
  const DirichletLayers layers = dirichlet_layers(offsets, elements);
  for (int64_t l = 0; l < layers.count; ++l) {
    STD_TORCH_CHECK(layers.offsets[l] <= layers.offsets[l + 1], "offsets must not fall, but ",
                    layers.offsets[l + 1], " follows ", layers.offsets[l]);
  }
  STD_TORCH_CHECK(layers.offsets[0] == 0 && layers.offsets[layers.count] == elements,
                  "offsets must go from 0 to the number of concentrations, ", elements, ", got ",
                  layers.offsets[0], " to ", layers.offsets[layers.count]);
  return layers;
}

std::tuple<Tensor, Tensor> dirichlet_kl_cpu(Tensor concentration, Tensor offsets, Tensor prior) {
  const Tensor phi = contiguous(concentration), priors = contiguous(prior);
  const Tensor firsts = contiguous(offsets);
  const DirichletLayers layers = checked_layers(firsts, phi.numel());
  auto results = empty_kl(phi, firsts, priors);
  const auto& [kl, gradient] = results;
  dirichlet_kl(reals(phi, "concentration"), layers, reals(priors, "prior"), reals(kl, "kl"),
               reals(gradient, "gradient"), kTorchThreads);
  return results;
}

std::tuple<Tensor, Tensor> dirichlet_sample_cpu(Tensor concentration, Tensor offsets,
                                                int64_t num_samples, int64_t seed, int64_t offset) {
  const Tensor phi = contiguous(concentration), firsts = contiguous(offsets);
  const DirichletLayers layers = checked_layers(firsts, phi.numel());
  const DirichletKey key = dirichlet_key(num_samples, seed, offset);
  auto results = empty_samples(phi, num_samples);
  const auto& [samples, slopes] = results;
  dirichlet_sample(reals(phi, "concentration"), layers, num_samples, key, reals(samples, "samples"),
                   reals(slopes, "log_derivatives"), kTorchThreads);
  return results;
}

Tensor dirichlet_sample_backward_cpu(Tensor grad, Tensor samples, Tensor log_derivatives,
                                     Tensor offsets) {
  check_backward(grad, samples, log_derivatives);
  const Tensor g = contiguous(grad), s = contiguous(samples), slopes = contiguous(log_derivatives);
  const Tensor firsts = contiguous(offsets);
  const DirichletLayers layers = checked_layers(firsts, s.size(1));
  Tensor gradient = torch::stable::new_empty(s, {s.size(1)});
  dirichlet_sample_backward(reals(g, "grad"), reals(s, "samples"), reals(slopes, "log_derivatives"),
                            s.size(0), layers, reals(gradient, "gradient"), kTorchThreads);
  return gradient;
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("dirichlet_kl", TORCH_BOX(&fastprune::dirichlet_kl_cpu));
  m.impl("dirichlet_sample", TORCH_BOX(&fastprune::dirichlet_sample_cpu));
  m.impl("dirichlet_sample_backward", TORCH_BOX(&fastprune::dirichlet_sample_backward_cpu));
}
