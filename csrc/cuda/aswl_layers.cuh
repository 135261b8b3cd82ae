#pragma once
// What the kernels of ASWL's step share.
#include "cuda/aswl.h"
#include "cuda/select.h"
#include "cuda/selection.cuh"

namespace fastprune {

// Layers have slots, those of doubles behind those of floats: they are selected apart.
struct AswlLayer {
  int64_t weight_size, pool_size;
  int64_t first_candidate, max_candidates;  // among those of its type
  int64_t number;                           // its row of the attention
  int32_t first_tensor, end_tensor;         // in the table of runs
};

// The runs of a tensor of a layer; none if it does not carry the attention.
struct AswlRuns {
  int64_t first, count;
};

// What one pass over a layer found around the last threshold.
struct AswlCounts {
  Count above, inside;
  Count complement;  // of the smallest key: cleared memory is the largest
};

// Keys of new weights around the last threshold, both ends included. Most steps move it by less
// than the margin; then they and the number of keys above them tell the new one.
template <typename Key>
struct AswlBracket {
  Key low, high;

  __device__ explicit AswlBracket(Key key) {
    constexpr int kMantissa = sizeof(Key) == sizeof(float) ? 23 : 52;
    constexpr Key kMargin = Key{1} << (kMantissa - 5);  // a 32nd of a power of two
    low = key - (key < kMargin ? key : kMargin);
    high = key + kMargin;
  }
};

// Memory of one step that its kernels share.
struct AswlWork {
  const AswlLayer* layers;  // by slot
  const AswlRuns* runs;
  int64_t num_layers;
  double total_size;  // of all layers' weights
  double* run_sums;
  double* inner;  // <gradient, kept weights>, by layers' numbers as the next two
  double* terms;
  double* slopes;
  AswlCounts* counts;  // by slot, as the next three
  int64_t* num_kept;
  int64_t* num_ties;
  int64_t* tie_end;
  int32_t* non_finite;  // nobody looks at it
};

// What layers of one type have beside. Their numbers from the first slot on are segments.
template <typename Key>
struct AswlTyped {
  using Score = typename KeyTraits<Key>::Score;
  int64_t first_slot, num_layers;
  Key* candidates;
  SegmentState<Key>* known;  // by segment, as the next
  Score* threshold;
};

__device__ __forceinline__ bool is_skipped(const AswlNumbers& numbers) {
  return numbers.found_inf != nullptr && *numbers.found_inf != 0;
}

// Adds up the runs and moves the attention; num_kept is known behind it.
void advance_attention(const AswlWork& work, const AswlNumbers& numbers, const AswlState& state,
                       Stream stream);

// The thresholds that the candidates tell.
template <typename Key>
void rank_candidates(const AswlWork& work, const AswlTyped<Key>& typed, const AswlNumbers& numbers,
                     Stream stream);

}  // namespace fastprune
