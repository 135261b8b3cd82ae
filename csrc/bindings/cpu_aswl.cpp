// ASWL's step on the CPU: unpack tensors, call the kernel.
#include "bindings/aswl_arguments.h"
#include "bindings/cpu_parallel.h"
#include "bindings/cpu_scaling.h"
#include "cpu/aswl.h"

namespace fastprune {
namespace {

void aswl_step_cpu(Tensors parameters, Tensors dense, Tensors momenta, Tensor attention,
                   Tensor tie_end, Tensor multiplier, Tensors gradients, Tensor settings,
                   std::vector<int64_t> layers, std::vector<int64_t> roles, bool keep_ties,
                   std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const AswlArguments arguments{parameters, dense,     momenta,  attention, tie_end,
                                multiplier, gradients, settings, layers,    roles};
  const std::vector<AswlTensor> tensors = aswl_tensors(arguments);
  if (is_skipped(found_inf)) return;
  const AswlNumbers numbers{*static_cast<const AswlSettings*>(settings.const_data_ptr()),
                            gradient_factor(grad_scale), keep_ties};
  const AswlState state{static_cast<AswlAttention*>(attention.data_ptr()),
                        tie_end.mutable_data_ptr<int64_t>(), multiplier.mutable_data_ptr<double>()};
  aswl_step(tensors, numbers, state, kTorchThreads);
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("aswl_step_", TORCH_BOX(&fastprune::aswl_step_cpu));
}
