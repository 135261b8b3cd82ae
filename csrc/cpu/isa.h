// The instruction set the CPU kernels run on, chosen once per process at run time.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastprune {

// Ordered: a later one contains every earlier one.
enum class Isa {
  Baseline,  // what the compiler emits without any -m flag
  Avx2,      // AVX2, FMA, F16C, BMI, BMI2, POPCNT
  Avx512,    // Avx2 and AVX-512 F, BW, DQ, VL
};

inline const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
  return kNames[static_cast<int>(isa)];
}

// The best the processor and the operating system support.
inline Isa supported_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::Avx512 : avx2 ? Isa::Avx2 : Isa::Baseline;
#else
  return Isa::Baseline;
#endif
}

// supported_isa(), lowered by FASTPRUNE_ISA=baseline|avx2|avx512. The variable never raises it, so
// a value meant for another machine cannot end in an illegal instruction.
inline Isa choose_isa() {
  const Isa supported = supported_isa();
  const char* wanted = std::getenv("FASTPRUNE_ISA");
  if (wanted == nullptr || *wanted == '\0') return supported;
  for (const Isa isa : {Isa::Baseline, Isa::Avx2, Isa::Avx512})
    if (std::strcmp(wanted, isa_name(isa)) == 0) return isa < supported ? isa : supported;
  throw std::invalid_argument("FASTPRUNE_ISA: expected baseline, avx2 or avx512, got '" +
                              std::string(wanted) + "'");
}

// Read at the first call and kept. Call it inside an operator, not while a library loads: a wrong
// FASTPRUNE_ISA throws.
inline Isa best_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace fastprune
