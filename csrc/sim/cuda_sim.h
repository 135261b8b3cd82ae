#pragma once
// The part of CUDA C++ that this project's kernels use, for a host compiler: a .cu file that
// includes "cuda/launch.h" compiles with
//   g++ -x c++ -std=c++17 -DFASTPRUNE_SIM -ffp-contract=off -Icsrc
// and its blocks run on the CPU, under sanitizers too. The simulator is for tests: one launch at
// a time, from one host thread. README.md beside this file says what is and is not emulated.
#include <climits>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "sim/machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static thread_local

#define threadIdx (::fastprune::sim::machine.current->index)
#define blockIdx (::fastprune::sim::machine.block_index)
#define blockDim (::fastprune::sim::machine.block)
#define gridDim (::fastprune::sim::machine.grid)
constexpr int warpSize = fastprune::sim::kWarp;

#define FASTPRUNE_SIM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---------------------------------------------------------------- barriers and fences

inline void __syncthreads(FASTPRUNE_SIM_SITE) { fastprune::sim::block_barrier(0, {file, line}); }
inline int __syncthreads_or(int predicate, FASTPRUNE_SIM_SITE) {
  return fastprune::sim::block_barrier(predicate, {file, line}).any;
}
inline int __syncthreads_and(int predicate, FASTPRUNE_SIM_SITE) {
  return fastprune::sim::block_barrier(predicate, {file, line}).all;
}
inline int __syncthreads_count(int predicate, FASTPRUNE_SIM_SITE) {
  return fastprune::sim::block_barrier(predicate, {file, line}).count;
}
inline void __threadfence() { fastprune::sim::fence(); }
inline void __threadfence_block() { fastprune::sim::fence(); }

// ---------------------------------------------------------------- warp operations

namespace fastprune::sim {

template <class T>
constexpr bool kIsShuffled = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <class T>
T shuffle(WarpOperation operation, unsigned mask, T value, unsigned source_lane, Site site) {
  static_assert(kIsShuffled<T>, "shuffles take 32-bit and 64-bit arithmetic types");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_operation(operation, mask, bits, source_lane, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned lane() { return machine.current->rank % kWarp; }

// Lanes shuffle within segments of `width`; a source outside the segment means the lane itself.
struct Segment {
  unsigned first, last;
};
inline Segment segment(int width, Site site) {
  if (width <= 0 || width > 32 || (width & (width - 1)) != 0) {
    machine.current->site = site;
    report("the width of a shuffle is a power of two from 1 to 32");
  }
  const unsigned first = lane() & ~(static_cast<unsigned>(width) - 1);
  return {first, first + static_cast<unsigned>(width) - 1};
}

}  // namespace fastprune::sim

inline void __syncwarp(unsigned mask = 0xffffffffu, FASTPRUNE_SIM_SITE) {
  using namespace fastprune::sim;
  warp_operation(WarpOperation::kSync, mask, 0, 0, {file, line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, FASTPRUNE_SIM_SITE) {
  using namespace fastprune::sim;
  const Segment s = segment(width, {file, line});
  const unsigned from = s.first + (static_cast<unsigned>(source) & (s.last - s.first));
  return shuffle(WarpOperation::kShuffle, mask, value, from, {file, line});
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, FASTPRUNE_SIM_SITE) {
  using namespace fastprune::sim;
  const Segment s = segment(width, {file, line});
  const unsigned from = delta > lane() - s.first ? lane() : lane() - delta;
  return shuffle(WarpOperation::kShuffleUp, mask, value, from, {file, line});
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   FASTPRUNE_SIM_SITE) {
  using namespace fastprune::sim;
  const Segment s = segment(width, {file, line});
  const unsigned from = delta > s.last - lane() ? lane() : lane() + delta;
  return shuffle(WarpOperation::kShuffleDown, mask, value, from, {file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, FASTPRUNE_SIM_SITE) {
  using namespace fastprune::sim;
  const Segment s = segment(width, {file, line});
  const unsigned target = lane() ^ static_cast<unsigned>(lane_mask);
  // An earlier segment may be read, a later one not: that is CUDA's rule.
  const unsigned from = target > s.last ? lane() : target;
  return shuffle(WarpOperation::kShuffleXor, mask, value, from, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, FASTPRUNE_SIM_SITE) {
  using namespace fastprune::sim;
  return static_cast<unsigned>(
      warp_operation(WarpOperation::kBallot, mask, predicate != 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, FASTPRUNE_SIM_SITE) {
  using namespace fastprune::sim;
  return static_cast<int>(
      warp_operation(WarpOperation::kAny, mask, predicate != 0, 0, {file, line}));
}
inline int __all_sync(unsigned mask, int predicate, FASTPRUNE_SIM_SITE) {
  using namespace fastprune::sim;
  return static_cast<int>(
      warp_operation(WarpOperation::kAll, mask, predicate != 0, 0, {file, line}));
}
// Threads are never promised to run together, so the lane alone is a right answer.
inline unsigned __activemask() { return 1u << fastprune::sim::lane(); }

// ---------------------------------------------------------------- atomics: relaxed, as in CUDA

namespace fastprune::sim {

template <class T, class... Allowed>
constexpr bool kIsOneOf = (std::is_same_v<T, Allowed> || ...);
template <class T>
constexpr bool kIsWord = kIsOneOf<T, int, unsigned, unsigned long long>;
template <class T>
using Same = std::common_type_t<T>;  // takes no part in deduction: atomicAdd(&an_unsigned, 1)

template <class T, class Update>
T atomic_update(T* address, Update update) {
  before_atomic();
  T old, desired;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    desired = update(old);
  } while (!__atomic_compare_exchange(address, &old, &desired, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  after_atomic(address);
  return old;
}

}  // namespace fastprune::sim

template <class T>
T atomicAdd(T* address, fastprune::sim::Same<T> value) {
  static_assert(fastprune::sim::kIsOneOf<T, int, unsigned, unsigned long long, float, double>,
                "CUDA has no atomicAdd for this type");
  return fastprune::sim::atomic_update(address, [=](T old) { return old + value; });
}
template <class T>
T atomicSub(T* address, fastprune::sim::Same<T> value) {
  static_assert(fastprune::sim::kIsOneOf<T, int, unsigned>, "CUDA has no atomicSub for this type");
  return fastprune::sim::atomic_update(address, [=](T old) { return old - value; });
}
template <class T>
T atomicMax(T* address, fastprune::sim::Same<T> value) {
  static_assert(fastprune::sim::kIsWord<T> || std::is_same_v<T, long long>,
                "CUDA has no atomicMax for this type");
  return fastprune::sim::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, fastprune::sim::Same<T> value) {
  static_assert(fastprune::sim::kIsWord<T> || std::is_same_v<T, long long>,
                "CUDA has no atomicMin for this type");
  return fastprune::sim::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, fastprune::sim::Same<T> value) {
  static_assert(fastprune::sim::kIsWord<T>, "CUDA has no atomicOr for this type");
  return fastprune::sim::atomic_update(address, [=](T old) { return old | value; });
}
template <class T>
T atomicAnd(T* address, fastprune::sim::Same<T> value) {
  static_assert(fastprune::sim::kIsWord<T>, "CUDA has no atomicAnd for this type");
  return fastprune::sim::atomic_update(address, [=](T old) { return old & value; });
}
template <class T>
T atomicXor(T* address, fastprune::sim::Same<T> value) {
  static_assert(fastprune::sim::kIsWord<T>, "CUDA has no atomicXor for this type");
  return fastprune::sim::atomic_update(address, [=](T old) { return old ^ value; });
}
template <class T>
T atomicExch(T* address, fastprune::sim::Same<T> value) {
  static_assert(fastprune::sim::kIsWord<T> || std::is_same_v<T, float>,
                "CUDA has no atomicExch for this type");
  return fastprune::sim::atomic_update(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, fastprune::sim::Same<T> expected, fastprune::sim::Same<T> desired) {
  static_assert(fastprune::sim::kIsWord<T>, "CUDA has no atomicCAS for this type");
  fastprune::sim::before_atomic();
  __atomic_compare_exchange(address, &expected, &desired, false, __ATOMIC_RELAXED,
                            __ATOMIC_RELAXED);
  fastprune::sim::after_atomic(address);
  return expected;
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return fastprune::sim::atomic_update(address,
                                       [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}

// ---------------------------------------------------------------- bits

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}

namespace fastprune::sim {
template <class To, class From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "same number of bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace fastprune::sim

inline unsigned __float_as_uint(float x) { return fastprune::sim::bits_of<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return fastprune::sim::bits_of<float>(x); }
inline int __float_as_int(float x) { return fastprune::sim::bits_of<int>(x); }
inline float __int_as_float(int x) { return fastprune::sim::bits_of<float>(x); }
inline long long __double_as_longlong(double x) { return fastprune::sim::bits_of<long long>(x); }
inline double __longlong_as_double(long long x) { return fastprune::sim::bits_of<double>(x); }

template <class T>
T __ldg(const T* address) {
  return *address;
}

// ---------------------------------------------------------------- arithmetic, rounded once

namespace fastprune::sim {
// Passing through memory keeps the compiler from fusing the rounding away, whatever its flags.
template <class T>
T rounded(T x) {
  asm("" : "+m"(x));
  return x;
}
}  // namespace fastprune::sim

inline float __fmul_rn(float a, float b) { return fastprune::sim::rounded(a * b); }
inline float __fadd_rn(float a, float b) { return fastprune::sim::rounded(a + b); }
inline float __fsub_rn(float a, float b) { return fastprune::sim::rounded(a - b); }
inline float __fdiv_rn(float a, float b) { return fastprune::sim::rounded(a / b); }
inline float __fsqrt_rn(float a) { return fastprune::sim::rounded(std::sqrt(a)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return fastprune::sim::rounded(a * b); }
inline double __dadd_rn(double a, double b) { return fastprune::sim::rounded(a + b); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

#define FASTPRUNE_SIM_MIN_MAX(T)                   \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
FASTPRUNE_SIM_MIN_MAX(int)
FASTPRUNE_SIM_MIN_MAX(unsigned)
FASTPRUNE_SIM_MIN_MAX(long)
FASTPRUNE_SIM_MIN_MAX(unsigned long)
FASTPRUNE_SIM_MIN_MAX(long long)
FASTPRUNE_SIM_MIN_MAX(unsigned long long)
#undef FASTPRUNE_SIM_MIN_MAX
// A NaN loses against a number, as in CUDA.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
