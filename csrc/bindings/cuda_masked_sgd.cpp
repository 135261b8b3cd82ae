// The masked step on the GPU: unpack tensors, launch.
#include "bindings/cuda_device.h"
#include "bindings/masked_sgd_arguments.h"
#include "cuda/masked_sgd.h"

namespace fastprune {
namespace {

void masked_sgd_cuda(Tensors weights, Tensors momenta, Tensors copies, Tensors gradients,
                     Tensors masks, Tensor settings, std::vector<int64_t> rows,
                     std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  for (const Tensors* list : {&weights, &momenta, &copies, &gradients, &masks}) {
    check_same_device(*list, settings, "every tensor");
  }
  const SgdArguments arguments{weights, momenta, copies, gradients, settings, rows};
  const std::vector<MaskedWeight> table = masked_weights(arguments, masks);
  if (table.empty()) return;
  const Device device(settings);
  const MaskedSgdNumbers numbers{static_cast<const SgdSettings*>(settings.const_data_ptr()),
                                 device_float(grad_scale, settings, "grad_scale"),
                                 device_float(found_inf, settings, "found_inf")};
  const Tensor scratch = empty_scratch(settings, masked_sgd_scratch(table));
  masked_sgd(table, numbers, scratch.data_ptr(), device.max_blocks, device.stream);
}

}  // namespace
}  // namespace fastprune

#if defined(FASTPRUNE_SIM)
STABLE_TORCH_LIBRARY_IMPL(fastprune_sim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, m) {
#endif
  m.impl("masked_sgd_", TORCH_BOX(&fastprune::masked_sgd_cuda));
}
