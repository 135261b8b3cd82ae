// SDprun's CUDA operators on the LibTorch stable ABI.
// With FASTPRUNE_SIM the same code serves the simulator, as operators on CPU tensors.
#include <torch/csrc/stable/library.h>

#include "bindings/cuda_device.h"
#include "bindings/sdprun_arguments.h"
#include "cuda/sdprun.h"

namespace fastprune {
namespace {

SdprunNumbers numbers_of(const Tensor& progress, const Tensor& settings,
                         const std::optional<Tensor>& grad_scale,
                         const std::optional<Tensor>& found_inf) {
  check_same_device(settings, progress, "settings");
  return {static_cast<const SdprunProgress*>(progress.data_ptr()),
          static_cast<const SdprunSettings*>(settings.data_ptr()),
          device_float(grad_scale, progress, "grad_scale"),
          device_float(found_inf, progress, "found_inf")};
}

void check_devices(const SdprunArguments& a) {
  for (const Tensors* list : {&a.accumulators, &a.momenta, &a.weights, &a.gradients}) {
    check_same_device(*list, a.progress, "every tensor");
  }
  check_same_device(a.norms, a.progress, "norms");
}

void sdprun_threshold_cuda(Tensor progress, Tensor settings, std::optional<Tensor> found_inf) {
  check_numbers(progress, settings);
  const Device device(progress);
  const SdprunNumbers numbers = numbers_of(progress, settings, std::nullopt, found_inf);
  sdprun_threshold(static_cast<SdprunProgress*>(progress.data_ptr()), numbers.settings,
                   progress.size(0), numbers.found_inf, device.stream);
}

void sdprun_update_cuda(Tensors accumulators, Tensors momenta, Tensors weights, Tensor norms,
                        Tensors gradients, Tensor progress, Tensor settings,
                        std::vector<int64_t> rows, std::vector<int64_t> first_groups,
                        std::vector<int64_t> column_groups, std::optional<Tensor> grad_scale,
                        std::optional<Tensor> found_inf, bool guard) {
  const SdprunArguments arguments{accumulators, momenta,  weights, gradients,    norms,
                                  progress,     settings, rows,    first_groups, column_groups};
  check_lists(arguments);
  STD_TORCH_CHECK(gradients.size() == weights.size(), "gradients must have one entry per weight");
  check_devices(arguments);
  const std::vector<SdprunTensor> tensors = sdprun_tensors(arguments);
  if (tensors.empty()) return;
  const Device device(progress);
  const SdprunNumbers numbers = numbers_of(progress, settings, grad_scale, found_inf);
  const Tensor scratch = empty_scratch(progress, sdprun_update_scratch(tensors));
  sdprun_update(tensors, numbers, static_cast<double*>(norms.data_ptr()), scratch.data_ptr(),
                device.max_blocks, device.max_shared, device.stream);
  if (!guard) return;
  const Tensor guard_scratch = empty_scratch(progress, sdprun_guard_scratch(tensors));
  sdprun_guard(tensors, own_wholes(tensors), numbers, norms.const_data_ptr<double>(),
               guard_scratch.data_ptr(), device.max_blocks, device.stream);
}

void sdprun_guard_cuda(Tensors weights, Tensors accumulators, Tensor norms, Tensor progress,
                       Tensor settings, std::vector<int64_t> rows,
                       std::vector<int64_t> first_groups, std::vector<int64_t> column_groups,
                       std::vector<int64_t> layer_firsts, std::vector<int64_t> layer_sizes,
                       std::optional<Tensor> found_inf) {
  const Tensors none;
  const SdprunArguments arguments{accumulators, none,     weights, none,         norms,
                                  progress,     settings, rows,    first_groups, column_groups};
  check_lists(arguments);
  check_devices(arguments);
  const std::vector<SdprunTensor> tensors = sdprun_tensors(arguments);
  const std::vector<SdprunWhole> wholes =
      sdprun_wholes(tensors, layer_firsts, layer_sizes, norms.numel());
  if (tensors.empty()) return;
  const Device device(progress);
  const SdprunNumbers numbers = numbers_of(progress, settings, std::nullopt, found_inf);
  const Tensor scratch = empty_scratch(progress, sdprun_guard_scratch(tensors));
  sdprun_guard(tensors, wholes, numbers, norms.const_data_ptr<double>(), scratch.data_ptr(),
               device.max_blocks, device.stream);
}

}  // namespace
}  // namespace fastprune

#if defined(FASTPRUNE_SIM)
STABLE_TORCH_LIBRARY_IMPL(fastprune_sim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, m) {
#endif
  m.impl("sdprun_threshold_", TORCH_BOX(&fastprune::sdprun_threshold_cuda));
  m.impl("sdprun_update_", TORCH_BOX(&fastprune::sdprun_update_cuda));
  m.impl("sdprun_guard_", TORCH_BOX(&fastprune::sdprun_guard_cuda));
}
