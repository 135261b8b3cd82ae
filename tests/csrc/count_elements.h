#pragma once
// Included before a CUDA source of the simulator: counts how often it forms the key of an element,
// which is how often the selection reads one from a tensor.
#include "common/score_key.h"

extern "C" {
inline int64_t fastprune_elements_read = 0;
}

namespace fastprune {

template <ScoreKind kKind, typename Storage, typename Gradient>
auto counted_element_key(const Storage* value, const Gradient* gradient, int64_t i) {
  ++fastprune_elements_read;
  return element_key<kKind>(value, gradient, i);
}

}  // namespace fastprune

#define element_key counted_element_key
