#pragma once
// Exact top-k selection over a list of tensors on the GPU. All pointers but the vectors are to
// device memory; nothing is read back, every launch is asynchronous on `stream` and capturable.
// `max_blocks` bounds the grids: a small multiple of the number of multiprocessors.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/tensor_list.h"
#include "cuda/launch.h"

namespace fastprune {

// One number per segment, but for non_finite, which is one for all.
struct SelectionResult {
  void* threshold;  // double for float64 tensors, else float; NaN where nothing is kept
  int64_t* num_ties;
  int64_t* tie_end;
  int32_t* non_finite;
};

template <typename Key>
struct SegmentState {
  Key prefix;       // the digits of the threshold found so far, the others zero
  int64_t residue;  // how many of the elements with this prefix are kept
  int64_t count;    // how many there are
};

// One segment is the whole list, or, when `segmented`, neighbours of the same segment number are
// one, from 0 on. `num_kept` has a count per segment and is clamped to its size. `known` is null or
// has a SegmentState of the tensors' keys per segment: where its count is not 0, its prefix is the
// threshold, and at most the positions of ties are looked for. `scratch` is aligned to 16 bytes.
size_t select_threshold_scratch(const std::vector<TensorEntry>& tensors, bool segmented);
void select_threshold(const std::vector<TensorEntry>& tensors, bool segmented, ScoreKind kind,
                      const int64_t* num_kept, const SelectionResult& result, void* scratch,
                      int max_blocks, Stream stream, const void* known = nullptr);

// masks[i] has the memory order of tensors[i]. threshold and tie_end have one number per segment.
size_t select_masks_scratch(const std::vector<TensorEntry>& tensors);
void select_masks(const std::vector<TensorEntry>& tensors, ScoreKind kind, const void* threshold,
                  const int64_t* tie_end, const std::vector<bool*>& masks, void* scratch,
                  int max_blocks, Stream stream);

// A weight seen as outputs x inputs x kernel positions, in any dense layout.
struct BlockedWeight {
  TensorEntry tensor;
  int64_t outputs;
  int64_t inputs;
  int64_t taps;
  void* sums;  // row-major [ceil(outputs / block), ceil(inputs / block), taps]; float or double
};

size_t block_scores_scratch(const std::vector<BlockedWeight>& weights);
void block_scores(const std::vector<BlockedWeight>& weights, ScoreKind kind, int64_t block_outputs,
                  int64_t block_inputs, void* scratch, int max_blocks, Stream stream);

}  // namespace fastprune
