// Two keys that the k-th largest most probably lies between, from a sample, and the one pass over
// the tensors that counts what is above and collects what is between. The counts tell whether the
// sample misled; nothing here can make a result wrong.
#include <cmath>

#include "cuda/selection.cuh"

namespace fastprune {
namespace {

constexpr int kThreads = kWalkThreads;

// ---------------------------------------------------------------- the sample

// To this length a list is as quickly read again as sampled. The simulator's lists are short.
#if defined(__CUDACC__)
constexpr int64_t kMinSampled = int64_t{1} << 21;
#else
constexpr int64_t kMinSampled = int64_t{1} << 13;
#endif
constexpr int64_t kMaxSample = int64_t{1} << 16;
// A sampled key costs a read of 64 bytes.
constexpr int64_t kMinSampleStride = 256;

// One key at a pseudo-random place of each stride. Whatever order the data is in, the number of
// sampled keys above any key then varies no more than of independent draws; neighbours, though
// cheaper to read, resemble each other and would promise too much.
__device__ int64_t sampled_element(SamplePlan plan, int64_t i) {
  uint64_t mixed = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u;
  mixed = (mixed ^ mixed >> 32) * 0xd6e8feb86659fd93u;
  mixed = (mixed ^ mixed >> 32) >> 32;
  return i * plan.stride + static_cast<int64_t>(mixed * plan.stride >> 32);
}

// The entry that holds an element of the list: the last one that starts at it or before.
__device__ const WalkEntry& entry_of_element(const Table<WalkEntry>& table, int64_t element) {
  int32_t low = 0;
  int32_t high = table.num_entries - 1;
  while (low < high) {
    const int32_t middle = high - (high - low) / 2;
    const bool starts_later = table.entries[middle].tensor.first_position > element;
    high = starts_later ? middle - 1 : high;
    low = starts_later ? low : middle;
  }
  return table.entries[low];
}

template <ScoreKind kKind, typename Key>
__global__ void __launch_bounds__(kThreads) sample_keys(Selection<Key> selection) {
  const int64_t i = int64_t{kThreads} * blockIdx.x + threadIdx.x;
  if (i >= selection.sample.size) return;
  const int64_t element = sampled_element(selection.sample, i);
  const TensorEntry& tensor = entry_of_element(selection.table, element).tensor;
  with_storage<kKind, Key>(tensor, [&](const auto* value, const auto* gradient) {
    selection.candidates[i] = element_key<kKind>(value, gradient, element - tensor.first_position);
  });
}

// ---------------------------------------------------------------- the bracket

constexpr int kPickThreads = 1024;

constexpr float kSampleDeviations = 3.5f;
constexpr float kRankSlack = 4;  // a normal distribution has too short a tail where few are above

// The rank in the sample, from 0, of one end; without the sample where nothing bounds that end.
__device__ int64_t rank_of_end(int64_t sample_size, float fraction_above, bool is_low) {
  const float middle = static_cast<float>(sample_size) * fraction_above;
  const float margin = kSampleDeviations * sqrtf(middle * (1 - fraction_above)) + kRankSlack;
  return static_cast<int64_t>(is_low ? ceilf(middle + margin) : floorf(middle - margin));
}

// A block for each end. Keeping nothing has a threshold of NaN, the largest key there is.
template <ScoreKind kKind, typename Key>
__global__ void __launch_bounds__(kPickThreads, 1) pick_bracket(Selection<Key> selection) {
  __shared__ uint32_t bins[kBins];
  __shared__ RankScratch<kPickThreads> scratch;
  const bool is_low = blockIdx.x == 0;
  const int64_t kept = selection.kept(0);
  Key key = is_low ? Key{0} : static_cast<Key>(~Key{0});
  if (kept == 0) {
    key = KeyOrder<kKind, Key>::kNanKey;
  } else {
    const float fraction_above = static_cast<float>(kept - 1) / static_cast<float>(selection.numel);
    const int64_t rank = rank_of_end(selection.sample.size, fraction_above, is_low);
    const bool is_bounded = rank >= 0 && rank < selection.sample.size;
    if (is_bounded) {
      key = key_of_rank<kKind>(selection.candidates, selection.sample.size, rank, bins, scratch)
                .prefix;
    }
  }
  if (threadIdx.x == 0) (is_low ? selection.bracket->low : selection.bracket->high) = key;
}

// ---------------------------------------------------------------- the pass over the tensors

// A block's candidates on their way to memory: those of one chunk, and what earlier chunks left.
template <typename Key>
struct HeldCandidates {
  static constexpr int kSize = (36 << 10) / (sizeof(Key) + sizeof(uint32_t));
  static constexpr int kSizeBefore = kSize - Chunks<Key>::kSize;
  static_assert(kSizeBefore > 0, "a chunk of candidates always fits");

  Key key[kSize];
  uint32_t place[kSize];
  int count;
  Count first;  // where they go

  __device__ __forceinline__ void hold(Key candidate, uint32_t where) {
    const int i = atomicAdd(&count, 1);
    key[i] = candidate;
    place[i] = where;
  }
};

// Writes the held candidates, those that there is room for. All threads of the block take part.
template <typename Key>
__device__ void write_held(HeldCandidates<Key>& held, const Selection<Key>& selection) {
  if (threadIdx.x == 0) {
    held.first = atomicAdd(&selection.counts->inside, static_cast<Count>(held.count));
  }
  __syncthreads();
  const int64_t room = selection.max_candidates - static_cast<int64_t>(held.first);
  const int count = static_cast<int>(min(max(room, int64_t{0}), int64_t{held.count}));
  for (int i = threadIdx.x; i < count; i += kThreads) {
    selection.candidates[held.first + i] = held.key[i];
    selection.places[held.first + i] = held.place[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) held.count = 0;
  __syncthreads();
}

template <ScoreKind kKind, typename Key>
struct BracketCounter {
  Bracket<Key> bracket;
  uint32_t above, at_high, at_low;  // a block sees fewer than 2^32 elements
  int32_t flags;

  __device__ __forceinline__ void count(Key key) {
    flags |= non_finite_flags<kKind>(key);
    above += key > bracket.high;
    at_high += key == bracket.high;
    at_low += key == bracket.low;
  }
  __device__ __forceinline__ bool is_inside(Key key) const {
    return key > bracket.low && key < bracket.high;
  }
};

__device__ void add_of_block(Count* total, uint32_t mine,
                             BlockScratch<uint32_t, kThreads>& scratch) {
  const uint32_t sum = block_sum(mine, scratch);
  if (threadIdx.x == 0 && sum != 0) atomicAdd(total, static_cast<Count>(sum));
}

template <ScoreKind kKind, typename Key>
__global__ void __launch_bounds__(kThreads, kSelectBlocksPerMultiprocessor)
    collect_keys(Selection<Key> selection) {
  __shared__ HeldCandidates<Key> held;
  __shared__ BlockScratch<uint32_t, kThreads> scratch;
  if (threadIdx.x == 0) held.count = 0;
  __syncthreads();
  BracketCounter<kKind, Key> counter{*selection.bracket, 0, 0, 0, 0};
  walk_chunks(selection.table, [&](const WalkEntry& entry, int64_t chunk) {
    visit_keys<kKind, Key>(entry.tensor, chunk, [&](const auto& keys, int index) {
      FASTPRUNE_UNROLLED
      for (int i = 0; i < keys.kSize; ++i) {
        const Key key = keys.key[i];
        counter.count(key);
        if (!counter.is_inside(key)) continue;
        const int64_t place = (entry.first_chunk + chunk) * Chunks<Key>::kSize + index + i;
        held.hold(key, static_cast<uint32_t>(place));
      }
    });
    __syncthreads();
    const bool full = held.count > HeldCandidates<Key>::kSizeBefore;
    __syncthreads();
    if (full) write_held(held, selection);
  });
  if (held.count != 0) write_held(held, selection);
  if (counter.flags != 0) atomicOr(selection.non_finite, counter.flags);
  add_of_block(&selection.counts->above, counter.above, scratch);
  add_of_block(&selection.counts->at_high, counter.at_high, scratch);
  add_of_block(&selection.counts->at_low, counter.at_low, scratch);
}

}  // namespace

SamplePlan sample_plan(int64_t numel) {
  const int64_t stride = std::max(kMinSampleStride, (numel + kMaxSample - 1) / kMaxSample);
  const bool is_short = numel < kMinSampled;
  return {is_short ? 0 : numel / stride, stride};
}

// The bracket is widest where half of the keys are above: the deviation is sqrt(size) / 2 there.
// How much a bracket of so many sampled keys holds is random too.
int64_t candidates_of(SamplePlan sample, int64_t numel) {
  if (sample.size == 0) return 0;
  const double size = static_cast<double>(sample.size);
  const double sampled = kSampleDeviations * std::sqrt(size) + 2 * kRankSlack;
  return std::min(numel, static_cast<int64_t>(1.25 * sampled / size * numel));
}

template <ScoreKind kKind, typename Key>
void collect_candidates(const Selection<Key>& selection, int max_blocks, Stream stream) {
  constexpr int64_t kPerBlock = kThreads;
  const unsigned sample_grid = (selection.sample.size + kPerBlock - 1) / kPerBlock;
  const unsigned grid = grid_of(selection.table.num_chunks, max_blocks);
  launch(sample_keys<kKind, Key>, sample_grid, kThreads, 0, stream, selection);
  launch(pick_bracket<kKind, Key>, 2, kPickThreads, 0, stream, selection);
  launch(collect_keys<kKind, Key>, grid, kThreads, 0, stream, selection);
}

template void collect_candidates<ScoreKind::kValue>(const Selection<uint32_t>&, int, Stream);
template void collect_candidates<ScoreKind::kMagnitude>(const Selection<uint32_t>&, int, Stream);
template void collect_candidates<ScoreKind::kSaliency>(const Selection<uint32_t>&, int, Stream);
template void collect_candidates<ScoreKind::kValue>(const Selection<uint64_t>&, int, Stream);
template void collect_candidates<ScoreKind::kMagnitude>(const Selection<uint64_t>&, int, Stream);
template void collect_candidates<ScoreKind::kSaliency>(const Selection<uint64_t>&, int, Stream);

}  // namespace fastprune
