#pragma once
// What every step of momentum SGD on the GPU is composed of.
#include <cstdint>
#include <type_traits>

#include "common/narrow.h"
#include "common/sgd_tensors.h"
#include "cuda/tensor_walk.cuh"

namespace fastprune {

// Each product and each sum is rounded once, fused where torch fuses, whatever the compiler's
// flags.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

// Differences and signs are formed in double, then rounded, as torch does with its scalars.
template <typename Weight>
struct SgdNumbers {
  Weight gradient_factor, weight_decay, momentum, undamped, minus_lr;
  bool decays, has_momentum, nesterov;

  // `factor` is 1, or one over the loss scale.
  __device__ SgdNumbers(const SgdSettings& s, double factor)
      : gradient_factor(static_cast<Weight>(s.maximize != 0 ? -factor : factor)),
        weight_decay(static_cast<Weight>(s.weight_decay)),
        momentum(static_cast<Weight>(s.momentum)),
        undamped(static_cast<Weight>(1 - s.dampening)),
        minus_lr(static_cast<Weight>(-s.lr)),
        decays(s.weight_decay != 0),
        has_momentum(s.momentum != 0),
        nesterov(s.nesterov != 0) {}
};

// The arithmetic of torch.optim.SGD(foreach=False, fused=False). `step` is the gradient with its
// factor.
template <typename Weight>
__device__ __forceinline__ void sgd_step(const SgdNumbers<Weight>& n, Weight step, Weight& weight,
                                         Weight& momentum) {
  if (n.decays) step = fused(weight, n.weight_decay, step);
  momentum = n.has_momentum ? fused(step, n.undamped, product(n.momentum, momentum)) : step;
  const Weight direction = n.nesterov ? fused(momentum, n.momentum, step) : momentum;
  weight = fused(direction, n.minus_lr, weight);
}

template <int kCount, typename T>
__device__ __forceinline__ Lanes<T, kCount> load(const T* data) {
  return *reinterpret_cast<const Lanes<T, kCount>*>(data);
}

template <typename T, int kCount>
__device__ __forceinline__ void store(T* data, const Lanes<T, kCount>& lanes) {
  *reinterpret_cast<Lanes<T, kCount>*>(data) = lanes;
}

template <int kCount>
__device__ __forceinline__ void store_copy(uint16_t* copy, DType dtype,
                                           const Lanes<float, kCount>& weight) {
  Lanes<uint16_t, kCount> bits;
  FASTPRUNE_UNROLLED
  for (int i = 0; i < kCount; ++i) {
    bits.lane[i] = dtype == DType::kBFloat16 ? narrowed<BFloat16>(weight.lane[i]).bits
                                             : narrowed<Float16>(weight.lane[i]).bits;
  }
  store(copy, bits);
}

// The elements of a chunk.
template <typename Weight, typename Gradient>
struct SgdChunk {
  Weight* weight;
  Weight* momentum;  // or null
  const Gradient* gradient;
  uint16_t* copy;  // or null
  DType copy_dtype;
  int64_t begin;
  int size;

  __device__ SgdChunk(const SgdTensor& tensor, int64_t chunk)
      : weight(static_cast<Weight*>(tensor.weight)),
        momentum(static_cast<Weight*>(tensor.momentum)),
        gradient(static_cast<const Gradient*>(tensor.gradient)),
        copy(static_cast<uint16_t*>(tensor.copy)),
        copy_dtype(tensor.copy_dtype) {
    constexpr int kSize = Chunks<typename ScoreTraits<Weight>::Key>::kSize;
    begin = chunk * kSize;
    const int64_t left = tensor.numel - begin;
    size = left > kSize ? kSize : static_cast<int>(left);
    weight = in_global_memory(weight + begin);
    gradient = in_global_memory(gradient + begin);
    if (momentum != nullptr) momentum = in_global_memory(momentum + begin);
    if (copy != nullptr) copy = in_global_memory(copy + begin);
  }

  // Elements before the first boundary of vectors; all of them if the tensors' boundaries differ.
  template <int kCount>
  __device__ __forceinline__ int head() const {
    const int head = elements_to_boundary<kCount>(weight);
    bool agree = elements_to_boundary<kCount>(gradient) == head;
    if (momentum != nullptr) agree &= elements_to_boundary<kCount>(momentum) == head;
    if (copy != nullptr) agree &= elements_to_boundary<kCount>(copy) == head;
    return agree ? min(head, size) : size;
  }
};

// Calls visit(a constant of how many, index of the first one) for all elements of a chunk, each
// thread with its own: vectors of them between the 16-byte boundaries, single ones elsewhere. The
// loads of one vector are enough in flight, and two vectors at a time would cost registers.
template <typename Weight, typename Gradient, typename Visit>
__device__ __forceinline__ void visit_lanes(const SgdChunk<Weight, Gradient>& data, Visit visit) {
  constexpr int kLanes = kVectorLanes<Weight>;
  const int head = data.template head<kLanes>();
  const int num_vectors = (data.size - head) / kLanes;
  FASTPRUNE_ROLLED
  for (int v = threadIdx.x; v < num_vectors; v += kWalkThreads) {
    visit(std::integral_constant<int, kLanes>{}, head + v * kLanes);
  }
  const int num_single = data.size - num_vectors * kLanes;
  FASTPRUNE_ROLLED
  for (int i = threadIdx.x; i < num_single; i += kWalkThreads) {
    visit(std::integral_constant<int, 1>{}, i >= head ? i + num_vectors * kLanes : i);
  }
}

// Calls use(a value of the gradient's type).
template <typename Weight, typename Tensor, typename Use>
__device__ __forceinline__ void with_gradient_of(const Tensor& tensor, Use use) {
  if constexpr (sizeof(Weight) == sizeof(double)) {
    use(double{});
  } else if (tensor.gradient_dtype == DType::kFloat32) {
    use(float{});
  } else if (tensor.gradient_dtype == DType::kBFloat16) {
    use(BFloat16{});
  } else {
    use(Float16{});
  }
}

}  // namespace fastprune
