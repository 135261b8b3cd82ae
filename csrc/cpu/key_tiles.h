// Scores of tensors as tiles of keys: what every selection kernel on the CPU is composed of.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/tensor_list.h"

namespace fastprune {

constexpr int64_t kTile = 1024;      // keys of a tile: 4 or 8 KB, a part of the first-level cache
constexpr int64_t kChunk = 1 << 14;  // elements of a unit of work
static_assert(kChunk % kTile == 0, "a full chunk is whole tiles");

using FormKeys = void (*)(const void* value, const void* gradient, int64_t offset, int64_t size,
                          void* keys);
// By DType, then a float32 value with a bfloat16 and with a float16 gradient.
using FormKeysByPair = std::array<FormKeys, 6>;

inline int pair_index(DType value, DType gradient) {
  if (value == gradient) return static_cast<int>(value);
  return gradient == DType::kBFloat16 ? 4 : 5;
}

template <typename Key>
struct FilterCounts {
  int64_t above = 0;
  Key largest = 0;
  Key smallest = std::numeric_limits<Key>::max();
};

// The loops that are compiled per instruction set.
template <typename Key>
struct TileFunctions {
  FormKeysByPair form_keys;  // null for types whose keys have the other width
  // Appends the keys in low..high, both included, to `out`, which has room for kFilterSlack more
  // than the tile; returns how many.
  int64_t (*filter)(const Key* keys, int64_t size, Key low, Key high, Key* out,
                    FilterCounts<Key>* counts);
  int64_t (*count_equal)(const Key* keys, int64_t size, Key key);
  void (*mark_above)(const Key* keys, int64_t size, Key threshold, uint8_t* mask);
  void (*mark_from)(const Key* keys, int64_t size, Key threshold, uint8_t* mask);
};
constexpr int64_t kFilterSlack = 16;

// Those of the best instruction set here; defined for uint32_t and uint64_t.
template <typename Key>
TileFunctions<Key> tile_functions(ScoreKind kind);

struct Chunk {
  const TensorEntry* entry;
  int64_t offset;  // in memory order
  int64_t size;
};

inline std::vector<Chunk> chunks_of(const TensorEntry* begin, const TensorEntry* end) {
  int64_t count = 0;
  for (const TensorEntry* e = begin; e != end; ++e) count += (e->numel + kChunk - 1) / kChunk;
  std::vector<Chunk> chunks;
  chunks.reserve(count);
  for (const TensorEntry* e = begin; e != end; ++e) {
    for (int64_t offset = 0; offset < e->numel; offset += kChunk) {
      chunks.push_back({e, offset, std::min(kChunk, e->numel - offset)});
    }
  }
  return chunks;
}

// How many units of work are worth a thread: 64K elements of them. A list of many small tensors is
// one thread's work, however long it is.
inline int64_t grain_of(int64_t units, int64_t elements) {
  constexpr int64_t kWorthwhile = 1 << 16;
  return std::max<int64_t>(1, units * kWorthwhile / std::max<int64_t>(1, elements));
}

// Reads scores as keys and knows what the keys mean.
template <typename Key>
class KeyReader {
 public:
  explicit KeyReader(ScoreKind kind)
      : signed_(kind == ScoreKind::kValue), tile_(tile_functions<Key>(kind)) {}

  const TileFunctions<Key>& tile() const { return tile_; }

  void read(const TensorEntry& entry, int64_t offset, int64_t size, Key* keys) const {
    const int pair = pair_index(entry.dtype, entry.gradient_dtype);
    tile_.form_keys[pair](entry.value, entry.gradient, offset, size, keys);
  }

  // Calls f(keys, size, offset) on the tiles of a chunk.
  template <typename F>
  void for_tiles(const Chunk& chunk, const F& f) const {
    alignas(64) Key keys[kTile];
    for (int64_t done = 0; done < chunk.size; done += kTile) {
      const int64_t size = std::min(kTile, chunk.size - done);
      read(*chunk.entry, chunk.offset + done, size, keys);
      f(static_cast<const Key*>(keys), size, chunk.offset + done);
    }
  }

  Key nan() const { return signed_ ? Signed::kNanKey : Unsigned::kNanKey; }
  int32_t flags(Key key) const {
    return signed_ ? non_finite_flags<ScoreKind::kValue>(key)
                   : non_finite_flags<ScoreKind::kMagnitude>(key);
  }
  bool all_finite(Key smallest, Key largest) const {
    return signed_ ? smallest > Signed::kMinusInfinityKey && largest < Signed::kInfinityKey
                   : largest < Unsigned::kInfinityKey;
  }
  double score(Key key) const {
    return signed_ ? score_of_key<ScoreKind::kValue>(key)
                   : score_of_key<ScoreKind::kMagnitude>(key);
  }
  Key key(double score) const {
    const auto narrow = static_cast<typename KeyTraits<Key>::Score>(score);
    return signed_ ? score_key<ScoreKind::kValue>(narrow)
                   : score_key<ScoreKind::kMagnitude>(narrow);
  }

 private:
  using Signed = KeyOrder<ScoreKind::kValue, Key>;
  using Unsigned = KeyOrder<ScoreKind::kMagnitude, Key>;

  bool signed_;
  TileFunctions<Key> tile_;
};

}  // namespace fastprune
