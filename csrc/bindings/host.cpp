// fastprune._host: facts about this processor and this build. Torch-free.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace py = pybind11;

namespace fastprune {
namespace {

#if defined(__x86_64__)
struct Leaf7 {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Leaf7() { __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx); }
};

constexpr unsigned kAvx512Fp16 = 1u << 23;
constexpr unsigned kAmxTile = 1u << 24;
constexpr unsigned kAmxInt8 = 1u << 25;
constexpr unsigned kAmxBf16 = 1u << 22;
constexpr unsigned kOsxsave = 1u << 27;
constexpr unsigned kTileState = 3u << 17;  // XCR0 bits of the tile registers

// The operating system saves the tile registers; a process still has to ask Linux before using
// them.
bool os_saves_tiles() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & kOsxsave) == 0) return false;
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileState) == kTileState;
}
#endif

py::dict cpu_features() {
  const Isa supported = supported_isa();
  bool fp16 = false, amx_bf16 = false, amx_int8 = false;
#if defined(__x86_64__)
  const Leaf7 leaf;
  const bool tiles = (leaf.edx & kAmxTile) != 0 && os_saves_tiles();
  fp16 = supported == Isa::Avx512 && (leaf.edx & kAvx512Fp16) != 0;
  amx_bf16 = tiles && (leaf.edx & kAmxBf16) != 0;
  amx_int8 = tiles && (leaf.edx & kAmxInt8) != 0;
#endif
  py::dict features;
  features["baseline"] = true;
  features["avx2"] = supported >= Isa::Avx2;
  features["avx512"] = supported >= Isa::Avx512;
  features["avx512_fp16"] = fp16;
  features["amx_bf16"] = amx_bf16;
  features["amx_int8"] = amx_int8;
  return features;
}

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

// The FASTPRUNE_BUILT_* definitions come from setup.py.
py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["built against torch"] = FASTPRUNE_BUILT_TORCH;
  info["CUDA archs"] = FASTPRUNE_BUILT_CUDA_ARCHS;
  info["C++ flags"] = FASTPRUNE_BUILT_FLAGS;
  info["CPU kernels use"] = isa_name(best_isa());
  return info;
}

}  // namespace
}  // namespace fastprune

PYBIND11_MODULE(_host, m) {
  m.doc() = "CPU features and build information; imports without torch.";
  m.def("cpu_features", &fastprune::cpu_features,
        "What this processor and operating system support, by name.");
  m.def(
      "best_isa", [] { return fastprune::isa_name(fastprune::best_isa()); },
      "The instruction set the CPU kernels run on, after FASTPRUNE_ISA.");
  m.def("build_info", &fastprune::build_info, "How the native libraries were built.");
}
