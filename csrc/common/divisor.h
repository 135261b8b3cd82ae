// Division by a number that is known before the kernel runs, for loops that divide every element.
#pragma once

#include <cstdint>

#include "common/score_key.h"

namespace fastprune {

// The quotient of a number below 2^31 is one multiplication: with 2^(l-1) < divisor <= 2^l and
// m = ceil(2^(31+l) / divisor), the error m * divisor - 2^(31+l) is below 2^l, too small to carry
// n * m / 2^(31+l) to the next integer.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) : divisor_(divisor < 1 ? 1 : divisor) {
    if (divisor_ >> 31 != 0) return;  // the quotient is 0, and so is the product
    while (int64_t{1} << (shift_ - 31) < divisor_) ++shift_;
    const uint64_t numerator = (uint64_t{1} << shift_) + static_cast<uint64_t>(divisor_) - 1;
    multiplier_ = static_cast<uint32_t>(numerator / static_cast<uint64_t>(divisor_));
  }

  FASTPRUNE_INLINE int64_t quotient(int64_t n) const {
    if (n >> 31 != 0) return n / divisor_;
    return static_cast<int64_t>(static_cast<uint64_t>(n) * multiplier_ >> shift_);
  }
  FASTPRUNE_INLINE int64_t value() const { return divisor_; }

 private:
  int64_t divisor_ = 1;
  uint32_t multiplier_ = 0;
  uint32_t shift_ = 31;
};

}  // namespace fastprune
