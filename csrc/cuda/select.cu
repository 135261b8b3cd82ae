// The k-th largest score of a list of tensors by radix selection, twelve bits of the key at a time.
//
// count_digit makes a histogram of one digit over the elements that share the digits found so far,
// pick_digit takes the bin that holds the k-th. Of a long list these are the few candidates that
// select_bracket.cu collected in its one pass; where that failed, and of short lists and segments,
// the tensors' elements. Then the ties are cut, where not all are kept. What a launch finds
// superfluous it skips on the device, so the sequence of launches depends on the types and on the
// length of the list alone.
#include "cuda/selection.cuh"

namespace fastprune {
namespace {

constexpr int kThreads = kWalkThreads;

// ---------------------------------------------------------------- one digit's histogram

// What a block adds to the histograms of the segments that it meets, one after another.
template <ScoreKind kKind, typename Key>
struct SegmentCounter {
  const Selection<Key>& selection;
  DigitCounter<kKind, Key> counter;
  int32_t segment;

  __device__ void enter(int32_t next) {
    if (segment == next) return;
    leave();
    counter.clear();
    segment = next;
    if (counter.digit.index != 0) counter.prefix = selection.states[segment].prefix;
  }
  // A thread reads the bins that it clears next, so no barrier is needed in between.
  __device__ void leave() {
    if (segment < 0) return;
    counter.complete();
    Count* total = selection.bins + int64_t{segment} * kBins;
    for (int b = threadIdx.x; b < kBins; b += kThreads) {
      if (counter.bins[b] != 0) atomicAdd(&total[b], static_cast<Count>(counter.bins[b]));
    }
  }
};

template <ScoreKind kKind, typename Key>
__device__ __forceinline__ void count_chunk(const WalkEntry& entry, int64_t chunk,
                                            DigitCounter<kKind, Key>& counter, int32_t& flags) {
  const bool is_first = counter.digit.index == 0;
  visit_keys<kKind, Key>(entry.tensor, chunk, [&](const auto& keys, int) {
    FASTPRUNE_UNROLLED
    for (int i = 0; i < keys.kSize; ++i) {
      const Key key = keys.key[i];
      if (is_first) flags |= non_finite_flags<kKind>(key);
      counter.count(key);
    }
  });
}

// Calls visit(index) for each candidate, with the threads of all blocks.
template <typename Key, typename Visit>
__device__ __forceinline__ void walk_candidates(const Selection<Key>& selection, Visit visit) {
  const int64_t count = selection.counts->inside;
  const int64_t stride = int64_t{kThreads} * gridDim.x;
  for (int64_t i = int64_t{kThreads} * blockIdx.x + threadIdx.x; i < count; i += stride) visit(i);
}

template <ScoreKind kKind, typename Key>
__global__ void __launch_bounds__(kThreads, kSelectBlocksPerMultiprocessor)
    count_digit(Selection<Key> selection, Digit<Key> digit) {
  __shared__ uint32_t bins[kBins];
  const Source source = selection.source();
  if (source == Source::kNone) return;
  SegmentCounter<kKind, Key> block{selection, {bins, digit, 0, 0}, -1};
  if (source == Source::kCandidates) {
    block.enter(0);
    walk_candidates(selection, [&](int64_t i) { block.counter.count(selection.candidates[i]); });
  } else {
    int32_t flags = 0;
    walk_chunks(selection.table, [&](const WalkEntry& entry, int64_t chunk) {
      if (selection.is_known(entry.tensor.segment)) return;
      block.enter(entry.tensor.segment);
      count_chunk(entry, chunk, block.counter, flags);
    });
    if (flags != 0) atomicOr(selection.non_finite, flags);
  }
  block.leave();
}

// Takes the bin that holds the k-th of a segment, counted from the top. Keeping nothing follows the
// digits of NaN, the largest key there is: no key is above it, and the count of ties is right.
template <typename Key>
__global__ void __launch_bounds__(kThreads)
    pick_digit(Selection<Key> selection, Digit<Key> digit, Key nan_key) {
  __shared__ RankScratch<kThreads> scratch;
  const int64_t segment = blockIdx.x;
  if (segment >= selection.num_segments) return;
  Count* bins = selection.bins + segment * kBins;
  SegmentState<Key>& state = selection.states[segment];

  const Start<Key> start = selection.start_of(segment);
  if (start.source == Source::kNone) {
    if (digit.index == 0 && threadIdx.x == 0) state = start.state;
    return;
  }
  const SegmentState<Key> before = digit.index == 0 ? start.state : state;
  uint32_t bin = digit.bin_of(nan_key);
  int64_t residue = before.residue;
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
    const Key prefix = before.prefix | static_cast<Key>(bin) << digit.shift;
    state = SegmentState<Key>{prefix, residue, count};
  }
}

// ---------------------------------------------------------------- ties and results

template <typename Key>
__device__ bool cuts_ties(const SegmentState<Key>& state) {
  return state.residue < state.count;
}

template <ScoreKind kKind, typename Key>
__device__ int ties_in_chunk(const TensorEntry& tensor, int64_t chunk, Key tie) {
  int ties = 0;
  if (tensor.layout.rank == 0) {
    visit_keys<kKind, Key>(tensor, chunk, [&](const auto& keys, int) {
      FASTPRUNE_UNROLLED
      for (int i = 0; i < keys.kSize; ++i) ties += keys.key[i] == tie;
    });
  } else {
    const int size = chunk_size<Key>(tensor, chunk);
    const int64_t begin = chunk * Chunks<Key>::kSize;
    for (int i = threadIdx.x; i < size; i += kThreads) {
      ties += key_at<kKind, Key>(tensor, begin + i) == tie;
    }
  }
  return ties;
}

// The chunk of positions that holds the element with a place in memory.
template <typename Key>
__device__ int64_t position_chunk(const Table<WalkEntry>& table, int64_t place) {
  constexpr int64_t kSize = Chunks<Key>::kSize;
  const WalkEntry& entry = table.entries[entry_of_chunk(table, place / kSize)];
  const int64_t offset = place - entry.first_chunk * kSize;
  return entry.first_chunk + position_of(entry.tensor.layout, offset) / kSize;
}

// Counts the ties in each chunk of positions, of segments that do not keep all of theirs. If they
// are candidates, no others equal them.
template <ScoreKind kKind, typename Key>
__global__ void __launch_bounds__(kThreads, 3) count_ties(Selection<Key> selection) {
  __shared__ BlockScratch<int, kThreads> scratch;
  if (selection.source() == Source::kCandidates && selection.has_places()) {
    const SegmentState<Key> state = selection.states[0];
    if (!cuts_ties(state)) return;
    walk_candidates(selection, [&](int64_t i) {
      if (selection.candidates[i] != state.prefix) return;
      const int64_t chunk = position_chunk<Key>(selection.table, selection.places[i]);
      atomicAdd(&selection.ties_of_chunk[chunk], 1u);
    });
    return;
  }
  walk_chunks(selection.table, [&](const WalkEntry& entry, int64_t chunk) {
    const SegmentState<Key> state = selection.states[entry.tensor.segment];
    if (!cuts_ties(state)) return;
    const int mine = ties_in_chunk<kKind>(entry.tensor, chunk, state.prefix);
    const int ties = block_sum(mine, scratch);
    if (threadIdx.x == 0) selection.ties_of_chunk[entry.first_chunk + chunk] = ties;
  });
}

// The position of the first tie that is not kept.
template <ScoreKind kKind, typename Key>
__device__ int64_t locate_cut(const Selection<Key>& selection, int64_t segment,
                              const SegmentState<Key>& state, RankScratch<kThreads>& scratch) {
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
  __shared__ RankScratch<kThreads> scratch;
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

template <typename Key>
struct Plan {
  std::vector<WalkEntry> entries;
  WalkEntry* table;
  Selection<Key> selection;
  size_t cleared_bytes;  // from the beginning of the scratch
  size_t scratch_bytes;

  Plan(const std::vector<TensorEntry>& tensors, bool segmented, void* memory) : selection{} {
    entries = walk_entries<Key>(tensors);
    const int64_t num_chunks = total_chunks<Key>(entries);
    for (const TensorEntry& tensor : tensors) selection.numel += tensor.numel;
    selection.segmented = segmented;
    selection.num_segments = !segmented ? 1 : tensors.empty() ? 0 : tensors.back().segment + 1;
    selection.sample = sample_plan(segmented ? 0 : selection.numel);
    selection.max_candidates = candidates_of(selection.sample, selection.numel);
    Scratch scratch(memory);
    selection.bins = scratch.take<Count>(selection.num_segments * kBins);
    selection.counts = scratch.take<BracketCounts>(1);
    selection.non_finite = scratch.take<int32_t>(1);
    selection.ties_of_chunk = scratch.take<uint32_t>(num_chunks);
    cleared_bytes = scratch.bytes();
    selection.states = scratch.take<SegmentState<Key>>(selection.num_segments);
    selection.bracket = scratch.take<Bracket<Key>>(1);
    selection.candidates = scratch.take<Key>(selection.max_candidates);
    selection.places = scratch.take<uint32_t>(selection.max_candidates);
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
  if (selection.sample.size != 0) collect_candidates<kKind>(selection, max_blocks, stream);
  for (int index = 0; index < num_digits(kBits); ++index) {
    const Digit<Key> digit = digit_of<Key>(index, kBits);
    launch(count_digit<kKind, Key>, grid, kThreads, 0, stream, selection, digit);
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
                      int max_blocks, Stream stream, const void* known) {
  with_key_and_kind(has_double(tensors), kind, [&](auto key, auto kind_constant) {
    using Key = decltype(key);
    Plan<Key> plan(tensors, segmented, scratch);
    plan.selection.num_kept = num_kept;
    plan.selection.result = result;
    plan.selection.known = static_cast<const SegmentState<Key>*>(known);
    run_selection<decltype(kind_constant)::value>(plan, scratch, max_blocks, stream);
  });
}

}  // namespace fastprune
