// SDprun's CPU operators: unpack tensors, call the kernels.
#include <optional>

#include "bindings/cpu_parallel.h"
#include "bindings/sdprun_arguments.h"
#include "cpu/sdprun.h"

namespace fastprune {
namespace {

using Integers = std::vector<int64_t>;

bool is_set(const std::optional<Tensor>& flag) {
  return flag && *static_cast<const float*>(flag->const_data_ptr()) != 0;
}

// The tensors that have a part, and their numbers in the operator's lists.
struct Listed {
  std::vector<SdprunTensor> tensors;
  std::vector<size_t> numbers;
};

Listed listed(const SdprunArguments& a) {
  Listed all;
  for (size_t i = 0; i < a.weights.size(); ++i) {
    if (a.first_groups[i] < 0 && a.weights[i].numel() == 0) continue;
    const SdprunTensor t = sdprun_tensor(a, i);
    const bool pruned = t.first_group >= 0;
    if (pruned && t.layout.channels() == 0) continue;
    if (pruned && !all.tensors.empty() && all.tensors.back().first_group == t.first_group) {
      const int64_t channels = all.tensors.back().layout.channels();
      STD_TORCH_CHECK(channels == t.layout.channels(), "weights[", i,
                      "] must have as many channels as what it is coupled with, ", channels,
                      ", got ", t.layout.channels());
    }
    all.tensors.push_back(t);
    all.numbers.push_back(i);
  }
  return all;
}

SdprunNumbers numbers_of(const SdprunArguments& a, const std::optional<Tensor>& grad_scale) {
  return {static_cast<const SdprunProgress*>(a.progress.const_data_ptr()),
          static_cast<const SdprunSettings*>(a.settings.const_data_ptr()),
          grad_scale ? 1.0 / *grad_scale->const_data_ptr<float>() : 1.0};
}

void sdprun_threshold_cpu(Tensor progress, Tensor settings, std::optional<Tensor> found_inf) {
  check_numbers(progress, settings);
  if (is_set(found_inf)) return;
  auto* const rows = static_cast<SdprunProgress*>(progress.data_ptr());
  const auto* const numbers = static_cast<const SdprunSettings*>(settings.const_data_ptr());
  for (int64_t i = 0; i < settings.size(0); ++i) rows[i] = advanced(rows[i], numbers[i]);
}

void sdprun_update_cpu(Tensors accumulators, Tensors momenta, Tensors weights, Tensor norms,
                       Tensors gradients, Tensor progress, Tensor settings, Integers rows,
                       Integers first_groups, Integers column_groups,
                       std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                       bool guard) {
  const SdprunArguments a{accumulators, momenta,  weights, gradients,    norms,
                          progress,     settings, rows,    first_groups, column_groups};
  check_lists(a);
  if (is_set(found_inf)) return;
  const std::vector<SdprunTensor> tensors = listed(a).tensors;
  const SdprunNumbers numbers = numbers_of(a, grad_scale);
  auto* const found = static_cast<double*>(norms.data_ptr());
  sdprun_update(tensors, numbers, found, kTorchThreads);
  if (guard) sdprun_guard(tensors, own_wholes(tensors), numbers, found);
}

void sdprun_guard_cpu(Tensors weights, Tensors accumulators, Tensor norms, Tensor progress,
                      Tensor settings, Integers rows, Integers first_groups, Integers column_groups,
                      Integers layer_firsts, Integers layer_sizes,
                      std::optional<Tensor> found_inf) {
  const Tensors none;
  const SdprunArguments a{accumulators, none,     weights, none,         norms,
                          progress,     settings, rows,    first_groups, column_groups};
  check_lists(a);
  if (is_set(found_inf)) return;
  STD_TORCH_CHECK(layer_firsts.size() == weights.size() && layer_sizes.size() == weights.size(),
                  "layer_firsts and layer_sizes must have one entry per weight");
  const Listed all = listed(a);
  std::vector<SdprunWhole> wholes;
  for (const size_t i : all.numbers) {
    const SdprunWhole whole{layer_firsts[i], layer_sizes[i]};
    STD_TORCH_CHECK(first_groups[i] < 0 || (whole.first >= 0 && whole.size >= 0 &&
                                            whole.first + whole.size <= norms.numel()),
                    "layer_firsts[", i, "] and layer_sizes[", i, "] must lie in norms");
    wholes.push_back(whole);
  }
  sdprun_guard(all.tensors, wholes, numbers_of(a, std::nullopt), norms.const_data_ptr<double>());
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("sdprun_threshold_", TORCH_BOX(&fastprune::sdprun_threshold_cpu));
  m.impl("sdprun_update_", TORCH_BOX(&fastprune::sdprun_update_cpu));
  m.impl("sdprun_guard_", TORCH_BOX(&fastprune::sdprun_guard_cpu));
}
