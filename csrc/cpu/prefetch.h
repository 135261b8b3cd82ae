// The processor's own prefetcher stops at the end of a 4 KB page, where the next address has yet to
// be translated. Asking two pages ahead lets the translations overlap with the work.
#pragma once

#include <cstdint>

namespace fastprune {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kPrefetchBytes = 8192;

template <typename T>
inline void prefetch_ahead(const T* address) {
  __builtin_prefetch(reinterpret_cast<const char*>(address) + kPrefetchBytes);
}

}  // namespace fastprune
