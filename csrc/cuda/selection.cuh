#pragma once
// What the kernels of select_threshold share: a selection's state, the histogram of one digit of
// the keys, and the search for the n-th of counted things.
#include "cuda/block.cuh"
#include "cuda/select.h"
#include "cuda/tensor_walk.cuh"

namespace fastprune {

using Count = unsigned long long;  // what atomicAdd takes

// Four blocks of count_digit or collect_keys fit a multiprocessor's shared memory and registers.
constexpr int kSelectBlocksPerMultiprocessor = 4;

// ---------------------------------------------------------------- a digit of the keys

constexpr int kDigitBits = 12;
constexpr int kBins = 1 << kDigitBits;

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

FASTPRUNE_INLINE int num_digits(int key_bits) { return (key_bits + kDigitBits - 1) / kDigitBits; }

template <typename Key>
FASTPRUNE_INLINE Digit<Key> digit_of(int index, int key_bits) {
  const int end = key_bits - index * kDigitBits;
  const int shift = end > kDigitBits ? end - kDigitBits : 0;
  const Key above = index == 0 ? Key{0} : static_cast<Key>(~Key{0} << end);
  return {index, shift, (1u << (end - shift)) - 1, above};
}

// A block's histogram. Shared atomics on one bin are serial, and pruned tensors are mostly zeros,
// so each thread counts its zeros in a register.
template <ScoreKind kKind, typename Key>
struct DigitCounter {
  static constexpr Key kZero = KeyOrder<kKind, Key>::kOffset;

  uint32_t* bins;  // a block counts fewer than 2^32 elements of a segment
  Digit<Key> digit;
  Key prefix;
  uint32_t zeros;

  __device__ void count(Key key) {
    if (((key ^ prefix) & digit.above) != 0) return;
    if (key == kZero) {
      ++zeros;
    } else {
      atomicAdd(&bins[digit.bin_of(key)], 1u);
    }
  }
  __device__ void clear() {
    for (int b = threadIdx.x; b < kBins; b += blockDim.x) bins[b] = 0;
    zeros = 0;
    __syncthreads();
  }
  __device__ void complete() {
    if (zeros != 0) atomicAdd(&bins[digit.bin_of(kZero)], zeros);
    __syncthreads();
  }
};

// ---------------------------------------------------------------- the n-th of counted things

struct Found {
  int64_t item;
  int64_t rank;  // within the item
};

template <int kThreads>
struct RankScratch {
  BlockScratch<int64_t, kThreads> scan;
  Found found;
};

// Where the rank-th thing (from 0) is, when item i in 0..num_items holds count_of(i) of them; there
// must be that many. Every thread gets the result.
template <int kThreads, typename CountOf>
__device__ Found find_rank(int64_t num_items, int64_t rank, RankScratch<kThreads>& scratch,
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

// ---------------------------------------------------------------- a selection

// Both ends are keys that were sampled, or no bound at all.
template <typename Key>
struct Bracket {
  Key low;
  Key high;
};

// What one pass over the tensors found. Keys at an end are counted and not collected: where a key
// is so frequent that the candidates could not hold it, above all zero, it is an end.
struct BracketCounts {
  Count above;
  Count at_high;
  Count inside;
  Count at_low;
};

// The keys that the digits are counted of.
enum class Source {
  kTensors,     // all; there is no bracket, or it does not hold the k-th or holds too much
  kCandidates,  // those inside the bracket
  kNone         // the k-th is an end of the bracket, and the counts say all about it
};

template <typename Key>
struct Start {
  Source source;
  SegmentState<Key> state;
};

// Element i * stride, and up to stride - 1 behind it, for i in 0..size; none when size is 0.
struct SamplePlan {
  int64_t size;
  int64_t stride;
};

// The rank-th largest of keys (from 0), found by one block; all threads take part and get it.
// `bins` has room for kBins and may be used again behind a barrier.
template <ScoreKind kKind, typename Key, int kThreads>
__device__ SegmentState<Key> key_of_rank(const Key* keys, int64_t size, int64_t rank,
                                         uint32_t* bins, RankScratch<kThreads>& scratch) {
  constexpr int kBits = KeyOrder<kKind, Key>::kBits;
  constexpr int kLoads = 8;  // in flight: one block has to read all by itself
  Key prefix = 0;
  int64_t last_bin = 0;
  FASTPRUNE_ROLLED
  for (int index = 0; index < num_digits(kBits); ++index) {
    DigitCounter<kKind, Key> counter{bins, digit_of<Key>(index, kBits), prefix, 0};
    counter.clear();
    FASTPRUNE_ROLLED
    for (int64_t first = threadIdx.x; first < size; first += kLoads * kThreads) {
      Key loaded[kLoads];
      FASTPRUNE_UNROLLED
      for (int n = 0; n < kLoads; ++n) loaded[n] = keys[min(first + n * kThreads, size - 1)];
      FASTPRUNE_UNROLLED
      for (int n = 0; n < kLoads; ++n) {
        if (first + n * kThreads < size) counter.count(loaded[n]);
      }
    }
    counter.complete();
    const Found found = find_rank(
        kBins, rank, scratch, [&](int64_t i) { return static_cast<int64_t>(bins[kBins - 1 - i]); });
    last_bin = kBins - 1 - found.item;
    prefix |= static_cast<Key>(last_bin) << counter.digit.shift;
    rank = found.rank;
  }
  return {prefix, rank + 1, static_cast<int64_t>(bins[last_bin])};
}

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
  BracketCounts* counts;
  int32_t* non_finite;
  uint32_t* ties_of_chunk;

  SegmentState<Key>* states;
  const SegmentState<Key>* known;  // null: nothing

  SamplePlan sample;
  Bracket<Key>* bracket;
  Key* candidates;   // before there are any, the sample, which is shorter
  uint32_t* places;  // in memory, of each candidate: its chunk, and where in it
  int64_t max_candidates;

  // How many entries come before a segment.
  __device__ int32_t first_entry(int64_t segment) const {
    int32_t low = 0;
    int32_t high = table.num_entries;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      const bool before = table.entries[middle].tensor.segment < segment;
      low = before ? middle + 1 : low;
      high = before ? high : middle;
    }
    return low;
  }
  __device__ int64_t segment_size(int64_t segment) const {
    if (!segmented) return numel;
    const TensorEntry& last = table.entries[first_entry(segment + 1) - 1].tensor;
    return last.first_position + last.numel;
  }
  __device__ int64_t first_chunk(int64_t segment) const {
    if (!segmented || segment == 0) return 0;
    return segment == num_segments ? table.num_chunks
                                   : table.entries[first_entry(segment)].first_chunk;
  }
  __device__ int64_t end_chunk(int64_t segment) const {
    return segmented ? first_chunk(segment + 1) : table.num_chunks;
  }
  __device__ int64_t kept(int64_t segment) const {
    return min(max(num_kept[segment], int64_t{0}), segment_size(segment));
  }
  __device__ bool is_known(int64_t segment) const {
    return known != nullptr && known[segment].count != 0;
  }
  // Known after the pass that collects: each launch decides for itself, and alike.
  __device__ Source source() const {
    return sample.size == 0 ? Source::kTensors : start_of(0).source;
  }
  __device__ Start<Key> start_of(int64_t segment) const {
    if (is_known(segment)) return {Source::kNone, known[segment]};
    const int64_t num_kept = kept(segment);
    const Start<Key> anew{Source::kTensors, {0, num_kept, segment_size(segment)}};
    if (sample.size == 0) return anew;
    const int64_t at_high = counts->at_high;
    const int64_t inside = counts->inside;
    const int64_t at_low = counts->at_low;
    int64_t rank = num_kept - static_cast<int64_t>(counts->above);
    if (rank < min(num_kept, int64_t{1})) return anew;
    if (rank <= at_high) return {Source::kNone, {bracket->high, rank, at_high}};
    rank -= at_high;
    if (rank <= inside && inside <= max_candidates) return {Source::kCandidates, {0, rank, inside}};
    rank -= inside;
    const bool is_low = rank > 0 && rank <= at_low && bracket->low != bracket->high;
    return is_low ? Start<Key>{Source::kNone, {bracket->low, rank, at_low}} : anew;
  }
  // A place is a number of 32 bits.
  __device__ bool has_places() const {
    return table.num_chunks <= (int64_t{1} << 32) / Chunks<Key>::kSize;
  }
};

SamplePlan sample_plan(int64_t numel);

// How many candidates there is room for.
int64_t candidates_of(SamplePlan sample, int64_t numel);

// Samples the keys, brackets the k-th, and counts and collects in one pass over the tensors.
template <ScoreKind kKind, typename Key>
void collect_candidates(const Selection<Key>& selection, int max_blocks, Stream stream);

}  // namespace fastprune
