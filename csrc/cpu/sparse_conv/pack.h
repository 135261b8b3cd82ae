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

struct PackedRows {
  int block;  // outputs that share a list of inputs
  Buffer entries;
  std::vector<int64_t> starts;
  std::vector<int32_t> outputs;
  std::vector<float> bias;
  // Ranges of blocks with about equal work, from parts[i] to parts[i + 1].
  std::vector<int64_t> parts;
  int64_t num_entries;
};

// The block size that needs least time for this weight: more than 1 if the caller wants blocks, 1
// if rows.
int choose_block(const SparseWeight& weight, int64_t groups, Kernel wanted);

// `offset(output, column)`: floats from the window's first input.
PackedRows pack_rows(const SparseWeight& weight, int block, int64_t num_parts,
                     const std::function<int32_t(int64_t, int32_t)>& offset);

}  // namespace sparse
}  // namespace fastprune
