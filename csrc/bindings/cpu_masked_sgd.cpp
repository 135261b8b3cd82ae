// The masked step on the CPU: unpack tensors, call the kernel.
#include "bindings/cpu_parallel.h"
#include "bindings/cpu_scaling.h"
#include "bindings/masked_sgd_arguments.h"
#include "cpu/masked_sgd.h"

namespace fastprune {
namespace {

void masked_sgd_cpu(Tensors weights, Tensors momenta, Tensors copies, Tensors gradients,
                    Tensors masks, Tensor settings, std::vector<int64_t> rows,
                    std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const SgdArguments arguments{weights, momenta, copies, gradients, settings, rows};
  const std::vector<MaskedWeight> table = masked_weights(arguments, masks);
  if (is_skipped(found_inf)) return;
  masked_sgd(table, static_cast<const SgdSettings*>(settings.const_data_ptr()),
             gradient_factor(grad_scale), kTorchThreads);
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("masked_sgd_", TORCH_BOX(&fastprune::masked_sgd_cpu));
}
