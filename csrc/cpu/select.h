// Exact top-k selection over a list of tensors on the CPU.
#pragma once

#include <cstdint>

#include "common/tensor_list.h"
#include "cpu/parallel.h"

namespace fastprune {

struct Threshold {
  double score;  // NaN when nothing is kept; float32 scores are held exactly
  int64_t num_ties;
  int64_t tie_end;
};

// The num_kept[s] best scores of every segment s. Entries are grouped by segment, in ascending
// order, and each segment has at least one. Returns the non-finite flags of all scores.
int32_t select_threshold(const TensorEntry* entries, int64_t num_entries, ScoreKind kind,
                         const int64_t* num_kept, int64_t num_segments, ParallelFor parallel_for,
                         Threshold* thresholds);

// One byte per element, in the memory order of its tensor: 1 where it belongs to the selection.
void select_masks(const TensorEntry* entries, int64_t num_entries, ScoreKind kind,
                  const Threshold* thresholds, ParallelFor parallel_for, uint8_t* const* masks);

// A weight as rows of outputs: element (o, i, t) lies at o * inputs * taps + i * input_stride +
// t * tap_stride, which covers row-major and channels-last memory.
struct BlockedWeight {
  const void* value;
  const void* gradient;
  DType dtype;
  DType gradient_dtype;
  int64_t outputs, inputs, taps;
  int64_t input_stride, tap_stride;
};

// sums[ob][ib][t] (float, or double for double weights) over blocks of (block_outputs,
// block_inputs), added in the order that the reference defines.
void block_scores(const BlockedWeight& weight, ScoreKind kind, int64_t block_outputs,
                  int64_t block_inputs, ParallelFor parallel_for, void* sums);

}  // namespace fastprune
