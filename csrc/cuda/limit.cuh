#pragma once
// The rule (threshold, tie_end) as kernels apply it: keys above the limit's are selected, those
// equal to it where their position is before the end.
#include <cstdint>

#include "common/score_key.h"
#include "cuda/launch.h"

namespace fastprune {

template <typename Key>
struct Limit {
  Key key;
  int64_t tie_end;
};

// A threshold below every score, -0.0 among them, has no key of its own: all zeros are kept.
template <ScoreKind kKind, typename Key, typename Score>
__device__ __forceinline__ Limit<Key> limit_of(Score threshold, int64_t tie_end) {
  const bool has_sign = (bit_cast<Key>(threshold) & KeyTraits<Key>::kSign) != 0;
  const bool is_below = threshold == 0 || (!KeyOrder<kKind, Key>::kSigned && threshold < 0);
  if (has_sign && is_below) return {KeyOrder<kKind, Key>::kOffset, INT64_MAX};
  return {score_key<kKind>(threshold), tie_end};
}

}  // namespace fastprune
