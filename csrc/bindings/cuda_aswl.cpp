// ASWL's step on the GPU: unpack tensors, launch.
#include "bindings/aswl_arguments.h"
#include "bindings/cuda_device.h"
#include "cuda/aswl.h"

namespace fastprune {
namespace {

void aswl_step_cuda(Tensors parameters, Tensors dense, Tensors momenta, Tensor attention,
                    Tensor tie_end, Tensor multiplier, Tensors gradients, Tensor settings,
                    std::vector<int64_t> layers, std::vector<int64_t> roles, bool keep_ties,
                    std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  for (const Tensors* list : {&parameters, &dense, &momenta, &gradients}) {
    check_same_device(*list, settings, "every tensor");
  }
  for (const Tensor* tensor : {&attention, &tie_end, &multiplier}) {
    check_same_device(*tensor, settings, "attention, tie_end and multiplier");
  }
  const AswlArguments arguments{parameters, dense,     momenta,  attention, tie_end,
                                multiplier, gradients, settings, layers,    roles};
  const std::vector<AswlTensor> tensors = aswl_tensors(arguments);
  if (tensors.empty()) return;
  const Device device(settings);
  const AswlNumbers numbers{static_cast<const AswlSettings*>(settings.const_data_ptr()),
                            device_float(grad_scale, settings, "grad_scale"),
                            device_float(found_inf, settings, "found_inf"), keep_ties};
  const AswlState state{static_cast<AswlAttention*>(attention.data_ptr()),
                        tie_end.mutable_data_ptr<int64_t>(), multiplier.mutable_data_ptr<double>()};
  const Tensor scratch = empty_scratch(settings, aswl_step_scratch(tensors));
  aswl_step(tensors, numbers, state, scratch.data_ptr(), device.max_blocks, device.stream);
}

}  // namespace
}  // namespace fastprune

#if defined(FASTPRUNE_SIM)
STABLE_TORCH_LIBRARY_IMPL(fastprune_sim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, m) {
#endif
  m.impl("aswl_step_", TORCH_BOX(&fastprune::aswl_step_cuda));
}
