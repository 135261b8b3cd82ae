// The CUDA operators on the LibTorch stable ABI: unpack tensors, launch, hand back the results.
// With FASTPRUNE_SIM the same code serves the simulator, as operators on CPU tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <tuple>

#include "bindings/cuda_device.h"
#include "bindings/tensor_list.h"
#include "cuda/gsm.h"
#include "cuda/select.h"

namespace fastprune {
namespace {

ScalarType score_dtype(const Tensors& values) {
  const bool is_double = !values.empty() && values[0].scalar_type() == ScalarType::Double;
  return is_double ? ScalarType::Double : ScalarType::Float;
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

  Tensor threshold = torch::stable::new_empty(counts, counts.sizes(), score_dtype(values));
  Tensor num_ties = torch::stable::new_empty(counts, counts.sizes());
  Tensor tie_end = torch::stable::new_empty(counts, counts.sizes());
  Tensor non_finite = torch::stable::new_empty(counts, {}, ScalarType::Int);
  const Tensor scratch = empty_scratch(counts, select_threshold_scratch(entries, segmented));
  const SelectionResult result{threshold.data_ptr(), num_ties.mutable_data_ptr<int64_t>(),
                               tie_end.mutable_data_ptr<int64_t>(),
                               non_finite.mutable_data_ptr<int32_t>()};
  select_threshold(entries, segmented, kind, counts.const_data_ptr<int64_t>(), result,
                   scratch.data_ptr(), device.max_blocks, device.stream);
  return {threshold, num_ties, tie_end, non_finite};
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

GsmWeight gsm_weight(const Tensor& weight, const Tensor& momentum, const Tensor& gradient,
                     size_t i) {
  GsmWeight w{};
  w.dtype = dtype_of(weight);
  w.gradient_dtype = dtype_of(gradient);
  STD_TORCH_CHECK(
      (w.dtype == DType::kFloat32 || w.dtype == DType::kFloat64) &&
          momentum.scalar_type() == weight.scalar_type() && may_pair(w.dtype, w.gradient_dtype),
      "weights[", i, "] and momenta[", i, "] must both be float32 or float64, and gradients[", i,
      "] of the same type, or of 16 bits beside float32");
  const auto sizes = weight.sizes();
  STD_TORCH_CHECK(make_layout(sizes.data(), weight.strides().data(), static_cast<int>(sizes.size()),
                              &w.layout) &&
                      same_layout(weight, momentum) && same_layout(weight, gradient),
                  "weights[", i, "], momenta[", i, "] and gradients[", i,
                  "] must be dense, of one shape and one layout");
  w.weight = weight.data_ptr();
  w.momentum = momentum.data_ptr();
  w.gradient = gradient.data_ptr();
  w.numel = weight.numel();
  return w;
}

GsmGate gsm_gate(const Tensor& weight, const Tensor& gate, GsmBlock block, size_t i) {
  STD_TORCH_CHECK(
      weight.dim() >= 2 && gate.scalar_type() == ScalarType::Bool && gate.is_contiguous(), "gates[",
      i, "] must be a contiguous bool tensor, weights[", i, "] a matrix");
  const int64_t matrix = weight.size(0) * weight.size(1);
  const GsmGate g{static_cast<const bool*>(gate.data_ptr()), weight.size(1),
                  matrix == 0 ? 0 : weight.numel() / matrix};
  STD_TORCH_CHECK(gate.numel() == num_blocks(weight.size(0), block.outputs) *
                                      num_blocks(weight.size(1), block.inputs) * g.taps ||
                      weight.numel() == 0,
                  "gates[", i, "] must hold one bool per block");
  return g;
}

void gsm_update_cuda(Tensors weights, Tensors momenta, Tensors copies, Tensors gradients,
                     Tensors gates, Tensor threshold, Tensor tie_end,
                     std::vector<int64_t> positions, Tensor settings, std::vector<int64_t> rows,
                     std::vector<int64_t> block, std::optional<Tensor> grad_scale,
                     std::optional<Tensor> found_inf) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(momenta.size() == count && gradients.size() == count &&
                      positions.size() == count && rows.size() == count &&
                      (copies.empty() || copies.size() == count) &&
                      (gates.empty() || gates.size() == count) && block.size() == 2 &&
                      block[0] > 0 && block[1] > 0,
                  "every list must have one entry per weight");
  STD_TORCH_CHECK(settings.scalar_type() == ScalarType::Double && settings.is_contiguous() &&
                      settings.dim() == 2 && settings.size(1) == kGsmSettings,
                  "settings must be a contiguous float64 matrix with ", kGsmSettings, " columns");
  STD_TORCH_CHECK(
      threshold.numel() == 1 && tie_end.numel() == 1 && tie_end.scalar_type() == ScalarType::Long,
      "threshold and tie_end must be one number, tie_end an int64");
  for (const Tensors* list : {&weights, &momenta, &copies, &gradients, &gates}) {
    check_same_device(*list, settings, "every tensor");
  }
  check_same_device(threshold, settings, "threshold");
  check_same_device(tie_end, settings, "tie_end");
  if (count == 0) return;
  const Device device(settings);

  std::vector<GsmWeight> table;
  std::vector<GsmGate> gate_table;
  const GsmBlock gsm_block{block[0], block[1]};
  for (size_t i = 0; i < count; ++i) {
    GsmWeight w = gsm_weight(weights[i], momenta[i], gradients[i], i);
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < settings.size(0), "rows[", i, "] is not a row");
    STD_TORCH_CHECK(
        positions[i] < 0 || !gates.empty() || threshold.scalar_type() == weights[i].scalar_type(),
        "threshold must have the dtype of the pool's weights");
    w.row = static_cast<int32_t>(rows[i]);
    w.position = positions[i];
    if (!copies.empty() && copies[i].numel() != 0) {
      w.copy_dtype = dtype_of(copies[i]);
      STD_TORCH_CHECK(w.dtype == DType::kFloat32 && same_layout(weights[i], copies[i]) &&
                          (w.copy_dtype == DType::kBFloat16 || w.copy_dtype == DType::kFloat16),
                      "copies[", i, "] must be a 16-bit tensor with the layout of weights[", i,
                      "]");
      w.copy = copies[i].data_ptr();
    }
    if (!gates.empty()) {
      gate_table.push_back(w.position < 0 ? GsmGate{nullptr, 1, 1}
                                          : gsm_gate(weights[i], gates[i], gsm_block, i));
    }
    table.push_back(w);
  }
  const GsmNumbers numbers{threshold.data_ptr(), tie_end.const_data_ptr<int64_t>(),
                           settings.const_data_ptr<double>(),
                           device_float(grad_scale, settings, "grad_scale"),
                           device_float(found_inf, settings, "found_inf")};
  const Tensor scratch = empty_scratch(settings, gsm_update_scratch(table, !gates.empty()));
  gsm_update(table, gate_table, gsm_block, numbers, scratch.data_ptr(), device.max_blocks,
             device.stream);
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
}
