// Pointers to elements of a type that is known at run time.
#pragma once

#include <type_traits>

#include "common/score_key.h"

namespace fastprune {

// A pointer some elements further on; null stays null.
template <typename Pointer>
Pointer* advanced(Pointer* pointer, DType dtype, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
  const int64_t size = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  return pointer == nullptr ? nullptr : static_cast<Byte*>(pointer) + elements * size;
}

}  // namespace fastprune
