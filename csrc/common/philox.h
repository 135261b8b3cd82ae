// Philox4x32-10 (Salmon et al. 2011): random words that are a function of a counter and a key.
#pragma once

#include "common/elementary.h"

namespace fastprune {

struct PhiloxWords {
  uint32_t word[4];
};

FASTPRUNE_INLINE PhiloxWords philox(PhiloxWords counter, uint64_t key) {
  auto low_key = static_cast<uint32_t>(key);
  auto high_key = static_cast<uint32_t>(key >> 32);
  FASTPRUNE_UNROLLED
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {
        {static_cast<uint32_t>(b >> 32) ^ counter.word[1] ^ low_key, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ counter.word[3] ^ high_key, static_cast<uint32_t>(a)}};
    low_key += 0x9E3779B9u;
    high_key += 0xBB67AE85u;
  }
  return counter;
}

// Between 0 and 1, and neither.
FASTPRUNE_FORCED_INLINE double uniform_of(uint32_t word) { return (word + 0.5) * 0x1p-32; }

// A normal number of two words, by Box and Muller.
FASTPRUNE_FORCED_INLINE double normal_of(uint32_t first, uint32_t second) {
  return sqrt(-2 * log_of(uniform_of(first))) * cos_of_turns(uniform_of(second));
}

}  // namespace fastprune
