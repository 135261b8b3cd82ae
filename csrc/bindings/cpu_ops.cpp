// The CPU operators on the LibTorch stable ABI: unpack tensors, call the kernel, pack the results.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cmath>
#include <tuple>

#include "bindings/cpu_parallel.h"
#include "bindings/gsm_arguments.h"
#include "bindings/tensor_list.h"
#include "cpu/gsm.h"
#include "cpu/select.h"

namespace fastprune {
namespace {

bool any_double(const Tensors& tensors) {
  return !tensors.empty() && tensors[0].scalar_type() == ScalarType::Double;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_threshold_cpu(Tensors values, Tensors gradients,
                                                                Tensor num_kept,
                                                                std::string score) {
  const ScoreKind kind = score_kind(score);
  const bool segmented = num_kept.dim() > 0;
  STD_TORCH_CHECK(num_kept.scalar_type() == ScalarType::Long && num_kept.is_contiguous(),
                  "num_kept must be a contiguous int64 tensor");
  STD_TORCH_CHECK(!segmented || (num_kept.dim() == 1 &&
                                 num_kept.numel() == static_cast<int64_t>(values.size())),
                  "num_kept must be a scalar or hold one count per tensor");
  const std::vector<TensorEntry> entries = tensor_entries(values, gradients, kind, segmented);
  const int64_t segments = num_kept.numel();
  std::vector<Threshold> found(segments);
  const int32_t flags =
      select_threshold(entries.data(), entries.size(), kind, num_kept.const_data_ptr<int64_t>(),
                       segments, kTorchThreads, found.data());

  const bool is_double = any_double(values);
  Tensor threshold = torch::stable::new_empty(num_kept, num_kept.sizes(),
                                              is_double ? ScalarType::Double : ScalarType::Float);
  Tensor num_ties = torch::stable::new_empty(num_kept, num_kept.sizes());
  Tensor tie_end = torch::stable::new_empty(num_kept, num_kept.sizes());
  Tensor non_finite = torch::stable::new_empty(num_kept, {}, ScalarType::Int);
  for (int64_t s = 0; s < segments; ++s) {
    if (is_double) {
      threshold.mutable_data_ptr<double>()[s] = found[s].score;
    } else {
      threshold.mutable_data_ptr<float>()[s] = static_cast<float>(found[s].score);
    }
    num_ties.mutable_data_ptr<int64_t>()[s] = found[s].num_ties;
    tie_end.mutable_data_ptr<int64_t>()[s] = found[s].tie_end;
  }
  *non_finite.mutable_data_ptr<int32_t>() = flags;
  return {threshold, num_ties, tie_end, non_finite};
}

Tensor empty_mask_like(const Tensor& value) {
  AtenTensorHandle handle;
  const auto strides = value.strides();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(value.dim(), value.sizes().data(), strides.data(),
                                                  aoti_torch_dtype_bool(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensors select_masks_cpu(Tensors values, Tensors gradients, Tensor threshold, Tensor tie_end,
                         std::string score) {
  const ScoreKind kind = score_kind(score);
  const bool segmented = threshold.dim() > 0;
  const bool is_double = any_double(values);
  STD_TORCH_CHECK(threshold.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float) &&
                      tie_end.scalar_type() == ScalarType::Long,
                  "threshold must have the dtype of the scores and tie_end int64");
  STD_TORCH_CHECK(threshold.numel() == (segmented ? static_cast<int64_t>(values.size()) : 1) &&
                      tie_end.numel() == threshold.numel() && threshold.is_contiguous() &&
                      tie_end.is_contiguous(),
                  "threshold and tie_end must be scalars or hold one number per tensor");
  std::vector<Threshold> limits(threshold.numel());
  for (size_t s = 0; s < limits.size(); ++s) {
    limits[s].score =
        is_double ? threshold.const_data_ptr<double>()[s] : threshold.const_data_ptr<float>()[s];
    limits[s].tie_end = tie_end.const_data_ptr<int64_t>()[s];
  }
  const std::vector<TensorEntry> entries = tensor_entries(values, gradients, kind, segmented);
  Tensors masks;
  std::vector<uint8_t*> bytes;
  for (const Tensor& value : values) {
    masks.push_back(empty_mask_like(value));
    bytes.push_back(static_cast<uint8_t*>(masks.back().data_ptr()));
  }
  select_masks(entries.data(), entries.size(), kind, limits.data(), kTorchThreads, bytes.data());
  return masks;
}

// Row-major, or channels-last, where the inputs come after the kernel positions.
bool describe_weight(const Tensor& value, BlockedWeight* weight) {
  weight->outputs = value.size(0);
  weight->inputs = value.size(1);
  weight->taps = 1;
  for (int64_t d = 2; d < value.dim(); ++d) weight->taps *= value.size(d);
  weight->input_stride = weight->taps;
  weight->tap_stride = 1;
  if (value.is_contiguous()) return true;
  weight->input_stride = 1;
  weight->tap_stride = weight->inputs;
  int64_t expected = weight->inputs;
  for (int64_t d = value.dim() - 1; d >= 2; expected *= value.size(d), --d) {
    if (value.size(d) != 1 && value.stride(d) != expected) return false;
  }
  return (weight->inputs == 1 || value.stride(1) == 1) &&
         (weight->outputs == 1 || value.stride(0) == expected);
}

Tensors block_scores_cpu(Tensors values, Tensors gradients, std::string score,
                         std::vector<int64_t> block) {
  const ScoreKind kind = score_kind(score);
  STD_TORCH_CHECK(block.size() == 2 && block[0] > 0 && block[1] > 0,
                  "block must be two positive integers (outputs, inputs)");
  tensor_entries(values, gradients, kind, false);  // for its checks
  Tensors all_sums;
  for (size_t i = 0; i < values.size(); ++i) {
    Tensor value = values[i];
    STD_TORCH_CHECK(value.dim() >= 2, "values[", i, "] must have at least 2 dimensions");
    BlockedWeight weight;
    const bool in_place = describe_weight(value, &weight);
    if (!in_place) {
      value = torch::stable::contiguous(value);
      describe_weight(value, &weight);
    }
    Tensor gradient;
    weight.dtype = dtype_of(value);
    weight.value = value.data_ptr();
    weight.gradient = nullptr;
    weight.gradient_dtype = weight.dtype;
    if (kind == ScoreKind::kSaliency) {
      gradient = in_place ? gradients[i] : torch::stable::contiguous(gradients[i]);
      weight.gradient = gradient.data_ptr();
      weight.gradient_dtype = dtype_of(gradient);
    }
    std::vector<int64_t> shape(value.sizes().begin(), value.sizes().end());
    shape[0] = (shape[0] + block[0] - 1) / block[0];
    shape[1] = (shape[1] + block[1] - 1) / block[1];
    const bool is_double = weight.dtype == DType::kFloat64;
    Tensor sums =
        torch::stable::new_empty(value, shape, is_double ? ScalarType::Double : ScalarType::Float);
    block_scores(weight, kind, block[0], block[1], kTorchThreads, sums.data_ptr());
    all_sums.push_back(sums);
  }
  return all_sums;
}

GsmNumbers gsm_numbers(const Tensor& settings, const std::optional<Tensor>& grad_scale) {
  GsmNumbers numbers{static_cast<const GsmSettings*>(settings.const_data_ptr()), 0, 0, 1};
  if (grad_scale) numbers.gradient_factor = 1.0 / *grad_scale->const_data_ptr<float>();
  return numbers;
}

bool is_skipped(const std::optional<Tensor>& found_inf) {
  return found_inf && *found_inf->const_data_ptr<float>() != 0;
}

void gsm_update_cpu(Tensors weights, Tensors momenta, Tensors copies, Tensors gradients,
                    Tensors gates, Tensor threshold, Tensor tie_end, std::vector<int64_t> positions,
                    Tensor settings, std::vector<int64_t> rows, std::vector<int64_t> block,
                    std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const GsmArguments arguments{weights, momenta, copies, gradients, positions, settings, rows};
  check_lists(arguments);
  STD_TORCH_CHECK(block.size() == 2, "block must be two numbers");
  const GsmBlock gsm_block{block[0], block[1]};
  const std::vector<GsmWeight> table = gsm_weights(arguments);
  const std::vector<GsmGate> gate_table = gsm_gates(arguments, gates, gsm_block);
  if (is_skipped(found_inf)) return;
  GsmNumbers numbers = gsm_numbers(settings, grad_scale);
  numbers.threshold = threshold.scalar_type() == ScalarType::Double
                          ? *threshold.const_data_ptr<double>()
                          : *threshold.const_data_ptr<float>();
  numbers.tie_end = *tie_end.const_data_ptr<int64_t>();
  gsm_update(table, gate_table, gsm_block, numbers, kTorchThreads);
}

void gsm_step_cpu(Tensors weights, Tensors momenta, Tensors copies, Tensors gradients,
                  Tensor num_kept, std::vector<int64_t> positions, Tensor settings,
                  std::vector<int64_t> rows, std::optional<Tensor> grad_scale,
                  std::optional<Tensor> found_inf) {
  const GsmArguments arguments{weights, momenta, copies, gradients, positions, settings, rows};
  check_lists(arguments);
  STD_TORCH_CHECK(num_kept.numel() == 1 && num_kept.scalar_type() == ScalarType::Long,
                  "num_kept must be one int64 number");
  const std::vector<GsmWeight> table = gsm_weights(arguments);
  const std::vector<TensorEntry> pool = gsm_pool(table);
  if (is_skipped(found_inf)) return;
  Threshold found{};
  select_threshold(pool.data(), pool.size(), ScoreKind::kSaliency,
                   num_kept.const_data_ptr<int64_t>(), 1, kTorchThreads, &found);
  GsmNumbers numbers = gsm_numbers(settings, grad_scale);
  numbers.threshold = found.score;
  numbers.tie_end = found.tie_end;
  gsm_update(table, {}, {1, 1}, numbers, kTorchThreads);
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("select_threshold", TORCH_BOX(&fastprune::select_threshold_cpu));
  m.impl("select_masks", TORCH_BOX(&fastprune::select_masks_cpu));
  m.impl("block_scores", TORCH_BOX(&fastprune::block_scores_cpu));
  m.impl("gsm_update_", TORCH_BOX(&fastprune::gsm_update_cpu));
  m.impl("gsm_step_", TORCH_BOX(&fastprune::gsm_step_cpu));
}
