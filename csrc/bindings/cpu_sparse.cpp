// A planned region of a network on the CPU: check and describe tensors, call the prepared network.
#include <algorithm>
#include <memory>

#include "bindings/cpu_parallel.h"
#include "bindings/tensor_list.h"
#include "cpu/isa.h"
#include "cpu/sparse_conv/network.h"

namespace fastprune {
namespace {

using sparse::InputSpec;
using sparse::Plan;
using sparse::WeightArray;

std::vector<WeightArray> weight_arrays(const Tensors& weights) {
  std::vector<WeightArray> arrays;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    const bool is_float = w.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(is_float || w.scalar_type() == ScalarType::Int, "weights[", i,
                    "] must be float32 or int32");
    STD_TORCH_CHECK(w.is_cpu() && w.dim() == 1 && w.is_contiguous(), "weights[", i,
                    "] must be a contiguous CPU tensor of one dimension");
    arrays.push_back({w.const_data_ptr(), w.numel(), is_float});
  }
  return arrays;
}

InputSpec input_spec(const Tensor& x, size_t index) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float, "inputs[", index,
                  "] must be a float32 tensor on the CPU; move it there with .cpu().float()");
  STD_TORCH_CHECK(x.dim() == 4 || x.dim() == 2, "inputs[", index,
                  "] must be [N, C, H, W] or [N, C], got ", x.dim(), " dimensions");
  const bool is_image = x.dim() == 4;
  const auto at = [&](int64_t d) { return is_image || d < 2 ? x.size(d) : 1; };
  for (int64_t d = 1; d < x.dim(); ++d) {
    STD_TORCH_CHECK(x.size(d) > 0, "inputs[", index, "] must not be empty in dimension ", d);
  }
  InputSpec spec{{at(0), at(1), at(2), at(3)}, {0, 0, 0, 0}};
  // The stride of a dimension of size 1 is not looked at and may be any number.
  for (int64_t d = 0; d < x.dim(); ++d) spec.stride[d] = x.size(d) == 1 ? 0 : x.stride(d);
  return spec;
}

struct Prepared {
  std::shared_ptr<const Plan> plan;
  std::vector<const float*> inputs;
  std::vector<float*> outputs;
  Tensors results;
};

Prepared prepare(const Tensors& inputs, const Tensors& weights, const std::vector<int64_t>& program,
                 int64_t key) {
  STD_TORCH_CHECK(!inputs.empty(), "inputs must have at least one tensor");
  STD_TORCH_CHECK(program.size() % sparse::kStepFields == 0, "program must have ",
                  sparse::kStepFields, " numbers per step, got ", program.size());
  Prepared prepared;
  std::vector<InputSpec> specs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    specs.push_back(input_spec(inputs[i], i));
    prepared.inputs.push_back(inputs[i].const_data_ptr<float>());
  }
  const std::vector<WeightArray> arrays = weight_arrays(weights);
  prepared.plan = sparse::find_network(key, program)->plan(arrays, specs, best_isa());
  for (const sparse::Output& output : prepared.plan->outputs()) {
    const sparse::Shape& s = output.shape;
    std::vector<int64_t> sizes{s.images, s.channels};
    if (!output.flatten) sizes.insert(sizes.end(), {s.height, s.width});
    if (output.flatten) sizes[1] *= s.height * s.width;
    prepared.results.push_back(torch::stable::new_empty(inputs[0], sizes));
    prepared.outputs.push_back(prepared.results.back().mutable_data_ptr<float>());
  }
  return prepared;
}

Tensors sparse_network_cpu(Tensors inputs, Tensors weights, std::vector<int64_t> program,
                           int64_t key) {
  Prepared prepared = prepare(inputs, weights, program, key);
  prepared.plan->run(prepared.inputs, prepared.outputs, kTorchThreads);
  return prepared.results;
}

Tensor sparse_profile_cpu(Tensors inputs, Tensors weights, std::vector<int64_t> program,
                          int64_t key) {
  Prepared prepared = prepare(inputs, weights, program, key);
  std::vector<double> seconds(program.size() / sparse::kStepFields, 0);
  prepared.plan->run(prepared.inputs, prepared.outputs, kTorchThreads, &seconds);
  Tensor result = torch::stable::new_empty(inputs[0], {static_cast<int64_t>(seconds.size())},
                                           ScalarType::Double);
  std::copy(seconds.begin(), seconds.end(), result.mutable_data_ptr<double>());
  return result;
}

void sparse_release_cpu(Tensor, int64_t key) { sparse::release_network(key); }

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("sparse_network", TORCH_BOX(&fastprune::sparse_network_cpu));
  m.impl("sparse_profile", TORCH_BOX(&fastprune::sparse_profile_cpu));
  m.impl("sparse_release", TORCH_BOX(&fastprune::sparse_release_cpu));
}
