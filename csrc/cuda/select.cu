// The k-th largest score of a list of tensors by radix selection, twelve bits of the key at a time.
//
// count_digit makes a histogram of one digit over the elements that share the digits found so far,
// pick_digit takes the bin that holds the k-th. The first passes read the tensors; one of them also
// keeps the few keys that are still in the running, and the later passes read those. Then the ties
// are cut, where not all are kept. What a launch finds superfluous it skips on the device, so the
// sequence of launches depends on the types and on the length of the list alone.
#include "cuda/block.cuh"
#include "cuda/select.h"
#include "cuda/tensor_walk.cuh"

namespace fastprune {
namespace {

using Count = unsigned long long;  // what atomicAdd takes

constexpr int kThreads = kWalkThreads;

template <typename Key>
struct SelectTraits {
  static constexpr int kDigitBits = 12;
  static constexpr int kBins = 1 << kDigitBits;
  // Twelve bits of a float are its exponent and four bits more: a bin has few elements, and the
  // second pass over the tensors can keep them. A double needs a digit more for that.
  static constexpr int kCollectingDigit = sizeof(Key) == 4 ? 1 : 2;
  // A block's candidates on their way to memory: those of one chunk, and what earlier chunks left.
  static constexpr int kHeld = (24 << 10) / sizeof(Key);
  static constexpr int kHeldBefore = kHeld - Chunks<Key>::kSize;
  // Of normally distributed weights at most 2.1% share a bin, of uniform ones 3.1%.
  static constexpr int kElementsPerCandidate = 32;
  static constexpr int64_t kMinCandidates = 1024;
  static constexpr int kBlocksPerMultiprocessor = 4;

  static_assert(kBins % kThreads == 0, "each thread has its share of the bins");
  static_assert(kHeldBefore > 0, "a chunk of candidates always fits");
  static_assert(kBins * sizeof(uint32_t) + kHeld * sizeof(Key) < (48 << 10) - 1024,
                "static shared memory");
};

// Bits of a key, from `shift` upwards; `above` masks the digits before it.
template <typename Key>
struct Digit {
  int index;
  int shift;
  uint32_t bin_mask;
  Key above;

  __device__ uint32_t bin_of(Key key) const {
    return static_cast<uint32_t>(key >> shift) & bin_mask;
  }
};

template <typename Key>
int num_digits(int key_bits) {
  constexpr int kDigitBits = SelectTraits<Key>::kDigitBits;
  return (key_bits + kDigitBits - 1) / kDigitBits;
}

template <typename Key>
Digit<Key> digit_of(int index, int key_bits) {
  constexpr int kDigitBits = SelectTraits<Key>::kDigitBits;
  const int end = key_bits - index * kDigitBits;
  const int shift = std::max(end - kDigitBits, 0);
  const Key above = index == 0 ? Key{0} : static_cast<Key>(~Key{0} << end);
  return {index, shift, (1u << (end - shift)) - 1, above};
}

template <typename Key>
struct SegmentState {
  Key prefix;       // the digits of the threshold found so far, the others zero
  int64_t residue;  // how many of the elements with this prefix are kept
  int64_t count;    // how many there are
};

// All that the kernels share. A segment is a selection of its own.
template <typename Key>
struct Selection {
  Table<WalkEntry> table;
  const int64_t* num_kept;
  int64_t num_segments;
  int64_t numel;  // of the whole list
  bool segmented;
  SelectionResult result;

  // Cleared before the first launch; pick_digit leaves the bins cleared again.
  Count* bins;
  Count* num_candidates;
  int32_t* non_finite;

  SegmentState<Key>* states;
  Key* candidates;
  int64_t max_candidates;
  uint32_t* ties_of_chunk;

  __device__ int64_t segment_size(int64_t segment) const {
    return segmented ? table.entries[segment].tensor.numel : numel;
  }
  __device__ int64_t first_chunk(int64_t segment) const {
    if (!segmented || segment == 0) return 0;
    return segment == num_segments ? table.num_chunks : table.entries[segment].first_chunk;
  }
  __device__ int64_t end_chunk(int64_t segment) const {
    return segmented ? first_chunk(segment + 1) : table.num_chunks;
  }
  // Whether the candidates are all there is with their prefix, which is known after their pass.
  __device__ bool has_candidates(const Digit<Key>& digit) const {
    return max_candidates != 0 && digit.index > SelectTraits<Key>::kCollectingDigit &&
           *num_candidates <= static_cast<Count>(max_candidates);
  }
};

// ---------------------------------------------------------------- one digit's histogram

template <typename Key, bool kCollects>
struct HeldCandidates {};
template <typename Key>
struct HeldCandidates<Key, true> {
  Key key[SelectTraits<Key>::kHeld];
  int count;
  Count first;  // where they go
};

// A block's histogram. Shared atomics on one bin are serial, and pruned tensors are mostly zeros,
// so each thread counts its zeros in a register.
template <ScoreKind kKind, typename Key>
struct DigitCounter {
  static constexpr Key kZero = KeyOrder<kKind, Key>::kOffset;
  static constexpr int kBins = SelectTraits<Key>::kBins;

  uint32_t* bins;  // a block counts fewer than 2^32 elements of a segment
  Digit<Key> digit;
  Key prefix;
  uint32_t zeros;

  __device__ bool matches(Key key) const { return ((key ^ prefix) & digit.above) == 0; }
  __device__ void count(Key key) {
    if (key == kZero) {
      ++zeros;
    } else {
      atomicAdd(&bins[digit.bin_of(key)], 1u);
    }
  }
  // A thread clears the bins that it has added, so no barrier is needed in between.
  __device__ void clear() {
    for (int b = threadIdx.x; b < kBins; b += kThreads) bins[b] = 0;
    zeros = 0;
    __syncthreads();
  }
  __device__ void add_to(Count* total) {
    if (zeros != 0) atomicAdd(&bins[digit.bin_of(kZero)], zeros);
    __syncthreads();
    for (int b = threadIdx.x; b < kBins; b += kThreads) {
      if (bins[b] != 0) atomicAdd(&total[b], static_cast<Count>(bins[b]));
    }
  }
};

template <typename Key>
__device__ __forceinline__ void hold(Key key, HeldCandidates<Key, true>& held) {
  held.key[atomicAdd(&held.count, 1)] = key;
}

// Writes the held candidates, those that there is room for. All threads of the block take part.
template <typename Key>
__device__ void write_held(HeldCandidates<Key, true>& held, const Selection<Key>& selection) {
  if (threadIdx.x == 0) {
    held.first = atomicAdd(selection.num_candidates, static_cast<Count>(held.count));
  }
  __syncthreads();
  const int64_t room = selection.max_candidates - static_cast<int64_t>(held.first);
  const int count = static_cast<int>(min(max(room, int64_t{0}), int64_t{held.count}));
  for (int i = threadIdx.x; i < count; i += kThreads) {
    selection.candidates[held.first + i] = held.key[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) held.count = 0;
  __syncthreads();
}

template <ScoreKind kKind, typename Key, bool kCollects>
__device__ __forceinline__ void count_chunk(const WalkEntry& entry, int64_t chunk,
                                            DigitCounter<kKind, Key>& counter, int32_t& flags,
                                            HeldCandidates<Key, kCollects>& held) {
  const bool is_first = counter.digit.index == 0;
  visit_keys<kKind, Key>(entry.tensor, chunk, [&](const auto& keys, int) {
    FASTPRUNE_UNROLLED
    for (int i = 0; i < keys.kSize; ++i) {
      const Key key = keys.key[i];
      if (is_first) flags |= non_finite_flags<kKind>(key);
      if (counter.matches(key)) {
        counter.count(key);
        if constexpr (kCollects) hold(key, held);
      }
    }
  });
}

template <ScoreKind kKind, typename Key>
__device__ __forceinline__ void count_candidates(const Selection<Key>& selection,
                                                 DigitCounter<kKind, Key>& counter) {
  const int64_t count = *selection.num_candidates;
  const int64_t stride = int64_t{kThreads} * gridDim.x;
  for (int64_t i = int64_t{kThreads} * blockIdx.x + threadIdx.x; i < count; i += stride) {
    const Key key = selection.candidates[i];
    if (counter.matches(key)) counter.count(key);
  }
}

template <ScoreKind kKind, typename Key, bool kCollects>
__global__ void __launch_bounds__(kThreads, SelectTraits<Key>::kBlocksPerMultiprocessor)
    count_digit(Selection<Key> selection, Digit<Key> digit) {
  constexpr int kBins = SelectTraits<Key>::kBins;
  __shared__ uint32_t bins[kBins];
  __shared__ HeldCandidates<Key, kCollects> held;
  if constexpr (kCollects) {
    if (threadIdx.x == 0) held.count = 0;
  }
  DigitCounter<kKind, Key> counter{bins, digit, 0, 0};
  counter.clear();
  int32_t flags = 0;
  int32_t segment = -1;
  const auto enter = [&](int32_t next) {
    if (segment == next) return;
    if (segment >= 0) {
      counter.add_to(selection.bins + int64_t{segment} * kBins);
      counter.clear();
    }
    segment = next;
    if (digit.index != 0) counter.prefix = selection.states[segment].prefix;
  };

  if (!kCollects && selection.has_candidates(digit)) {
    enter(0);
    count_candidates(selection, counter);
  } else {
    walk_chunks(selection.table, [&](const WalkEntry& entry, int64_t chunk) {
      enter(entry.tensor.segment);
      count_chunk(entry, chunk, counter, flags, held);
      if constexpr (kCollects) {
        __syncthreads();
        const bool full = held.count > SelectTraits<Key>::kHeldBefore;
        __syncthreads();
        if (full) write_held(held, selection);
      }
    });
  }

  if (flags != 0) atomicOr(selection.non_finite, flags);
  if (segment >= 0) counter.add_to(selection.bins + int64_t{segment} * kBins);
  if constexpr (kCollects) {
    if (held.count != 0) write_held(held, selection);
  }
}

// ---------------------------------------------------------------- the n-th of counted items

struct Found {
  int64_t item;
  int64_t rank;  // within the item
};

struct RankScratch {
  BlockScratch<int64_t, kThreads> scan;
  Found found;
};

// Where the rank-th thing (from 0) is, when item i in 0..num_items holds count_of(i) of them; there
// must be that many. Every thread gets the result.
template <typename CountOf>
__device__ Found find_rank(int64_t num_items, int64_t rank, RankScratch& scratch,
                           CountOf count_of) {
  const int64_t share = num_items / kThreads + (num_items % kThreads != 0);
  const int64_t begin = min(share * threadIdx.x, num_items);
  const int64_t end = min(begin + share, num_items);
  int64_t mine = 0;
  for (int64_t i = begin; i < end; ++i) mine += count_of(i);
  const int64_t before = block_exclusive_sum(mine, scratch.scan).prefix;
  if (before <= rank && rank - before < mine) {
    Found found{begin, rank - before};
    for (int64_t c; (c = count_of(found.item)) <= found.rank; ++found.item) found.rank -= c;
    scratch.found = found;
  }
  __syncthreads();
  return scratch.found;  // the next call's scan has barriers before it writes again
}

// Takes the bin that holds the k-th of a segment, counted from the top. Keeping nothing follows the
// digits of NaN, the largest key there is: no key is above it, and the count of ties is right.
template <typename Key>
__global__ void __launch_bounds__(kThreads)
    pick_digit(Selection<Key> selection, Digit<Key> digit, Key nan_key) {
  constexpr int kBins = SelectTraits<Key>::kBins;
  __shared__ RankScratch scratch;
  const int64_t segment = blockIdx.x;
  if (segment >= selection.num_segments) return;
  Count* bins = selection.bins + segment * kBins;
  SegmentState<Key>& state = selection.states[segment];

  Key prefix = 0;
  int64_t residue = 0;
  if (digit.index == 0) {
    const int64_t size = selection.segment_size(segment);
    residue = min(max(selection.num_kept[segment], int64_t{0}), size);
  } else {
    prefix = state.prefix;
    residue = state.residue;
  }
  uint32_t bin = digit.bin_of(nan_key);
  if (residue > 0) {
    const Found found = find_rank(kBins, residue - 1, scratch, [&](int64_t i) {
      return static_cast<int64_t>(bins[kBins - 1 - i]);
    });
    bin = static_cast<uint32_t>(kBins - 1 - found.item);
    residue = found.rank + 1;
  }
  const int64_t count = bins[bin];
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kThreads) bins[b] = 0;
  if (threadIdx.x == 0) {
    prefix |= static_cast<Key>(bin) << digit.shift;
    state = SegmentState<Key>{prefix, residue, count};
  }
}

// ---------------------------------------------------------------- ties and results

template <typename Key>
__device__ bool cuts_ties(const SegmentState<Key>& state) {
  return state.residue < state.count;
}

// Counts the ties in each chunk of positions, of segments that do not keep all of theirs.
template <ScoreKind kKind, typename Key>
__global__ void __launch_bounds__(kThreads, 3) count_ties(Selection<Key> selection) {
  __shared__ BlockScratch<int, kThreads> scratch;
  walk_chunks(selection.table, [&](const WalkEntry& entry, int64_t chunk) {
    const SegmentState<Key> state = selection.states[entry.tensor.segment];
    if (!cuts_ties(state)) return;
    int ties = 0;
    if (entry.tensor.layout.rank == 0) {
      visit_keys<kKind, Key>(entry.tensor, chunk, [&](const auto& keys, int) {
        FASTPRUNE_UNROLLED
        for (int i = 0; i < keys.kSize; ++i) ties += keys.key[i] == state.prefix;
      });
    } else {
      const int size = chunk_size<Key>(entry.tensor, chunk);
      const int64_t begin = chunk * Chunks<Key>::kSize;
      for (int i = threadIdx.x; i < size; i += kThreads) {
        ties += key_at<kKind, Key>(entry.tensor, begin + i) == state.prefix;
      }
    }
    ties = block_sum(ties, scratch);
    if (threadIdx.x == 0) selection.ties_of_chunk[entry.first_chunk + chunk] = ties;
  });
}

// The position of the first tie that is not kept.
template <ScoreKind kKind, typename Key>
__device__ int64_t locate_cut(const Selection<Key>& selection, int64_t segment,
                              const SegmentState<Key>& state, RankScratch& scratch) {
  const int64_t first = selection.first_chunk(segment);
  const Found in_chunks =
      find_rank(selection.end_chunk(segment) - first, state.residue, scratch,
                [&](int64_t i) { return int64_t{selection.ties_of_chunk[first + i]}; });
  const int64_t chunk = first + in_chunks.item;
  const WalkEntry& entry = selection.table.entries[entry_of_chunk(selection.table, chunk)];
  const int64_t begin = (chunk - entry.first_chunk) * Chunks<Key>::kSize;
  const int size = chunk_size<Key>(entry.tensor, chunk - entry.first_chunk);
  const Found in_chunk = find_rank(size, in_chunks.rank, scratch, [&](int64_t i) {
    return int64_t{key_at<kKind, Key>(entry.tensor, begin + i) == state.prefix};
  });
  return entry.tensor.first_position + begin + in_chunk.item;
}

template <ScoreKind kKind, typename Key>
__global__ void __launch_bounds__(kThreads, 1) finish_selection(Selection<Key> selection) {
  using Score = typename KeyTraits<Key>::Score;
  __shared__ RankScratch scratch;
  const int64_t segment = blockIdx.x;
  if (blockIdx.x == 0 && threadIdx.x == 0) *selection.result.non_finite = *selection.non_finite;
  if (segment >= selection.num_segments) return;
  const SegmentState<Key> state = selection.states[segment];
  int64_t tie_end = selection.segment_size(segment);
  if (cuts_ties(state)) tie_end = locate_cut<kKind>(selection, segment, state, scratch);
  if (threadIdx.x != 0) return;
  static_cast<Score*>(selection.result.threshold)[segment] = score_of_key<kKind>(state.prefix);
  selection.result.num_ties[segment] = state.residue;
  selection.result.tie_end[segment] = tie_end;
}

// ---------------------------------------------------------------- launches

// Hands out the parts of one allocation; without one it only measures.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* part = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += (count * sizeof(T) + 15) / 16 * 16;
    return part;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

template <typename Key>
struct Plan {
  std::vector<WalkEntry> entries;
  WalkEntry* table;
  Selection<Key> selection;
  size_t cleared_bytes;  // from the beginning of the scratch
  size_t scratch_bytes;

  Plan(const std::vector<TensorEntry>& tensors, bool segmented, void* memory) : selection{} {
    using Traits = SelectTraits<Key>;
    entries = walk_entries<Key>(tensors);
    const int64_t num_chunks = total_chunks<Key>(entries);
    for (const TensorEntry& tensor : tensors) selection.numel += tensor.numel;
    selection.segmented = segmented;
    selection.num_segments = segmented ? tensors.size() : 1;
    // Segments are as short as one tensor: they read their data again.
    if (!segmented) {
      selection.max_candidates =
          std::max(selection.numel / Traits::kElementsPerCandidate, Traits::kMinCandidates);
    }
    Scratch scratch(memory);
    selection.bins = scratch.take<Count>(selection.num_segments * Traits::kBins);
    selection.num_candidates = scratch.take<Count>(1);
    selection.non_finite = scratch.take<int32_t>(1);
    cleared_bytes = scratch.bytes();
    selection.states = scratch.take<SegmentState<Key>>(selection.num_segments);
    selection.candidates = scratch.take<Key>(selection.max_candidates);
    selection.ties_of_chunk = scratch.take<uint32_t>(num_chunks);
    table = scratch.take<WalkEntry>(tensors.size());
    selection.table = {table, static_cast<int32_t>(tensors.size()), num_chunks};
    scratch_bytes = scratch.bytes();
  }
};

template <ScoreKind kKind, typename Key>
void run_selection(const Plan<Key>& plan, void* scratch, int max_blocks, Stream stream) {
  constexpr int kBits = KeyOrder<kKind, Key>::kBits;
  const Selection<Key>& selection = plan.selection;
  const unsigned grid = grid_of(selection.table.num_chunks, max_blocks);
  const unsigned segment_grid = std::max<int64_t>(selection.num_segments, 1);
  fill_zero_async(scratch, plan.cleared_bytes, stream);
  upload_table(plan.entries, plan.table, stream);
  for (int index = 0; index < num_digits<Key>(kBits); ++index) {
    const Digit<Key> digit = digit_of<Key>(index, kBits);
    const bool collects =
        index == SelectTraits<Key>::kCollectingDigit && selection.max_candidates != 0;
    launch(collects ? count_digit<kKind, Key, true> : count_digit<kKind, Key, false>, grid,
           kThreads, 0, stream, selection, digit);
    launch(pick_digit<Key>, segment_grid, kThreads, 0, stream, selection, digit,
           KeyOrder<kKind, Key>::kNanKey);
  }
  launch(count_ties<kKind, Key>, grid, kThreads, 0, stream, selection);
  launch(finish_selection<kKind, Key>, segment_grid, kThreads, 0, stream, selection);
}

}  // namespace

size_t select_threshold_scratch(const std::vector<TensorEntry>& tensors, bool segmented) {
  return has_double(tensors) ? Plan<uint64_t>(tensors, segmented, nullptr).scratch_bytes
                             : Plan<uint32_t>(tensors, segmented, nullptr).scratch_bytes;
}

void select_threshold(const std::vector<TensorEntry>& tensors, bool segmented, ScoreKind kind,
                      const int64_t* num_kept, const SelectionResult& result, void* scratch,
                      int max_blocks, Stream stream) {
  with_key_and_kind(has_double(tensors), kind, [&](auto key, auto kind_constant) {
    using Key = decltype(key);
    Plan<Key> plan(tensors, segmented, scratch);
    plan.selection.num_kept = num_kept;
    plan.selection.result = result;
    run_selection<decltype(kind_constant)::value>(plan, scratch, max_blocks, stream);
  });
}

}  // namespace fastprune
