// Writes the few AVX-512 instructions that generated convolutions consist of.
#pragma once

#include <cstdint>
#include <vector>

namespace fastprune {
namespace sparse {

// Numbers as in instructions; the ones the System V calling convention passes arguments in.
enum class Base { kRcx = 1, kRdx = 2, kRsi = 6, kRdi = 7, kR8 = 8 };

class Encoder {
 public:
  const std::vector<uint8_t>& code() const { return code_; }
  int64_t size() const { return static_cast<int64_t>(code_.size()); }

  void load(int to, Base base, int64_t offset) { memory({1, 0, 0x10}, to, 0, base, offset, 64); }
  void store(int from, Base base, int64_t offset) {
    memory({1, 0, 0x11}, from, 0, base, offset, 64);
  }
  void broadcast(int to, Base base, int64_t offset) {
    memory({2, 1, 0x18}, to, 0, base, offset, 4);
  }
  // to += the vector in memory
  void add(int to, Base base, int64_t offset) { memory({1, 0, 0x58}, to, to, base, offset, 64); }
  // to += factor * the number in memory
  void multiply_add(int to, int factor, Base base, int64_t offset) {
    memory({2, 1, 0xB8}, to, factor, base, offset, 4, true);
  }
  // to = the larger one; `b` where one is not a number
  void larger(int to, int a, int b) { registers({1, 0, 0x5F}, to, a, b); }
  void zero(int to) { registers({1, 1, 0xEF}, to, to, to); }
  void advance(Base base, int32_t bytes) {
    put({0x48, 0x81, 0xC0 | static_cast<int>(base)});
    put_word(bytes);
  }
  void finish() {
    put({0xC5, 0xF8, 0x77, 0xC3});  // vzeroupper, ret
    while (code_.size() % 64 != 0) code_.push_back(0x90);
  }

 private:
  struct Opcode {
    int map, prefix, code;
  };

  void put(std::initializer_list<int> bytes) {
    for (const int byte : bytes) code_.push_back(static_cast<uint8_t>(byte));
  }
  void put_word(int32_t word) {
    for (int i = 0; i < 32; i += 8) code_.push_back(static_cast<uint8_t>(word >> i));
  }
  // Bit `bit` of a register's number, inverted, as the EVEX prefix has it.
  static int inverted(int number, int bit) { return ~number >> bit & 1; }

  void prefix(Opcode op, int to, int operand, int third_bit3, int third_bit4, bool broadcasts) {
    put({0x62,
         inverted(to, 3) << 7 | third_bit4 << 6 | third_bit3 << 5 | inverted(to, 4) << 4 | op.map,
         (~operand & 15) << 3 | 4 | op.prefix,
         2 << 5 | (broadcasts ? 1 << 4 : 0) | inverted(operand, 4) << 3, op.code});
  }
  // `unit`: a short displacement counts in these.
  void memory(Opcode op, int to, int operand, Base base_register, int64_t offset, int unit,
              bool broadcasts = false) {
    const int base = static_cast<int>(base_register);
    prefix(op, to, operand, inverted(base, 3), 1, broadcasts);
    const int64_t units = offset / unit;
    const int mode = (to & 7) << 3 | (base & 7);
    if (offset % unit == 0 && units >= -128 && units <= 127) {
      put({0x40 | mode, static_cast<int>(units) & 255});
    } else {
      put({0x80 | mode});
      put_word(static_cast<int32_t>(offset));
    }
  }
  void registers(Opcode op, int to, int a, int b) {
    prefix(op, to, a, inverted(b, 3), inverted(b, 4), false);
    put({0xC0 | (to & 7) << 3 | (b & 7)});
  }

  std::vector<uint8_t> code_;
};

}  // namespace sparse
}  // namespace fastprune
