// The threshold of the next step, and the check that each layer keeps its least number of groups.
#include "common/score_key.h"
#include "cuda/block.cuh"
#include "cuda/sdprun.h"
#include "cuda/sdprun_step.cuh"

namespace fastprune {
namespace {

__global__ void __launch_bounds__(kWalkThreads)
    advance_thresholds(SdprunProgress* progress, const SdprunSettings* settings, int64_t rows,
                       const float* found_inf) {
  if (found_inf != nullptr && *found_inf != 0) return;
  const int64_t row = int64_t{blockIdx.x} * kWalkThreads + threadIdx.x;
  if (row < rows) progress[row] = advanced(progress[row], settings[row]);
}

struct GuardEntry {
  SdprunTensor tensor;
  SdprunWhole whole;
  int64_t first_chunk;  // of the layer's last member: the layer's number
  int64_t group_size;
  int32_t layer_row;
  int32_t member;
};

// A group's place in the order: larger norms come first, NaN the very first, then lower channels.
struct Rank {
  uint64_t key;
  int64_t channel;

  __device__ __forceinline__ bool is_after(const Rank& other) const {
    return key < other.key || (key == other.key && channel > other.channel);
  }
};

using CountScratch = BlockScratch<int64_t, kWalkThreads>;
using KeyScratch = BlockScratch<uint64_t, kWalkThreads>;

// The first group after another one; every thread gets it.
__device__ __forceinline__ Rank next_rank(const double* norms, int64_t size, const Rank& last,
                                          KeyScratch& scratch) {
  Rank own{0, INT64_MAX};
  for (int64_t i = threadIdx.x; i < size; i += kWalkThreads) {
    const Rank rank{score_key<ScoreKind::kMagnitude>(norms[i]), i};
    if (rank.is_after(last) && own.is_after(rank)) own = rank;
  }
  const uint64_t key = block_max<kWalkThreads>(own.key, scratch);
  // The lowest channel is the largest distance from the end.
  const uint64_t distance = own.key == key ? static_cast<uint64_t>(INT64_MAX - own.channel) : 0;
  const uint64_t largest = block_max<kWalkThreads>(distance, scratch);
  return {key, INT64_MAX - static_cast<int64_t>(largest)};
}

template <typename T>
__device__ __forceinline__ void restore_weights(const SdprunTensor& tensor, int64_t channel) {
  const ChannelLayout& layout = tensor.layout;
  const Elements<T> elements(tensor, layout.begin(channel));
  for (int64_t i = threadIdx.x; i < layout.size(); i += kWalkThreads) {
    const int64_t at = i + i / layout.inner * (layout.columns - 1) * layout.inner;
    store_weights(elements, at, load<1>(elements.accumulator + at));
  }
}

// One block for each layer.
__global__ void __launch_bounds__(kWalkThreads, 2)
    guard_layers(Table<GuardEntry> table, SdprunNumbers numbers, const double* norms) {
  if (is_skipped(numbers)) return;
  __shared__ CountScratch counts;
  __shared__ KeyScratch keys;
  walk_chunks(table, [&](const GuardEntry& last, int64_t) {
    const SdprunSettings& settings = numbers.settings[last.layer_row];
    const double threshold =
        group_threshold(numbers.progress[last.layer_row], settings, last.group_size);
    const double* const whole = norms + last.whole.first;
    int64_t kept = 0;
    for (int64_t i = threadIdx.x; i < last.whole.size; i += kWalkThreads) {
      kept += is_pruned(whole[i], threshold) ? 0 : 1;
    }
    kept = block_sum<kWalkThreads>(kept, counts);
    if (static_cast<double>(kept) >= settings.min_groups) return;
    Rank rank{UINT64_MAX, -1};  // before all others
    for (int64_t n = 0; n < last.whole.size && static_cast<double>(n) < settings.min_groups; ++n) {
      rank = next_rank(whole, last.whole.size, rank, keys);
      const int64_t channel = rank.channel - (last.tensor.first_group - last.whole.first);
      if (channel < 0 || channel >= last.tensor.layout.channels()) continue;  // another process's
      for (const GuardEntry* entry = &last - last.member; entry <= &last; ++entry) {
        if (entry->tensor.dtype == DType::kFloat64) {
          restore_weights<double>(entry->tensor, channel);
        } else {
          restore_weights<float>(entry->tensor, channel);
        }
      }
    }
  });
}

std::vector<GuardEntry> guard_entries(const std::vector<SdprunTensor>& tensors,
                                      const std::vector<SdprunWhole>& wholes,
                                      const std::vector<std::vector<size_t>>& layers) {
  std::vector<GuardEntry> entries;
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const std::vector<size_t>& members = layers[layer];
    const SdprunTensor& first = tensors[members[0]];
    int64_t group_size = 0;
    for (const size_t i : members) group_size += tensors[i].layout.size();
    for (size_t member = 0; member < members.size(); ++member) {
      entries.push_back({tensors[members[member]], wholes[members[0]], static_cast<int64_t>(layer),
                         group_size, first.row, static_cast<int32_t>(member)});
    }
  }
  return entries;
}

}  // namespace

void sdprun_threshold(SdprunProgress* progress, const SdprunSettings* settings, int64_t rows,
                      const float* found_inf, Stream stream) {
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>((rows - 1) / kWalkThreads + 1);
  launch(advance_thresholds, blocks, kWalkThreads, 0, stream, progress, settings, rows, found_inf);
}

size_t sdprun_guard_scratch(const std::vector<SdprunTensor>& tensors) {
  return tensors.size() * sizeof(GuardEntry);
}

void sdprun_guard(const std::vector<SdprunTensor>& tensors, const std::vector<SdprunWhole>& wholes,
                  const SdprunNumbers& numbers, const double* norms, void* scratch, int max_blocks,
                  Stream stream) {
  const std::vector<std::vector<size_t>> layers = sdprun_layers(tensors);
  if (layers.empty()) return;
  const std::vector<GuardEntry> entries = guard_entries(tensors, wholes, layers);
  auto* const memory = static_cast<GuardEntry*>(scratch);
  upload_table(entries, memory, stream);
  const auto num_layers = static_cast<int64_t>(layers.size());
  launch(guard_layers, grid_of(num_layers, max_blocks), kWalkThreads, 0, stream,
         Table<GuardEntry>{memory, static_cast<int32_t>(entries.size()), num_layers}, numbers,
         norms);
}

}  // namespace fastprune
