// Loss scaling, as operators on the CPU find it in their arguments.
#pragma once

#include <optional>

#include "bindings/tensor_list.h"

namespace fastprune {

inline bool is_skipped(const std::optional<Tensor>& found_inf) {
  return found_inf && *found_inf->const_data_ptr<float>() != 0;
}

inline double gradient_factor(const std::optional<Tensor>& grad_scale) {
  return grad_scale ? 1.0 / *grad_scale->const_data_ptr<float>() : 1.0;
}

}  // namespace fastprune
