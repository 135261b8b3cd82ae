// Memory of activations: one buffer, in which tensors that are not alive together share a place.
#pragma once

#include <cstdint>
#include <vector>

namespace fastprune {
namespace sparse {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kHugePage = int64_t{1} << 21;

// Aligned to a cache line, zero at first; in huge pages where the system gives them, since a tile
// of an activation touches every channel.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes);
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_ = nullptr;
};

// A tensor is alive from step `first` to step `last`, both included.
struct Lifetime {
  int64_t size, first, last;
};

// An offset for each, a multiple of `alignment`; `total` is what all need together.
std::vector<int64_t> place_tensors(const std::vector<Lifetime>& tensors, int64_t alignment,
                                   int64_t* total);

}  // namespace sparse
}  // namespace fastprune
