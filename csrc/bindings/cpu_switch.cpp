// The channel switch on the CPU: bring tensors into a layout that the kernel knows, call it.
#include <tuple>

#include "bindings/cpu_parallel.h"
#include "bindings/tensor_list.h"
#include "cpu/switch.h"

namespace fastprune {
namespace {

// Dense in memory, with the channels innermost. A single channel is a plane.
bool channels_innermost(const Tensor& input) {
  const auto sizes = input.sizes(), strides = input.strides();
  if (sizes[1] == 1) return false;
  int64_t expected = sizes[1];
  for (int64_t d = input.dim() - 1; d >= 0; --d) {
    const int64_t stride = d == 1 ? 1 : expected;
    if (sizes[d] != 1 && strides[d] != stride) return false;
    if (d != 1) expected *= sizes[d];
  }
  return true;
}

SwitchShape shape_of(const Tensor& input, const Tensor& scale) {
  const int64_t dim = input.dim();
  STD_TORCH_CHECK(dim >= 2, "input must be [N, C] or [N, C, ...], got ", dim, " dimensions");
  SwitchShape shape{};
  shape.dtype = dtype_of(input);
  shape.examples = input.size(0);
  shape.channels = input.size(1);
  shape.positions = 1;
  for (int64_t d = 2; d < dim; ++d) shape.positions *= input.size(d);
  shape.per_example = scale.dim() == 2;
  const bool fits = shape.per_example ? scale.size(0) == shape.examples : scale.dim() == 1;
  STD_TORCH_CHECK(fits && scale.size(scale.dim() - 1) == shape.channels,
                  "scale must be [C] or [N, C] for an input [N, C, ...]");
  return shape;
}

// The scale in the precision of the products.
Tensor wide_scale(const Tensor& scale, DType input) {
  const ScalarType wide = input == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  if (scale.scalar_type() == wide) return torch::stable::contiguous(scale);
  Tensor converted = torch::stable::new_empty(scale, scale.sizes(), wide);
  torch::stable::copy_(converted, scale);
  return converted;
}

// The layout that a kernel takes; `shape` learns where the channels are.
Tensor prepared(const Tensor& input, SwitchShape* shape) {
  shape->channels_last = channels_innermost(input);
  return shape->channels_last ? input : torch::stable::contiguous(input);
}

// The tensor itself where it is laid out as a result for `input` must be, else a copy that is.
Tensor laid_out_for(const Tensor& input, const Tensor& tensor) {
  if (same_layout(input, tensor)) return tensor;
  Tensor copy = torch::stable::empty_like(input);
  if (same_layout(copy, tensor)) return tensor;
  torch::stable::copy_(copy, tensor);
  return copy;
}

Tensor channel_switch_cpu(Tensor input, Tensor scale) {
  SwitchShape shape = shape_of(input, scale);
  if (input.numel() == 0) return torch::stable::empty_like(input);
  const Tensor ready = prepared(input, &shape);
  const Tensor factors = wide_scale(scale, shape.dtype);
  const Tensor output = torch::stable::empty_like(ready);
  channel_switch(shape, ready.data_ptr(), factors.data_ptr(), kTorchThreads, output.data_ptr());
  return laid_out_for(input, output);
}

std::tuple<Tensor, Tensor> channel_switch_backward_cpu(Tensor grad, Tensor input, Tensor scale) {
  SwitchShape shape = shape_of(input, scale);
  STD_TORCH_CHECK(grad.scalar_type() == input.scalar_type() && grad.sizes().equals(input.sizes()),
                  "grad must have the shape and dtype of input");
  Tensor grad_scale = torch::stable::new_empty(scale, scale.sizes());
  if (input.numel() == 0) {
    return {torch::stable::empty_like(input), torch::stable::zero_(grad_scale)};
  }
  const Tensor ready = prepared(input, &shape);
  const Tensor ready_grad = laid_out_for(ready, grad);
  const Tensor factors = wide_scale(scale, shape.dtype);
  const Tensor grad_input = torch::stable::empty_like(ready);
  const bool wide = factors.scalar_type() == scale.scalar_type();
  Tensor sums = wide ? grad_scale : torch::stable::empty_like(factors);
  channel_switch_backward(shape, ready_grad.data_ptr(), ready.data_ptr(), factors.data_ptr(),
                          kTorchThreads, grad_input.data_ptr(), sums.data_ptr());
  if (!wide) torch::stable::copy_(grad_scale, sums);
  return {laid_out_for(input, grad_input), grad_scale};
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("channel_switch", TORCH_BOX(&fastprune::channel_switch_cpu));
  m.impl("channel_switch_backward", TORCH_BOX(&fastprune::channel_switch_backward_cpu));
}
