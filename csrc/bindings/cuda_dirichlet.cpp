// The Dirichlet operators on the GPU: unpack tensors, launch.
// With FASTPRUNE_SIM the same code serves the simulator, as operators on CPU tensors.
#include "bindings/cuda_device.h"
#include "bindings/dirichlet_arguments.h"
#include "cuda/dirichlet.h"

namespace fastprune {
namespace {

using torch::stable::contiguous;

std::tuple<Tensor, Tensor> dirichlet_kl_cuda(Tensor concentration, Tensor offsets, Tensor prior) {
  check_same_device(offsets, concentration, "offsets");
  check_same_device(prior, concentration, "prior");
  const Device device(concentration);
  const Tensor phi = contiguous(concentration), priors = contiguous(prior);
  const Tensor firsts = contiguous(offsets);
  const DirichletLayers layers = dirichlet_layers(firsts, phi.numel());
  auto results = empty_kl(phi, firsts, priors);
  const auto& [kl, gradient] = results;
  dirichlet_kl(reals(phi, "concentration"), layers, reals(priors, "prior"), reals(kl, "kl"),
               reals(gradient, "gradient"), device.max_blocks, device.stream);
  return results;
}

std::tuple<Tensor, Tensor> dirichlet_sample_cuda(Tensor concentration, Tensor offsets,
                                                 int64_t num_samples, int64_t seed,
                                                 int64_t offset) {
  check_same_device(offsets, concentration, "offsets");
  const Device device(concentration);
  const Tensor phi = contiguous(concentration), firsts = contiguous(offsets);
  const DirichletLayers layers = dirichlet_layers(firsts, phi.numel());
  const DirichletKey key = dirichlet_key(num_samples, seed, offset);
  auto results = empty_samples(phi, num_samples);
  const auto& [samples, slopes] = results;
  const Tensor scratch = empty_scratch(phi, dirichlet_sample_scratch(layers, num_samples));
  dirichlet_sample(reals(phi, "concentration"), layers, num_samples, key, reals(samples, "samples"),
                   reals(slopes, "log_derivatives"), scratch.data_ptr(), device.max_blocks,
                   device.stream);
  return results;
}

Tensor dirichlet_sample_backward_cuda(Tensor grad, Tensor samples, Tensor log_derivatives,
                                      Tensor offsets) {
  check_backward(grad, samples, log_derivatives);
  for (const Tensor* tensor : {&samples, &log_derivatives, &offsets}) {
    check_same_device(*tensor, grad, "every tensor");
  }
  const Device device(grad);
  const Tensor g = contiguous(grad), s = contiguous(samples), slopes = contiguous(log_derivatives);
  const Tensor firsts = contiguous(offsets);
  const DirichletLayers layers = dirichlet_layers(firsts, s.size(1));
  Tensor gradient = torch::stable::new_empty(s, {s.size(1)});
  const Tensor scratch = empty_scratch(s, dirichlet_backward_scratch(layers, s.size(0)));
  dirichlet_sample_backward(reals(g, "grad"), reals(s, "samples"), reals(slopes, "log_derivatives"),
                            s.size(0), layers, reals(gradient, "gradient"), scratch.data_ptr(),
                            device.max_blocks, device.stream);
  return gradient;
}

}  // namespace
}  // namespace fastprune

#if defined(FASTPRUNE_SIM)
STABLE_TORCH_LIBRARY_IMPL(fastprune_sim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, m) {
#endif
  m.impl("dirichlet_kl", TORCH_BOX(&fastprune::dirichlet_kl_cuda));
  m.impl("dirichlet_sample", TORCH_BOX(&fastprune::dirichlet_sample_cuda));
  m.impl("dirichlet_sample_backward", TORCH_BOX(&fastprune::dirichlet_sample_backward_cuda));
}
