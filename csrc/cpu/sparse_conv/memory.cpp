#include "cpu/sparse_conv/memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastprune {
namespace sparse {
namespace {

int64_t rounded_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

}  // namespace

Buffer::Buffer(int64_t bytes) {
  const int64_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
  const int64_t size = rounded_up(std::max(bytes, kCacheLine), alignment);
  data_ = std::aligned_alloc(alignment, size);
  if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == kHugePage) madvise(data_, size, MADV_HUGEPAGE);  // a wish, no more
#endif
  std::memset(data_, 0, size);
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  return *this;
}

Buffer::~Buffer() { std::free(data_); }

std::vector<int64_t> place_tensors(const std::vector<Lifetime>& tensors, int64_t alignment,
                                   int64_t* total) {
  std::vector<size_t> order(tensors.size()), placed;
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return tensors[a].first < tensors[b].first; });
  std::vector<int64_t> offsets(tensors.size(), 0);
  *total = 0;
  for (const size_t i : order) {
    const auto ended = [&](size_t p) { return tensors[p].last < tensors[i].first; };
    placed.erase(std::remove_if(placed.begin(), placed.end(), ended), placed.end());
    const int64_t size = rounded_up(tensors[i].size, alignment);
    auto gap = placed.begin();  // the lowest gap that is wide enough
    int64_t offset = 0;
    for (; gap != placed.end() && offsets[*gap] < offset + size; ++gap) {
      offset = offsets[*gap] + rounded_up(tensors[*gap].size, alignment);
    }
    offsets[i] = offset;
    placed.insert(gap, i);
    *total = std::max(*total, offset + size);
  }
  return offsets;
}

}  // namespace sparse
}  // namespace fastprune
