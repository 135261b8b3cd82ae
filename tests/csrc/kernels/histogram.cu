#include "cuda/block.cuh"
#include "kernels/histogram.h"

namespace {

using fastprune::BlockScratch;

__global__ void __launch_bounds__(kThreads)
    count_bins_kernel(const unsigned* __restrict__ values, int n, unsigned* __restrict__ counts) {
  __shared__ unsigned in_block[kBins];
  if (threadIdx.x < kBins) in_block[threadIdx.x] = 0;
  __syncthreads();
  for (int first = blockIdx.x * kThreads; first < n; first += gridDim.x * kThreads) {
    const int i = first + threadIdx.x;
    if (i < n) atomicAdd(&in_block[values[i]], 1);
  }
  __syncthreads();
  if (threadIdx.x < kBins) atomicAdd(&counts[threadIdx.x], in_block[threadIdx.x]);
}

__global__ void sum_by_last_block_kernel(const unsigned* __restrict__ values, int n,
                                         unsigned* partial, unsigned* num_finished, unsigned* sum) {
  __shared__ BlockScratch<unsigned, kThreads> scratch;
  __shared__ bool is_last;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const unsigned of_block = fastprune::block_sum(i < n ? values[i] : 0u, scratch);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = of_block;
    __threadfence();  // the partial sum is visible before it is counted as finished
    is_last = atomicAdd(num_finished, 1) == gridDim.x - 1;
    __threadfence();  // and what the others published is visible after
  }
  __syncthreads();
  if (!is_last) return;
  unsigned mine = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) mine += partial[b];
  const unsigned total = fastprune::block_sum(mine, scratch);
  if (threadIdx.x == 0) {
    *sum = total;
    *num_finished = 0;
  }
}

__global__ void reverse_tiles_kernel(const unsigned* __restrict__ values, int n,
                                     unsigned* __restrict__ reversed) {
  FASTPRUNE_DYNAMIC_SHARED(unsigned, tile);
  const int first = blockIdx.x * kThreads;
  const int in_tile = min(n - first, kThreads);
  const int i = threadIdx.x;
  if (i >= in_tile) return;
  tile[i] = values[first + i];
  __syncthreads();
  reversed[first + i] = tile[in_tile - 1 - i];
}

}  // namespace

void count_bins(const unsigned* values, int n, unsigned* counts, int num_blocks,
                fastprune::Stream stream) {
  fastprune::launch(count_bins_kernel, num_blocks, kThreads, 0, stream, values, n, counts);
}

void sum_by_last_block(const unsigned* values, int n, unsigned* partial, unsigned* num_finished,
                       unsigned* sum, int num_blocks, fastprune::Stream stream) {
  fastprune::launch(sum_by_last_block_kernel, num_blocks, kThreads, 0, stream, values, n, partial,
                    num_finished, sum);
}

void reverse_tiles(const unsigned* values, int n, unsigned* reversed, fastprune::Stream stream) {
  const int num_tiles = (n + kThreads - 1) / kThreads;
  fastprune::launch(reverse_tiles_kernel, num_tiles, kThreads, kThreads * sizeof(unsigned), stream,
                    values, n, reversed);
}
