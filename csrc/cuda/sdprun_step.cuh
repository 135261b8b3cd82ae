#pragma once
// A step of SGD on accumulators, and weights made of them: what all of SDprun's kernels do with an
// element, one at a time or in vectors.
#include <climits>
#include <cstdint>
#include <type_traits>

#include "common/narrow.h"
#include "cuda/sdprun.h"
#include "cuda/tensor_walk.cuh"

namespace fastprune {

// Each product and each sum is rounded once, fused where torch fuses, whatever the compiler's
// flags. elementary.h has the fused one of doubles.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float sum(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double sum(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// The square of a float is exact in double.
__device__ __forceinline__ double plus_square(double total, float x) {
  const double wide = x;
  return __fma_rn(wide, wide, total);
}
__device__ __forceinline__ double plus_square(double total, double x) {
  return sum(total, product(x, x));
}

__device__ __forceinline__ bool is_skipped(const SdprunNumbers& numbers) {
  return numbers.found_inf != nullptr && *numbers.found_inf != 0;
}

// Of all gradients, but for the sign.
__device__ __forceinline__ double gradient_factor(const SdprunNumbers& numbers) {
  return numbers.grad_scale == nullptr ? 1 : 1 / static_cast<double>(*numbers.grad_scale);
}

template <typename T>
struct StepNumbers {
  T gradient_factor, momentum, minus_lr;

  __device__ StepNumbers(const SdprunSettings& settings, double factor)
      : gradient_factor(static_cast<T>(settings.maximize != 0 ? -factor : factor)),
        momentum(static_cast<T>(settings.momentum)),
        minus_lr(static_cast<T>(-settings.lr)) {}
};

template <int kCount, typename T>
__device__ __forceinline__ Lanes<T, kCount> load(const T* data) {
  return *reinterpret_cast<const Lanes<T, kCount>*>(data);
}

template <typename T, int kCount>
__device__ __forceinline__ void store(T* data, const Lanes<T, kCount>& lanes) {
  *reinterpret_cast<Lanes<T, kCount>*>(data) = lanes;
}

// The elements of a tensor from one of them on.
template <typename T>
struct Elements {
  static constexpr bool kMayBeNarrow = sizeof(T) == sizeof(float);
  T* accumulator;
  T* momentum;           // or null
  const void* gradient;  // or null
  void* weight;
  DType gradient_dtype, weight_dtype;

  __device__ Elements(const SdprunTensor& tensor, int64_t offset)
      : accumulator(in_global_memory(static_cast<T*>(tensor.accumulator) + offset)),
        momentum(static_cast<T*>(tensor.momentum)),
        gradient(tensor.gradient),
        weight(static_cast<char*>(tensor.weight) + offset * size_of(tensor.weight_dtype)),
        gradient_dtype(tensor.gradient_dtype),
        weight_dtype(tensor.weight_dtype) {
    if (momentum != nullptr) momentum = in_global_memory(momentum + offset);
    if (gradient != nullptr) {
      gradient = static_cast<const char*>(gradient) + offset * size_of(gradient_dtype);
    }
  }

  static __device__ __forceinline__ int size_of(DType dtype) {
    const bool narrow = dtype == DType::kBFloat16 || dtype == DType::kFloat16;
    return narrow ? sizeof(uint16_t) : sizeof(T);
  }

  // How many come before the first one where vectors of them may begin; no such place if the
  // tensors' differ.
  __device__ __forceinline__ int head() const {
    constexpr int kLanes = kVectorLanes<T>;
    const int past = past_boundary(accumulator, sizeof(T));
    bool agree = past_boundary(weight, size_of(weight_dtype)) == past;
    if (momentum != nullptr) agree &= past_boundary(momentum, sizeof(T)) == past;
    if (gradient != nullptr) agree &= past_boundary(gradient, size_of(gradient_dtype)) == past;
    return agree ? (kLanes - past) % kLanes : INT_MAX;
  }

 private:
  static __device__ __forceinline__ int past_boundary(const void* data, int size) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(data) / size % kVectorLanes<T>);
  }
};

template <int kCount, typename Storage, typename T>
__device__ __forceinline__ void widen_lanes(const void* data, int64_t at, Lanes<T, kCount>& lanes) {
  const auto stored = load<kCount>(in_global_memory(static_cast<const Storage*>(data) + at));
  FASTPRUNE_UNROLLED
  for (int i = 0; i < kCount; ++i) lanes.lane[i] = widen(stored.lane[i]);
}

template <int kCount, typename T>
__device__ __forceinline__ Lanes<T, kCount> gradient_lanes(const Elements<T>& e, int64_t at) {
  Lanes<T, kCount> lanes;
  if (!Elements<T>::kMayBeNarrow || e.gradient_dtype == DType::kFloat32) {
    widen_lanes<kCount, T>(e.gradient, at, lanes);
  } else if (e.gradient_dtype == DType::kBFloat16) {
    widen_lanes<kCount, BFloat16>(e.gradient, at, lanes);
  } else {
    widen_lanes<kCount, Float16>(e.gradient, at, lanes);
  }
  return lanes;
}

template <int kCount, typename T>
struct Loaded {
  Lanes<T, kCount> accumulator, momentum, gradient;
};

template <int kCount, typename T>
__device__ __forceinline__ Loaded<kCount, T> load_elements(const Elements<T>& e, int64_t at) {
  Loaded<kCount, T> loaded{};
  loaded.accumulator = load<kCount>(e.accumulator + at);
  if (e.gradient == nullptr) return loaded;
  if (e.momentum != nullptr) loaded.momentum = load<kCount>(e.momentum + at);
  loaded.gradient = gradient_lanes<kCount>(e, at);
  return loaded;
}

// The accumulators after the step, which memory has too.
template <int kCount, typename T>
__device__ __forceinline__ Lanes<T, kCount> step(const Elements<T>& e, int64_t at,
                                                 const Loaded<kCount, T>& loaded,
                                                 const StepNumbers<T>& numbers) {
  Lanes<T, kCount> v = loaded.accumulator, direction;
  if (e.gradient == nullptr) return v;
  FASTPRUNE_UNROLLED
  for (int i = 0; i < kCount; ++i) {
    direction.lane[i] = product(loaded.gradient.lane[i], numbers.gradient_factor);
    if (e.momentum != nullptr) {
      const T kept = product(numbers.momentum, loaded.momentum.lane[i]);
      direction.lane[i] = sum(kept, direction.lane[i]);
    }
    v.lane[i] = fused(direction.lane[i], numbers.minus_lr, v.lane[i]);
  }
  if (e.momentum != nullptr) store(e.momentum + at, direction);
  store(e.accumulator + at, v);
  return v;
}

template <int kCount, typename T>
__device__ __forceinline__ Lanes<T, kCount> step_lanes(const Elements<T>& e, int64_t at,
                                                       const StepNumbers<T>& numbers) {
  return step(e, at, load_elements<kCount>(e, at), numbers);
}

template <int kCount, typename T>
__device__ __forceinline__ void store_weights(const Elements<T>& e, int64_t at,
                                              const Lanes<T, kCount>& weights) {
  if constexpr (Elements<T>::kMayBeNarrow) {
    if (e.weight_dtype != DType::kFloat32) {
      Lanes<uint16_t, kCount> bits;
      FASTPRUNE_UNROLLED
      for (int i = 0; i < kCount; ++i) {
        bits.lane[i] = e.weight_dtype == DType::kBFloat16 ? narrowed<BFloat16>(weights.lane[i]).bits
                                                          : narrowed<Float16>(weights.lane[i]).bits;
      }
      store(in_global_memory(static_cast<uint16_t*>(e.weight) + at), bits);
      return;
    }
  }
  store(in_global_memory(static_cast<T*>(e.weight) + at), weights);
}

// What makes the weights of a group of its accumulators.
template <typename T>
struct Shrinkage {
  bool pruned;
  T factor;

  __device__ Shrinkage(double norm, double threshold)
      : pruned(is_pruned(norm, threshold)), factor(static_cast<T>(group_factor(norm, threshold))) {}

  template <int kCount>
  __device__ __forceinline__ Lanes<T, kCount> weights(Lanes<T, kCount> v) const {
    FASTPRUNE_UNROLLED
    for (int i = 0; i < kCount; ++i) v.lane[i] = pruned ? T{0} : product(v.lane[i], factor);
    return v;
  }
};

// Calls visit(index, how many elements from there on, as a constant): vectors from `head` on,
// single elements elsewhere. With the same head and thread it is always the same elements.
template <int kLanes, typename Visit>
__device__ __forceinline__ void visit_lanes(int thread, int num_threads, int size, int head,
                                            Visit visit) {
  head = head < size ? head : size;
  const int num_vectors = (size - head) / kLanes;
  FASTPRUNE_ROLLED
  for (int v = thread; v < num_vectors; v += num_threads) {
    visit(head + v * kLanes, std::integral_constant<int, kLanes>{});
  }
  const int num_single = size - num_vectors * kLanes;
  FASTPRUNE_ROLLED
  for (int i = thread; i < num_single; i += num_threads) {
    visit(i >= head ? i + num_vectors * kLanes : i, std::integral_constant<int, 1>{});
  }
}

}  // namespace fastprune
