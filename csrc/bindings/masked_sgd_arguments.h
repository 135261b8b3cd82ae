// The masked step's lists, checked, as the plain data that the kernels take.
#pragma once

#include <vector>

#include "bindings/sgd_arguments.h"
#include "common/masked_sgd_tensors.h"

namespace fastprune {

inline std::vector<MaskedWeight> masked_weights(const SgdArguments& a, const Tensors& masks) {
  check_lists(a);
  STD_TORCH_CHECK(masks.size() == a.weights.size(), "masks must have one entry per weight");
  std::vector<MaskedWeight> weights(a.weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    set_tensor(a, i, a.momenta[i].numel() != 0, &weights[i]);
    const int64_t bytes = masks[i].numel();
    STD_TORCH_CHECK(
        bytes == 0 || (masks[i].scalar_type() == ScalarType::Byte && masks[i].is_contiguous() &&
                       bytes == (weights[i].numel + kMaskByte - 1) / kMaskByte),
        "masks[", i, "] must be contiguous uint8 with one bit per element of weights[", i,
        "], or empty");
    if (bytes != 0) weights[i].mask = masks[i].const_data_ptr<uint8_t>();
  }
  return weights;
}

}  // namespace fastprune
