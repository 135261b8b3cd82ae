// Boolean masks of a selection that is given by its threshold and the end of its ties.
#include "cuda/limit.cuh"
#include "cuda/select.h"
#include "cuda/tensor_walk.cuh"

namespace fastprune {
namespace {

template <int kLanes>
struct alignas(kLanes) MaskLanes {
  bool lane[kLanes];
};

template <int kLanes>
__device__ __forceinline__ void store_mask(bool* mask, uint32_t kept) {
  if (reinterpret_cast<uintptr_t>(mask) % kLanes == 0) {
    MaskLanes<kLanes> lanes;
    FASTPRUNE_UNROLLED
    for (int i = 0; i < kLanes; ++i) lanes.lane[i] = (kept >> i & 1) != 0;
    *reinterpret_cast<MaskLanes<kLanes>*>(mask) = lanes;
  } else {  // the tensor starts off a 16-byte boundary, the mask never does
    for (int i = 0; i < kLanes; ++i) mask[i] = (kept >> i & 1) != 0;
  }
}

template <ScoreKind kKind, typename Key, typename Score>
__global__ void __launch_bounds__(kWalkThreads, 2)
    mark_kept(Table<WalkEntry> table, const Score* threshold, const int64_t* tie_end) {
  walk_chunks(table, [&](const WalkEntry& entry, int64_t chunk) {
    const TensorEntry& tensor = entry.tensor;
    const Limit<Key> limit =
        limit_of<kKind, Key>(threshold[tensor.segment], tie_end[tensor.segment]);
    const int64_t begin = chunk * Chunks<Key>::kSize;
    visit_keys<kKind, Key>(tensor, chunk, [&](const auto& keys, int first) {
      uint32_t kept = 0;
      uint32_t ties = 0;
      FASTPRUNE_UNROLLED
      for (int i = 0; i < keys.kSize; ++i) {
        kept |= static_cast<uint32_t>(keys.key[i] > limit.key) << i;
        ties |= static_cast<uint32_t>(keys.key[i] == limit.key) << i;
      }
      const int64_t offset = begin + first;
      FASTPRUNE_ROLLED
      for (; ties != 0; ties &= ties - 1) {  // positions cost divisions: for ties alone
        const int i = __ffs(static_cast<int>(ties)) - 1;
        const int64_t position = tensor.first_position + position_of(tensor.layout, offset + i);
        kept |= static_cast<uint32_t>(position < limit.tie_end) << i;
      }
      store_mask<keys.kSize>(entry.mask + offset, kept);
    });
  });
}

}  // namespace

size_t select_masks_scratch(const std::vector<TensorEntry>& tensors) {
  return tensors.size() * sizeof(WalkEntry);
}

void select_masks(const std::vector<TensorEntry>& tensors, ScoreKind kind, const void* threshold,
                  const int64_t* tie_end, const std::vector<bool*>& masks, void* scratch,
                  int max_blocks, Stream stream) {
  auto* const table = static_cast<WalkEntry*>(scratch);
  with_key_and_kind(has_double(tensors), kind, [&](auto key, auto kind_constant) {
    using Key = decltype(key);
    using Score = typename KeyTraits<Key>::Score;
    constexpr ScoreKind kKind = decltype(kind_constant)::value;
    std::vector<WalkEntry> entries = walk_entries<Key>(tensors);
    for (size_t i = 0; i < entries.size(); ++i) entries[i].mask = masks[i];
    upload_table(entries, table, stream);
    const int64_t num_chunks = total_chunks<Key>(entries);
    launch(mark_kept<kKind, Key, Score>, grid_of(num_chunks, max_blocks), kWalkThreads, 0, stream,
           Table<WalkEntry>{table, static_cast<int32_t>(entries.size()), num_chunks},
           static_cast<const Score*>(threshold), tie_end);
  });
}

}  // namespace fastprune
