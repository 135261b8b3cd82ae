// What SDprun's operators are given: the same plain data on the CPU and on the GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/score_key.h"

namespace fastprune {

// Memory as [outer, middle, columns, inner]: channel outer * columns + column has the elements
// (middle, inner), in this order. Where `middle` is 1 they follow each other: a row.
struct ChannelLayout {
  int64_t outer, middle, columns, inner;

  FASTPRUNE_INLINE int64_t channels() const { return outer * columns; }
  FASTPRUNE_INLINE int64_t size() const { return middle * inner; }  // elements of a channel
  FASTPRUNE_INLINE int64_t numel() const { return channels() * size(); }
  FASTPRUNE_INLINE bool has_rows() const { return middle == 1; }
  // Where a channel begins; its element (m, d) is m * columns * inner + d further on.
  FASTPRUNE_INLINE int64_t begin(int64_t channel) const {
    return (channel / columns * middle * columns + channel % columns) * inner;
  }
};

// A weight and what belongs to it, all in the weight's layout.
struct SdprunTensor {
  void* accumulator;     // float or double; the weight itself, if it is not pruned, may be its own
  void* momentum;        // as the accumulator, or null: the gradient is the direction
  void* weight;          // as the accumulator, or 16 bits beside float
  const void* gradient;  // likewise; null: accumulator and momentum stay
  int64_t first_group;   // where its channels begin in the norms; negative: not pruned
  ChannelLayout layout;
  int32_t row;  // of settings and progress
  DType dtype, weight_dtype, gradient_dtype;
};

// The layers that are pruned, by the numbers of their tensors: neighbours with channels and of the
// same first group.
inline std::vector<std::vector<size_t>> sdprun_layers(const std::vector<SdprunTensor>& tensors) {
  std::vector<std::vector<size_t>> layers;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const SdprunTensor& tensor = tensors[i];
    if (tensor.first_group < 0 || tensor.layout.channels() == 0) continue;
    const bool continues =
        !layers.empty() && tensors[layers.back()[0]].first_group == tensor.first_group;
    if (!continues) layers.emplace_back();
    layers.back().push_back(i);
  }
  return layers;
}

// Where the norms of a tensor's whole layer are; its own channels may be a part of them.
struct SdprunWhole {
  int64_t first, size;
};

}  // namespace fastprune
