#pragma once
// The kernels that the simulator's mutation tests are tried on.
#include "cuda/launch.h"

constexpr int kBins = 64;
constexpr int kThreads = 128;

// Adds to counts[kBins], which hold zeros or earlier counts, how often each of values[n] occurs;
// values are below kBins.
void count_bins(const unsigned* values, int n, unsigned* counts, int num_blocks,
                fastprune::Stream stream);

// *sum = the sum of values[n], in one launch: the block that finishes last adds up the partial
// sums. partial has num_blocks elements; *num_finished is zero before, and again after.
void sum_by_last_block(const unsigned* values, int n, unsigned* partial, unsigned* num_finished,
                       unsigned* sum, int num_blocks, fastprune::Stream stream);

// reversed[n] = values[n] in reverse within each tile of kThreads elements; n is any number.
void reverse_tiles(const unsigned* values, int n, unsigned* reversed, fastprune::Stream stream);
