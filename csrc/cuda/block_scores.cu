// Sums of scores over blocks of (outputs, inputs) of a weight, one thread for each sum.
#include <cmath>
#include <utility>

#include "cuda/select.h"
#include "cuda/tensor_walk.cuh"

namespace fastprune {
namespace {

// Columns that a thread adds up side by side: as many inputs as fit a 32-byte sector.
constexpr int kColumns = 8;

// One sum's place among the blocks of a weight; threads count in the order of the weight's memory.
struct BlockAxis {
  int64_t size;
  int64_t divisor;
  int64_t modulus;
  __device__ int64_t of(int64_t thread) const { return thread / divisor % modulus; }
};

struct BlockedEntry {
  TensorEntry tensor;
  void* sums;
  int64_t num_sums;
  int64_t outputs, inputs;
  int64_t output_stride, input_stride;
  BlockAxis rows, columns, taps;
  int64_t first_chunk;
};

__device__ __forceinline__ float rounded_sum(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double rounded_sum(double a, double b) { return __dadd_rn(a, b); }

struct BlockShape {
  int64_t outputs;
  int64_t inputs;
};

// The order is the definition's: down the outputs of each column from zero, then along the inputs
// from zero. Columns are independent, so several are summed at a time.
template <ScoreKind kKind, typename Storage, typename Gradient>
__device__ __forceinline__ auto sum_block(const Storage* value, const Gradient* gradient,
                                          int64_t first, BlockShape size, int64_t output_stride,
                                          int64_t input_stride) {
  using Score = typename ScoreTraits<Storage>::Score;
  Score total = 0;
  for (int64_t i = 0; i < size.inputs; i += kColumns) {
    Score column[kColumns] = {};
    for (int64_t o = 0; o < size.outputs; ++o) {
      FASTPRUNE_UNROLLED
      for (int c = 0; c < kColumns; ++c) {
        if (i + c < size.inputs) {
          const int64_t offset = first + o * output_stride + (i + c) * input_stride;
          const Score score = element_score<kKind>(value, gradient, offset);
          column[c] = rounded_sum(column[c], kKind == ScoreKind::kValue ? score : std::fabs(score));
        }
      }
    }
    FASTPRUNE_UNROLLED
    for (int c = 0; c < kColumns; ++c) {
      if (i + c < size.inputs) total = rounded_sum(total, column[c]);
    }
  }
  return total;
}

template <ScoreKind kKind, typename Key>
__global__ void __launch_bounds__(kWalkThreads, 2)
    sum_blocks(Table<BlockedEntry> table, BlockShape block) {
  walk_chunks(table, [&](const BlockedEntry& entry, int64_t chunk) {
    const int64_t thread = chunk * kWalkThreads + threadIdx.x;
    if (thread >= entry.num_sums) return;
    const int64_t row = entry.rows.of(thread);
    const int64_t column = entry.columns.of(thread);
    const int64_t tap = entry.taps.of(thread);
    const int64_t output = row * block.outputs;
    const int64_t input = column * block.inputs;
    const BlockShape size{min(block.outputs, entry.outputs - output),
                          min(block.inputs, entry.inputs - input)};
    const int64_t first = output * entry.output_stride + input * entry.input_stride +
                          offset_of(entry.tensor.layout, tap);
    const int64_t at = (row * entry.columns.size + column) * entry.taps.size + tap;
    with_storage<kKind, Key>(entry.tensor, [&](const auto* value, const auto* gradient) {
      const auto sum =
          sum_block<kKind>(value, gradient, first, size, entry.output_stride, entry.input_stride);
      static_cast<std::remove_const_t<decltype(sum)>*>(entry.sums)[at] = sum;
    });
  });
}

int64_t num_blocks(int64_t size, int64_t block) { return size / block + (size % block != 0); }

// Neighbouring threads take the sums of neighbouring memory: the axis with the smallest stride
// varies fastest.
void order_threads(BlockedEntry& entry, int64_t tap_stride) {
  std::pair<int64_t, BlockAxis*> axes[] = {{tap_stride, &entry.taps},
                                           {entry.input_stride, &entry.columns},
                                           {entry.output_stride, &entry.rows}};
  std::stable_sort(std::begin(axes), std::end(axes),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  int64_t divisor = 1;
  for (const auto& [stride, axis] : axes) {
    axis->divisor = divisor;
    axis->modulus = axis->size;
    divisor *= axis->size;
  }
  axes[2].second->modulus = INT64_MAX;  // nothing is left for the slowest to wrap into
}

BlockedEntry blocked_entry(const BlockedWeight& weight, BlockShape block, int64_t first_chunk) {
  BlockedEntry entry{};
  entry.tensor = weight.tensor;
  entry.sums = weight.sums;
  entry.outputs = weight.outputs;
  entry.inputs = weight.inputs;
  entry.rows.size = num_blocks(weight.outputs, block.outputs);
  entry.columns.size = num_blocks(weight.inputs, block.inputs);
  entry.taps.size = weight.taps;
  entry.num_sums = entry.rows.size * entry.columns.size * weight.taps;
  // Offsets add up over the axes; an axis of one is never walked along.
  const auto stride = [&](int64_t size, int64_t position) {
    return size > 1 ? offset_of(weight.tensor.layout, position) : 0;
  };
  entry.output_stride = stride(weight.outputs, weight.inputs * weight.taps);
  entry.input_stride = stride(weight.inputs, weight.taps);
  order_threads(entry, stride(weight.taps, 1));
  entry.first_chunk = first_chunk;
  return entry;
}

}  // namespace

size_t block_scores_scratch(const std::vector<BlockedWeight>& weights) {
  return weights.size() * sizeof(BlockedEntry);
}

void block_scores(const std::vector<BlockedWeight>& weights, ScoreKind kind, int64_t block_outputs,
                  int64_t block_inputs, void* scratch, int max_blocks, Stream stream) {
  const BlockShape block{block_outputs, block_inputs};
  std::vector<BlockedEntry> entries;
  int64_t num_chunks = 0;
  for (const BlockedWeight& weight : weights) {
    entries.push_back(blocked_entry(weight, block, num_chunks));
    num_chunks += num_blocks(entries.back().num_sums, kWalkThreads);
  }
  auto* const table = static_cast<BlockedEntry*>(scratch);
  upload_table(entries, table, stream);
  const bool is_double = !weights.empty() && weights[0].tensor.dtype == DType::kFloat64;
  with_key_and_kind(is_double, kind, [&](auto key, auto kind_constant) {
    launch(sum_blocks<decltype(kind_constant)::value, decltype(key)>,
           grid_of(num_chunks, max_blocks), kWalkThreads, 0, stream,
           Table<BlockedEntry>{table, static_cast<int32_t>(entries.size()), num_chunks}, block);
  });
}

}  // namespace fastprune
