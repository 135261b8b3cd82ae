// Sums of scores over blocks of (outputs, inputs). The order of the additions is fixed by the
// reference: down the outputs of each column, then along the inputs of the block.
#include <algorithm>
#include <vector>

#include "cpu/isa.h"
#include "cpu/select.h"

namespace fastprune {
namespace {

using AddRow = void (*)(const void* value, const void* gradient, int64_t offset, int64_t size,
                        void* sums);

}  // namespace
}  // namespace fastprune

#define FASTPRUNE_ISA_BODY "cpu/block_scores.inc"
#include "cpu/foreach_isa.h"

namespace fastprune {
namespace {

template <typename Score>
void add_blocks(const BlockedWeight& weight, AddRow add_row, int64_t block_outputs,
                int64_t block_inputs, ParallelFor parallel_for, Score* sums) {
  const int64_t row = weight.inputs * weight.taps;
  const int64_t block_rows = (weight.outputs + block_outputs - 1) / block_outputs;
  const int64_t block_columns = (weight.inputs + block_inputs - 1) / block_inputs;
  parallel_for(block_rows, 1, [&](int64_t first, int64_t last) {
    std::vector<Score> columns(row);
    for (int64_t b = first; b < last; ++b) {
      std::fill(columns.begin(), columns.end(), Score{0});
      const int64_t end = std::min(weight.outputs, (b + 1) * block_outputs);
      for (int64_t o = b * block_outputs; o < end; ++o) {
        add_row(weight.value, weight.gradient, o * row, row, columns.data());
      }
      Score* out = sums + b * block_columns * weight.taps;
      std::fill(out, out + block_columns * weight.taps, Score{0});
      for (int64_t i = 0; i < weight.inputs; ++i) {
        for (int64_t t = 0; t < weight.taps; ++t) {
          out[i / block_inputs * weight.taps + t] +=
              columns[i * weight.input_stride + t * weight.tap_stride];
        }
      }
    }
  });
}

}  // namespace

void block_scores(const BlockedWeight& weight, ScoreKind kind, int64_t block_outputs,
                  int64_t block_inputs, ParallelFor parallel_for, void* sums) {
  const AddRow add_row =
      FASTPRUNE_FOR_ISA(best_isa(), choose_add_row)(kind, weight.dtype, weight.gradient_dtype);
  if (weight.dtype == DType::kFloat64) {
    add_blocks(weight, add_row, block_outputs, block_inputs, parallel_for,
               static_cast<double*>(sums));
  } else {
    add_blocks(weight, add_row, block_outputs, block_inputs, parallel_for,
               static_cast<float*>(sums));
  }
}

}  // namespace fastprune
