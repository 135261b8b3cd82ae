// The non-zeros of a layer in the order the kernels read them.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/sparse_conv/kernels.h"
#include "cpu/sparse_conv/memory.h"
#include "cpu/sparse_conv/program.h"

namespace fastprune {
namespace sparse {

// Parts of the blocks, with about equal work, are for threads; panels of the columns, one after the
// other, for the cache. Everything lies in the order in which it is read: part by part, in each
// panel by panel, in each block by block.
struct PackedRows {
  int block;  // outputs that share a list of inputs
  int64_t num_panels;
  Buffer entries;
  std::vector<int64_t> starts;   // of each panel of each part, in entries
  std::vector<int64_t> parts;    // part i has parts[i + 1] - parts[i] blocks
  std::vector<int32_t> lengths;  // of each block of each panel of each part, in entries
  std::vector<int32_t> outputs;  // `block` for each length; -1: none
  std::vector<float> bias;       // likewise
  int64_t num_entries;
};

// The block size that needs least time for this weight: more than 1 if the caller wants blocks, 1
// if rows.
int choose_block(const SparseWeight& weight, int64_t groups, Kernel wanted);

// `panels`: the first column of each panel, and the number of all. `offset(output, column)`: floats
// from the window's first input.
PackedRows pack_rows(const SparseWeight& weight, int block, int64_t num_parts,
                     const std::vector<int32_t>& panels,
                     const std::function<int32_t(int64_t, int32_t)>& offset);

}  // namespace sparse
}  // namespace fastprune
