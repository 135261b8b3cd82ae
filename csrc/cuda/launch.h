#pragma once
// How every kernel of this project is launched: on the GPU under nvcc, on the CPU in the
// simulator. The same kernel source serves both.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <tuple>
#elif defined(FASTPRUNE_SIM)
#include "sim/cuda_sim.h"
#else
#error "compile this file with nvcc, or with g++ -x c++ -DFASTPRUNE_SIM"
#endif

// Declares `type* name`, the dynamic shared memory of the block, aligned to 16 bytes.
#if defined(__CUDACC__)
#define FASTPRUNE_DYNAMIC_SHARED(type, name)                                          \
  extern __shared__ __align__(16) unsigned char fastprune_dynamic_shared[];           \
  static_assert(alignof(type) <= 16, "dynamic shared memory is aligned to 16 bytes"); \
  type* const name = reinterpret_cast<type*>(fastprune_dynamic_shared)
#else
#define FASTPRUNE_DYNAMIC_SHARED(type, name)                                          \
  static_assert(alignof(type) <= 16, "dynamic shared memory is aligned to 16 bytes"); \
  type* const name = static_cast<type*>(::fastprune::sim::machine.dynamic_shared)
#endif

namespace fastprune {

#if defined(__CUDACC__)
using Stream = cudaStream_t;
#else
using Stream = void*;
#endif

// A grid that remembers where it was written, so that an error names the launch.
struct Grid {
  dim3 blocks;
  const char* file;
  int line;

  Grid(dim3 blocks, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : blocks(blocks), file(file), line(line) {}
  Grid(unsigned blocks, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : blocks(blocks), file(file), line(line) {}
};

#if defined(__CUDACC__)

inline void check_cuda(cudaError_t error, const char* what, const char* file, int line) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here: it must not surface again in somebody else's check
  throw std::runtime_error(std::string(what) + " at " + file + ":" + std::to_string(line) +
                           " failed: " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

// kernel<<<grid, block, dynamic_shared_bytes, stream>>>(arguments...), checked. More than 48 KiB
// of dynamic shared memory, which CUDA wants to be asked for, is asked for.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, dim3 block, size_t dynamic_shared_bytes,
            Stream stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "wrong number of arguments");
  constexpr size_t kSharedWithoutAsking = size_t{48} << 10;
  if (dynamic_shared_bytes > kSharedWithoutAsking) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(dynamic_shared_bytes)),
               "asking for dynamic shared memory", grid.file, grid.line);
  }
  std::tuple<Parameters...> converted(std::forward<Arguments>(arguments)...);
  const cudaError_t error = std::apply(
      [&](Parameters&... each) {
        void* pointers[] = {const_cast<void*>(static_cast<const volatile void*>(&each))...,
                            nullptr};
        return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid.blocks, block, pointers,
                                dynamic_shared_bytes, stream);
      },
      converted);
  check_cuda(error, "kernel launch", grid.file, grid.line);
}

inline void fill_zero_async(void* memory, size_t bytes, Stream stream,
                            const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  check_cuda(cudaMemsetAsync(memory, 0, bytes, stream), "cudaMemsetAsync", file, line);
}

#else

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, dim3 block, size_t dynamic_shared_bytes,
            Stream /*stream*/, Arguments&&... arguments) {
  sim::launch(kernel, grid.blocks, block, dynamic_shared_bytes, sim::Site{grid.file, grid.line},
              std::forward<Arguments>(arguments)...);
}

inline void fill_zero_async(void* memory, size_t bytes, Stream /*stream*/) {
  if (bytes != 0) std::memset(memory, 0, bytes);
}

#endif

}  // namespace fastprune
