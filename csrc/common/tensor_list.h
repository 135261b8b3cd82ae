// A list of tensors as plain data: what the kernels see of it.
#pragma once

#include <cstdint>

#include "common/score_key.h"

namespace fastprune {

// Positions are row-major element numbers; memory order may be another order of the dimensions
// (channels-last). Kernels walk memory and ask for a position only where it matters, at ties.
// Dimensions that are neighbours in both orders count as one: channels-last needs three, any order
// of a 3-d convolution five. The public functions copy what is stranger.
constexpr int kMaxLayoutDims = 5;

struct Layout {
  int32_t rank = 0;                            // 0: memory order is row-major order
  int64_t memory_stride[kMaxLayoutDims] = {};  // descending
  int64_t position_stride[kMaxLayoutDims] = {};
};

FASTPRUNE_INLINE int64_t position_of(const Layout& layout, int64_t offset) {
  if (layout.rank == 0) return offset;
  int64_t position = 0;
  FASTPRUNE_ROLLED
  for (int d = 0; d < layout.rank; ++d) {
    const int64_t index = offset / layout.memory_stride[d];
    position += index * layout.position_stride[d];
    offset -= index * layout.memory_stride[d];
  }
  return position;
}

// The inverse: where the element with a given position lies. A few dimensions, so a plain search
// for the next largest position stride is enough.
FASTPRUNE_INLINE int64_t offset_of(const Layout& layout, int64_t position) {
  if (layout.rank == 0) return position;
  int64_t offset = 0;
  int64_t bound = INT64_MAX;
  FASTPRUNE_ROLLED
  for (int n = 0; n < layout.rank; ++n) {
    int d = -1;
    FASTPRUNE_ROLLED
    for (int e = 0; e < layout.rank; ++e) {
      const bool candidate = layout.position_stride[e] < bound;
      if (candidate && (d < 0 || layout.position_stride[e] > layout.position_stride[d])) d = e;
    }
    bound = layout.position_stride[d];
    const int64_t index = position / bound;
    offset += index * layout.memory_stride[d];
    position -= index * bound;
  }
  return offset;
}

// The layout of a dense tensor; false when it is not dense or has too many dimensions to describe.
inline bool make_layout(const int64_t* sizes, const int64_t* strides, int dims, Layout* layout) {
  int64_t size[kMaxLayoutDims + 1];
  int64_t stride[kMaxLayoutDims + 1];
  int64_t position_stride[kMaxLayoutDims + 1];
  int rank = 0;
  int64_t position = 1;
  // From the last dimension to the first: merge a dimension into the one after it when it
  // continues it in memory.
  for (int d = dims - 1; d >= 0; position *= sizes[d], --d) {
    if (sizes[d] == 0) {
      *layout = Layout{};
      return true;
    }
    if (sizes[d] == 1) continue;
    if (rank > 0 && strides[d] == stride[rank - 1] * size[rank - 1]) {
      size[rank - 1] *= sizes[d];
      continue;
    }
    if (rank == kMaxLayoutDims) return false;
    size[rank] = sizes[d];
    stride[rank] = strides[d];
    position_stride[rank++] = position;
  }
  for (int i = 1; i < rank; ++i) {  // insertion sort by descending memory stride
    for (int j = i; j > 0 && stride[j] > stride[j - 1]; --j) {
      const int64_t held[3] = {size[j], stride[j], position_stride[j]};
      size[j] = size[j - 1], stride[j] = stride[j - 1];
      position_stride[j] = position_stride[j - 1];
      size[j - 1] = held[0], stride[j - 1] = held[1], position_stride[j - 1] = held[2];
    }
  }
  int64_t expected = 1;
  for (int i = rank - 1; i >= 0; expected *= size[i], --i) {
    if (stride[i] != expected) return false;
  }
  *layout = Layout{};
  if (rank <= 1) return true;
  layout->rank = rank;
  for (int i = 0; i < rank; ++i) {
    layout->memory_stride[i] = stride[i];
    layout->position_stride[i] = position_stride[i];
  }
  return true;
}

struct TensorEntry {
  const void* value;
  const void* gradient;  // null unless the score is the saliency
  int64_t numel;
  int64_t first_position;  // of this tensor in its segment: the whole list, or the tensor itself
  int32_t segment;         // which count, threshold and tie end belong to it
  DType dtype;
  DType gradient_dtype;  // as the value, or 16 bits beside a float32 value
  Layout layout;
};

}  // namespace fastprune
