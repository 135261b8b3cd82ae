#pragma once
// Sums, maxima and prefix sums over a warp and over a block, a few lines over shuffles.
//
// All threads of a one-dimensional block of exactly kThreads threads take part, and all lanes of
// every warp. The order of additions is fixed by kThreads, so equal inputs give equal bits.
// A block function may follow another one on the same scratch with nothing in between.
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"

namespace fastprune {

constexpr int kWarpThreads = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
constexpr bool kFitsShuffle = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

// The shared memory that a block function works in: __shared__ BlockScratch<T, kThreads> scratch;
template <class T, int kThreads>
struct BlockScratch {
  static_assert(kFitsShuffle<T>, "shuffles move 32-bit and 64-bit numbers");
  static_assert(kThreads % kWarpThreads == 0, "warps are whole: masks name all lanes");
  static_assert(kThreads > 0 && kThreads <= kWarpThreads * kWarpThreads,
                "one warp combines the results of all warps");
  static constexpr int kWarps = kThreads / kWarpThreads;
  T of_warp[kWarps];
};

struct Sum {
  template <class T>
  static __device__ __forceinline__ T combine(T a, T b) {
    return a + b;
  }
};

struct Max {
  template <class T>
  static __device__ __forceinline__ T combine(T a, T b) {
    return a < b ? b : a;
  }
};

// Every lane gets the result.
template <class Operation, class T>
__device__ __forceinline__ T warp_reduce(T value) {
  static_assert(kFitsShuffle<T>, "shuffles move 32-bit and 64-bit numbers");
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value = Operation::combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

template <class T>
__device__ __forceinline__ T warp_inclusive_sum(T value) {
  static_assert(kFitsShuffle<T>, "shuffles move 32-bit and 64-bit numbers");
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += before;
  }
  return value;
}

// Every thread gets the result.
template <class Operation, int kThreads, class T>
__device__ __forceinline__ T block_reduce(T value, BlockScratch<T, kThreads>& scratch) {
  constexpr int kWarps = BlockScratch<T, kThreads>::kWarps;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  value = warp_reduce<Operation>(value);
  __syncthreads();  // the scratch may still be read by the call before
  if (lane == 0) scratch.of_warp[warp] = value;
  __syncthreads();
  // Every thread combines the few warps itself, in the same order: cheaper than a third barrier.
  T result = scratch.of_warp[0];
  for (int i = 1; i < kWarps; ++i) result = Operation::combine(result, scratch.of_warp[i]);
  return result;
}

template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T value, BlockScratch<T, kThreads>& scratch) {
  return block_reduce<Sum, kThreads>(value, scratch);
}

template <int kThreads, class T>
__device__ __forceinline__ T block_max(T value, BlockScratch<T, kThreads>& scratch) {
  return block_reduce<Max, kThreads>(value, scratch);
}

// A thread's prefix sum and the sum of the whole block.
template <class T>
struct Scanned {
  T prefix;
  T total;
};

template <int kThreads, class T>
__device__ __forceinline__ Scanned<T> block_inclusive_sum(T value,
                                                          BlockScratch<T, kThreads>& scratch) {
  constexpr int kWarps = BlockScratch<T, kThreads>::kWarps;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const T in_warp = warp_inclusive_sum(value);
  __syncthreads();  // the scratch may still be read by the call before
  if (lane == kWarpThreads - 1) scratch.of_warp[warp] = in_warp;
  __syncthreads();
  T before = 0;
  T total = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp) before = total;
    total += scratch.of_warp[i];
  }
  return {static_cast<T>(before + in_warp), total};
}

// The sum of the values of the threads before this one. Of integers only: a floating-point sum
// minus its last term is not the sum before it.
template <int kThreads, class T>
__device__ __forceinline__ Scanned<T> block_exclusive_sum(T value,
                                                          BlockScratch<T, kThreads>& scratch) {
  static_assert(std::is_integral_v<T>, "floating-point sums cannot be taken back");
  const Scanned<T> inclusive = block_inclusive_sum<kThreads>(value, scratch);
  return {static_cast<T>(inclusive.prefix - value), inclusive.total};
}

}  // namespace fastprune
