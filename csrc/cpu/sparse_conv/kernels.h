// The loops of sparse convolutions, compiled once per instruction set, and the work they take.
// Pointers to activations are aligned to a vector and planes are whole vectors.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/sparse_conv/gather.h"
#include "cpu/sparse_conv/program.h"

namespace fastprune {
namespace sparse {

constexpr int64_t kAlignment = 64;  // bytes: the longest vector
constexpr int kMostVectors = 8;     // pixels of an output that are summed at a time, in vectors
constexpr int kBlockSizes[] = {1, 2, 4};  // outputs that share a list of inputs
constexpr int kNumBlockSizes = 3;

// A kept column of a block of B outputs.
template <int B>
struct Entry {
  int32_t offset;  // floats from the window's first input
  float values[B];
};

// What blocks of outputs get from one panel of inputs, at one tile of pixels.
struct RowWork {
  const float* input;
  float* output;
  const float* residual;   // or null
  int64_t channel_stride;  // floats from an output channel to the next one, residual too
  const void* entries;     // Entry<B>, the blocks' one behind the other
  const int32_t* lengths;  // entries of each block
  const int32_t* outputs;  // B for each block; -1: none
  const float* bias;       // B for each block
  int64_t num_blocks;
  bool begins, ends;  // the first panel begins with bias and residual, the last one activates
  Activation activation;
};
using RowKernel = void (*)(const RowWork& work);

// A window slides over a row of the block of each lane.
struct PoolWork {
  const float* input;
  float* output;
  const int64_t* taps;  // floats from the window's first pixel
  int64_t num_taps;
  int64_t vectors;
  const float* divisors;  // of a sum, one per element of the output; null: the maximum
};

struct KernelTable {
  int64_t lanes;
  // By block size and vectors; null where the registers do not suffice.
  RowKernel rows[kNumBlockSizes][kMostVectors + 1];
  void (*gather)(const GatherRow& row, const float* from, float* to, float fill);
  void (*pool)(const PoolWork& work);
  // activation(a * scale + shift + b); b may be null.
  void (*scale_add)(const float* a, float scale, float shift, const float* b, float* to,
                    int64_t vectors, Activation activation);
  // activation(a * gate), where each lane has a gate.
  void (*scale)(const float* a, const float* gate, float* to, int64_t vectors,
                Activation activation);
  // Per lane the sum of those elements whose `kept` is -1; those with 0 may hold anything. `row`:
  // floats from a row of the block to the next one.
  void (*sum)(const float* from, int64_t row, const int32_t* kept, const int64_t* block, float* to);
};

const KernelTable& kernel_table(Isa isa);

}  // namespace sparse
}  // namespace fastprune
