#pragma once
// What the kernels of SDprun's update know of a tensor, and sums over the lanes of a channel.
#include <vector>

#include "common/divisor.h"
#include "cuda/block.cuh"
#include "cuda/sdprun_step.cuh"

namespace fastprune {

struct SdprunEntry {
  SdprunTensor tensor;
  int64_t first_chunk;
  int64_t group_size;  // of the layer
  double* parts;       // of the squared norms, one for each channel; of strided ones alone
  int64_t place;       // of a row on the chip; negative: the layer's do not fit together
  Divisor inner;
  int32_t layer_row;  // of settings and progress
  int32_t member, num_members;
};

__device__ __forceinline__ double layer_threshold(const SdprunEntry& entry,
                                                  const SdprunNumbers& numbers) {
  return group_threshold(numbers.progress[entry.layer_row], numbers.settings[entry.layer_row],
                         entry.group_size);
}

// The sum of all lanes, of which a thread of the warp has every 32nd one. Every thread gets it.
__device__ __forceinline__ double sum_of_lanes(double lane0, double lane32, double lane64,
                                               double lane96) {
  return warp_reduce<Sum>((lane0 + lane64) + (lane32 + lane96));
}

__device__ __forceinline__ double sum_of_lanes(const double* of_lane) {
  const double* own = of_lane + threadIdx.x % kWarpThreads;
  return sum_of_lanes(own[0], own[32], own[64], own[96]);
}

// Channels that are strided through memory. A first pass steps and measures tiles of them, the
// second makes the weights.
void add_column_chunks(std::vector<SdprunEntry>& layer, int64_t& num_chunks);
template <typename T>
void shrink_columns(const Table<SdprunEntry>& table, const SdprunNumbers& numbers, double* norms,
                    int max_blocks, Stream stream);

}  // namespace fastprune
