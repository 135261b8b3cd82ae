#include "cpu/sparse_conv/code_store.h"

#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastprune {
namespace sparse {

int64_t CodeStore::add_code(const std::vector<uint8_t>& code) {
  const int64_t begin = static_cast<int64_t>(added_code_.size());
  added_code_.insert(added_code_.end(), code.begin(), code.end());
  return begin;
}

int64_t CodeStore::add_numbers(const std::vector<float>& numbers) {
  constexpr size_t kLine = kCacheLine / sizeof(float);
  added_numbers_.resize((added_numbers_.size() + kLine - 1) / kLine * kLine);
  const int64_t begin = static_cast<int64_t>(added_numbers_.size());
  added_numbers_.insert(added_numbers_.end(), numbers.begin(), numbers.end());
  return begin;
}

bool CodeStore::seal() {
  if (added_code_.empty()) return true;
#if defined(__linux__)
  const int64_t size = (static_cast<int64_t>(added_code_.size()) / kHugePage + 1) * kHugePage;
  pages_size_ = size + kHugePage;
  void* pages =
      mmap(nullptr, pages_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return false;
  pages_ = pages;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(pages) / kHugePage + 1) * kHugePage;
  uint8_t* code = reinterpret_cast<uint8_t*>(first);
  madvise(code, size, MADV_HUGEPAGE);  // a wish, no more
  std::memcpy(code, added_code_.data(), added_code_.size());
  if (mprotect(code, size, PROT_READ | PROT_EXEC) != 0) return false;
  code_ = code;
  const int64_t bytes = static_cast<int64_t>(added_numbers_.size() * sizeof(float));
  numbers_ = Buffer(bytes);
  std::memcpy(numbers_.data(), added_numbers_.data(), bytes);
  added_code_ = {};
  added_numbers_ = {};
  return true;
#else
  return false;
#endif
}

CodeStore::~CodeStore() {
#if defined(__linux__)
  if (pages_ != nullptr) munmap(pages_, pages_size_);
#endif
}

}  // namespace sparse
}  // namespace fastprune
