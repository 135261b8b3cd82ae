// The CUDA operators on the LibTorch stable ABI: unpack tensors, launch, hand back the results.
// With FASTPRUNE_SIM the same code serves the simulator, as operators on CPU tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <tuple>

#include "bindings/cuda_device.h"
#include "bindings/gsm_arguments.h"
#include "bindings/tensor_list.h"
#include "cuda/gsm.h"
#include "cuda/select.h"

namespace fastprune {
namespace {

ScalarType score_dtype(const Tensors& values) {
  const bool is_double = !values.empty() && values[0].scalar_type() == ScalarType::Double;
  return is_double ? ScalarType::Double : ScalarType::Float;
}

struct Selected {
  Tensor threshold, num_ties, tie_end, non_finite;
};

// Each entry is a segment of its own if `counts` is a list.
Selected select(const std::vector<TensorEntry>& entries, ScoreKind kind, const Tensor& counts,
                const Device& device) {
  const bool segmented = counts.dim() > 0;
  const bool is_double = !entries.empty() && entries[0].dtype == DType::kFloat64;
  const auto one_per_count = [&](ScalarType dtype) {
    return torch::stable::new_empty(counts, counts.sizes(), dtype);
  };
  const Selected found{one_per_count(is_double ? ScalarType::Double : ScalarType::Float),
                       one_per_count(ScalarType::Long), one_per_count(ScalarType::Long),
                       torch::stable::new_empty(counts, {}, ScalarType::Int)};
  const Tensor scratch = empty_scratch(counts, select_threshold_scratch(entries, segmented));
  const SelectionResult result{
      found.threshold.data_ptr(), found.num_ties.mutable_data_ptr<int64_t>(),
      found.tie_end.mutable_data_ptr<int64_t>(), found.non_finite.mutable_data_ptr<int32_t>()};
  select_threshold(entries, segmented, kind, counts.const_data_ptr<int64_t>(), result,
                   scratch.data_ptr(), device.max_blocks, device.stream);
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_threshold_cuda(Tensors values, Tensors gradients,
                                                                 Tensor num_kept,
                                                                 std::string score) {
  const ScoreKind kind = score_kind(score);
  const bool segmented = num_kept.dim() > 0;
  STD_TORCH_CHECK(num_kept.scalar_type() == ScalarType::Long, "num_kept must be an int64 tensor");
  STD_TORCH_CHECK(!segmented || (num_kept.dim() == 1 &&
                                 num_kept.numel() == static_cast<int64_t>(values.size())),
                  "num_kept must be a scalar or hold one count per tensor");
  check_same_device(values, num_kept, "values");
  check_same_device(gradients, num_kept, "gradients");
  const Device device(num_kept);
  const Tensor counts = torch::stable::contiguous(num_kept);
  const std::vector<TensorEntry> entries = tensor_entries(values, gradients, kind, segmented);

  const Selected found = select(entries, kind, counts, device);
  return {found.threshold, found.num_ties, found.tie_end, found.non_finite};
}

Tensor empty_mask_like(const Tensor& value) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(value.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(value.dim(), value.sizes().data(),
                                                  value.strides().data(), aoti_torch_dtype_bool(),
                                                  device_type, value.get_device_index(), &handle));
  return Tensor(handle);
}

Tensors select_masks_cuda(Tensors values, Tensors gradients, Tensor threshold, Tensor tie_end,
                          std::string score) {
  const ScoreKind kind = score_kind(score);
  const bool segmented = threshold.dim() > 0;
  STD_TORCH_CHECK(
      threshold.scalar_type() == score_dtype(values) && tie_end.scalar_type() == ScalarType::Long,
      "threshold must have the dtype of the scores and tie_end int64");
  STD_TORCH_CHECK(threshold.numel() == (segmented ? static_cast<int64_t>(values.size()) : 1) &&
                      tie_end.numel() == threshold.numel(),
                  "threshold and tie_end must be scalars or hold one number per tensor");
  check_same_device(values, threshold, "values");
  check_same_device(gradients, threshold, "gradients");
  check_same_device(tie_end, threshold, "tie_end");
  const Device device(threshold);
  const Tensor limits = torch::stable::contiguous(threshold);
  const Tensor ends = torch::stable::contiguous(tie_end);
  const std::vector<TensorEntry> entries = tensor_entries(values, gradients, kind, segmented);

  Tensors masks;
  std::vector<bool*> bits;
  for (const Tensor& value : values) {
    masks.push_back(empty_mask_like(value));
    bits.push_back(static_cast<bool*>(masks.back().data_ptr()));
  }
  const Tensor scratch = empty_scratch(limits, select_masks_scratch(entries));
  select_masks(entries, kind, limits.data_ptr(), ends.const_data_ptr<int64_t>(), bits,
               scratch.data_ptr(), device.max_blocks, device.stream);
  return masks;
}

int64_t num_blocks(int64_t size, int64_t block) { return size / block + (size % block != 0); }

Tensors block_scores_cuda(Tensors values, Tensors gradients, std::string score,
                          std::vector<int64_t> block) {
  const ScoreKind kind = score_kind(score);
  STD_TORCH_CHECK(block.size() == 2 && block[0] > 0 && block[1] > 0,
                  "block must be two positive integers (outputs, inputs)");
  if (values.empty()) return {};
  check_same_device(values, values[0], "values");
  check_same_device(gradients, values[0], "gradients");
  const Device device(values[0]);
  const std::vector<TensorEntry> entries = tensor_entries(values, gradients, kind, false);

  Tensors all_sums;
  std::vector<BlockedWeight> weights;
  for (size_t i = 0; i < values.size(); ++i) {
    STD_TORCH_CHECK(values[i].dim() >= 2, "values[", i, "] must have at least 2 dimensions");
    std::vector<int64_t> shape(values[i].sizes().begin(), values[i].sizes().end());
    BlockedWeight weight{entries[i], shape[0], shape[1], 1, nullptr};
    for (size_t d = 2; d < shape.size(); ++d) weight.taps *= shape[d];
    shape[0] = num_blocks(shape[0], block[0]);
    shape[1] = num_blocks(shape[1], block[1]);
    all_sums.push_back(torch::stable::new_empty(values[i], shape, score_dtype(values)));
    weight.sums = all_sums.back().data_ptr();
    weights.push_back(weight);
  }
  const Tensor scratch = empty_scratch(values[0], block_scores_scratch(weights));
  block_scores(weights, kind, block[0], block[1], scratch.data_ptr(), device.max_blocks,
               device.stream);
  return all_sums;
}

void check_devices(const GsmArguments& a) {
  for (const Tensors* list : {&a.weights, &a.momenta, &a.copies, &a.gradients}) {
    check_same_device(*list, a.settings, "every tensor");
  }
}

void gsm_update_cuda(Tensors weights, Tensors momenta, Tensors copies, Tensors gradients,
                     Tensors gates, Tensor threshold, Tensor tie_end,
                     std::vector<int64_t> positions, Tensor settings, std::vector<int64_t> rows,
                     std::vector<int64_t> block, std::optional<Tensor> grad_scale,
                     std::optional<Tensor> found_inf) {
  const GsmArguments arguments{weights, momenta, copies, gradients, positions, settings, rows};
  check_lists(arguments);
  check_devices(arguments);
  check_same_device(gates, settings, "gates");
  check_same_device(threshold, settings, "threshold");
  check_same_device(tie_end, settings, "tie_end");
  STD_TORCH_CHECK(
      threshold.numel() == 1 && tie_end.numel() == 1 && tie_end.scalar_type() == ScalarType::Long,
      "threshold and tie_end must be one number, tie_end an int64");
  STD_TORCH_CHECK(block.size() == 2, "block must be two numbers");
  if (weights.empty()) return;
  const GsmBlock gsm_block{block[0], block[1]};
  const std::vector<GsmWeight> table = gsm_weights(arguments);
  const std::vector<GsmGate> gate_table = gsm_gates(arguments, gates, gsm_block);
  for (const GsmWeight& w : table) {
    STD_TORCH_CHECK(
        w.position < 0 || !gates.empty() ||
            (threshold.scalar_type() == ScalarType::Double) == (w.dtype == DType::kFloat64),
        "threshold must have the dtype of the pool's weights");
  }
  const Device device(settings);
  const GsmNumbers numbers{threshold.data_ptr(), tie_end.const_data_ptr<int64_t>(),
                           settings.const_data_ptr<double>(),
                           device_float(grad_scale, settings, "grad_scale"),
                           device_float(found_inf, settings, "found_inf")};
  const Tensor scratch = empty_scratch(settings, gsm_update_scratch(table, !gates.empty()));
  gsm_update(table, gate_table, gsm_block, numbers, scratch.data_ptr(), device.max_blocks,
             device.stream);
}

void gsm_step_cuda(Tensors weights, Tensors momenta, Tensors copies, Tensors gradients,
                   Tensor num_kept, std::vector<int64_t> positions, Tensor settings,
                   std::vector<int64_t> rows, std::optional<Tensor> grad_scale,
                   std::optional<Tensor> found_inf) {
  const GsmArguments arguments{weights, momenta, copies, gradients, positions, settings, rows};
  check_lists(arguments);
  check_devices(arguments);
  check_same_device(num_kept, settings, "num_kept");
  STD_TORCH_CHECK(num_kept.numel() == 1 && num_kept.scalar_type() == ScalarType::Long,
                  "num_kept must be one int64 number");
  if (weights.empty()) return;
  const std::vector<GsmWeight> table = gsm_weights(arguments);
  const std::vector<TensorEntry> pool = gsm_pool(table);
  const Device device(settings);
  const Selected found = select(pool, ScoreKind::kSaliency, num_kept, device);
  const GsmNumbers numbers{found.threshold.data_ptr(), found.tie_end.const_data_ptr<int64_t>(),
                           settings.const_data_ptr<double>(),
                           device_float(grad_scale, settings, "grad_scale"),
                           device_float(found_inf, settings, "found_inf")};
  const Tensor scratch = empty_scratch(settings, gsm_update_scratch(table, false));
  gsm_update(table, {}, {1, 1}, numbers, scratch.data_ptr(), device.max_blocks, device.stream);
}

}  // namespace
}  // namespace fastprune

#if defined(FASTPRUNE_SIM)
STABLE_TORCH_LIBRARY_IMPL(fastprune_sim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, m) {
#endif
  m.impl("select_threshold", TORCH_BOX(&fastprune::select_threshold_cuda));
  m.impl("select_masks", TORCH_BOX(&fastprune::select_masks_cuda));
  m.impl("block_scores", TORCH_BOX(&fastprune::block_scores_cuda));
  m.impl("gsm_update_", TORCH_BOX(&fastprune::gsm_update_cuda));
  m.impl("gsm_step_", TORCH_BOX(&fastprune::gsm_step_cuda));
}
