// Generated code and the numbers it reads, of all layers of a network together: in huge pages,
// since an instruction whose page is not known to the processor costs more than the multiplications
// of it. Pages are first writable, then executable, never both.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/sparse_conv/memory.h"

namespace fastprune {
namespace sparse {

class CodeStore {
 public:
  CodeStore() = default;
  CodeStore(const CodeStore&) = delete;
  ~CodeStore();

  // Where the code and the numbers begin in the store.
  int64_t add_code(const std::vector<uint8_t>& code);
  int64_t add_numbers(const std::vector<float>& numbers);

  // Makes what was added executable; false where the system refuses such pages.
  bool seal();

  const uint8_t* code() const { return code_; }
  const float* numbers() const { return reinterpret_cast<const float*>(numbers_.data()); }

 private:
  std::vector<uint8_t> added_code_;
  std::vector<float> added_numbers_;
  void* pages_ = nullptr;
  int64_t pages_size_ = 0;
  const uint8_t* code_ = nullptr;
  Buffer numbers_;
};

}  // namespace sparse
}  // namespace fastprune
