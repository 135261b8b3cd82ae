// Scores as unsigned integers in the same order, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTPRUNE_INLINE __host__ __device__ __forceinline__
#define FASTPRUNE_FORCED_INLINE FASTPRUNE_INLINE
#define FASTPRUNE_UNROLLED _Pragma("unroll")
#define FASTPRUNE_ROLLED _Pragma("unroll 1")  // loops of 64-bit divisions are long on a GPU
#else
#define FASTPRUNE_INLINE inline
// For long functions: inside the kernel of an instruction set they are compiled for it.
#define FASTPRUNE_FORCED_INLINE inline __attribute__((always_inline))
#define FASTPRUNE_UNROLLED
#define FASTPRUNE_ROLLED
#endif

namespace fastprune {

enum class ScoreKind : int32_t { kValue, kMagnitude, kSaliency };
enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// What `non_finite` reports.
constexpr int32_t kInfinitySeen = 1;
constexpr int32_t kNanSeen = 2;

template <typename To, typename From>
FASTPRUNE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps every bit");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Storage types of tensors; the 16-bit ones are opaque words, so that no vendor header is needed.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FASTPRUNE_INLINE float widen(float x) { return x; }
FASTPRUNE_INLINE double widen(double x) { return x; }
FASTPRUNE_INLINE float widen(BFloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
FASTPRUNE_INLINE float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // Shifted into place the number is too small by 2^112, subnormals included.
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const bool special = (x.bits & 0x7c00u) == 0x7c00u;
  return bit_cast<float>(sign | (special ? magnitude | 0x7f800000u : finite));
}

// The type a score is formed in, and the integer that orders it.
template <typename Storage>
struct ScoreTraits {
  using Score = float;
  using Key = uint32_t;
};
template <>
struct ScoreTraits<double> {
  using Score = double;
  using Key = uint64_t;
};

template <typename Key>
struct KeyTraits;
template <>
struct KeyTraits<uint32_t> {
  using Score = float;
  static constexpr uint32_t kSign = 0x80000000u;
  static constexpr uint32_t kInfinity = 0x7f800000u;
  static constexpr uint32_t kQuietNan = 0x7fc00000u;
};
template <>
struct KeyTraits<uint64_t> {
  using Score = double;
  static constexpr uint64_t kSign = 0x8000000000000000u;
  static constexpr uint64_t kInfinity = 0x7ff0000000000000u;
  static constexpr uint64_t kQuietNan = 0x7ff8000000000000u;
};

// The order of keys is the order of scores: -0.0 equals +0.0, and every NaN is one key, the one
// after infinity. Scores that are never negative (magnitude, saliency) leave the top bit clear.
template <ScoreKind kKind, typename Key>
struct KeyOrder {
  static constexpr bool kSigned = kKind == ScoreKind::kValue;
  static constexpr Key kOffset = kSigned ? KeyTraits<Key>::kSign : Key{0};
  static constexpr Key kInfinityKey = KeyTraits<Key>::kInfinity | kOffset;
  static constexpr Key kNanKey = kInfinityKey + 1;
  // Only signed scores reach it; all-ones minus infinity's bits, by the flip of negative numbers.
  static constexpr Key kMinusInfinityKey = static_cast<Key>(~(KeyTraits<Key>::kInfinity | kOffset));
  static constexpr int kBits = 8 * sizeof(Key) - (kSigned ? 0 : 1);
};

template <ScoreKind kKind, typename Score>
FASTPRUNE_INLINE auto score_key(Score score) {
  using Key = typename ScoreTraits<Score>::Key;
  using Order = KeyOrder<kKind, Key>;
  constexpr Key kSign = KeyTraits<Key>::kSign;
  if constexpr (!Order::kSigned) {
    const Key magnitude = bit_cast<Key>(score) & ~kSign;
    return magnitude < Order::kNanKey ? magnitude : Order::kNanKey;
  } else {
    const Key bits = bit_cast<Key>(score + Score{0});  // -0.0 becomes +0.0
    const Key key = (bits & kSign) ? ~bits : bits | kSign;
    return (bits & ~kSign) > KeyTraits<Key>::kInfinity ? Order::kNanKey : key;
  }
}

template <ScoreKind kKind, typename Key>
FASTPRUNE_INLINE auto score_of_key(Key key) {
  using Order = KeyOrder<kKind, Key>;
  using Score = typename KeyTraits<Key>::Score;
  constexpr Key kSign = KeyTraits<Key>::kSign;
  if (key >= Order::kNanKey) return bit_cast<Score>(KeyTraits<Key>::kQuietNan);
  if constexpr (!Order::kSigned) return bit_cast<Score>(key);
  return bit_cast<Score>((key & kSign) ? key ^ kSign : ~key);
}

// The score of one element. The product is one rounded multiplication: kernels are compiled without
// contraction, and every pass must see the same bits.
template <ScoreKind kKind, typename Storage, typename Gradient>
FASTPRUNE_INLINE auto element_score(const Storage* value, const Gradient* gradient, int64_t i) {
  if constexpr (kKind == ScoreKind::kSaliency) {
    return widen(value[i]) * widen(gradient[i]);
  } else {
    return widen(value[i]);
  }
}

template <ScoreKind kKind, typename Storage, typename Gradient>
FASTPRUNE_INLINE auto element_key(const Storage* value, const Gradient* gradient, int64_t i) {
  return score_key<kKind>(element_score<kKind>(value, gradient, i));
}

template <ScoreKind kKind, typename Key>
FASTPRUNE_INLINE int32_t non_finite_flags(Key key) {
  using Order = KeyOrder<kKind, Key>;
  if (key == Order::kNanKey) return kNanSeen;
  const bool infinite =
      key == Order::kInfinityKey || (Order::kSigned && key == Order::kMinusInfinityKey);
  return infinite ? kInfinitySeen : 0;
}

}  // namespace fastprune
