// SDprun's update where a channel is strided through memory, in two passes over tiles of channels.
#include "cuda/sdprun_entry.cuh"

namespace fastprune {
namespace {

// Channels of a block. Runs of `inner` elements are short where many channels make a line of
// memory; neighbouring threads have then neighbouring channels, else neighbouring elements.
constexpr int kManyChannels = 8;
constexpr int kFewChannels = 2;
constexpr int64_t kShortRun = 8;

FASTPRUNE_INLINE bool has_short_runs(const ChannelLayout& layout) {
  return layout.inner < kShortRun;
}

// A thread's share of a tile: of one channel the elements of one lane, or of every 32nd one.
template <int kChannels>
struct Share {
  static constexpr int kOwnLanes = kChannels * kSdprunLanes / kWalkThreads;
  static constexpr int kLaneStride = kSdprunLanes / kOwnLanes;
  static constexpr int kBatch = 4;  // elements that are loaded before the first is used
  static_assert(kOwnLanes == 1 || kOwnLanes == kBatch, "a batch is of one lane, or one of each");

  int tile_channel, lane;
  int64_t channel;

  __device__ explicit Share(int64_t chunk) {
    const int thread = threadIdx.x;
    const bool by_element = kOwnLanes == 1;
    tile_channel = by_element ? thread / kSdprunLanes : thread % kChannels;
    lane = by_element ? thread % kSdprunLanes : thread / kChannels;
    channel = chunk * kChannels + tile_channel;
  }

  // Calls visit(offsets in the tensor, negative where there is no element) for each batch.
  template <typename Visit>
  __device__ __forceinline__ void visit_batches(const SdprunEntry& entry, Visit visit) const {
    const ChannelLayout& layout = entry.tensor.layout;
    if (channel >= layout.channels()) return;
    const int64_t begin = layout.begin(channel);
    const int64_t size = layout.size();
    FASTPRUNE_ROLLED
    for (int64_t first = lane; first < size; first += kBatch * kLaneStride) {
      int64_t offsets[kBatch];
      FASTPRUNE_UNROLLED
      for (int n = 0; n < kBatch; ++n) {
        const int64_t i = first + n * kLaneStride;
        const int64_t run = entry.inner.quotient(i);
        const int64_t at = begin + (run * (layout.columns - 1)) * layout.inner + i;
        offsets[n] = i < size ? at : -1;
      }
      visit(offsets);
    }
  }
};

template <typename T, int kChannels>
__device__ __forceinline__ void step_tile(const SdprunEntry& entry, int64_t chunk,
                                          const StepNumbers<T>& numbers,
                                          double (*of_lane)[kSdprunLanes]) {
  using Own = Share<kChannels>;
  const Own own(chunk);
  const Elements<T> elements(entry.tensor, 0);
  double lanes[Own::kOwnLanes] = {};
  own.visit_batches(entry, [&](const int64_t (&offsets)[Own::kBatch]) {
    Loaded<1, T> loaded[Own::kBatch];
    FASTPRUNE_UNROLLED
    for (int n = 0; n < Own::kBatch; ++n) {
      if (offsets[n] >= 0) loaded[n] = load_elements<1>(elements, offsets[n]);
    }
    FASTPRUNE_UNROLLED
    for (int n = 0; n < Own::kBatch; ++n) {
      if (offsets[n] < 0) continue;
      const T v = step<1>(elements, offsets[n], loaded[n], numbers).lane[0];
      double& lane = lanes[n % Own::kOwnLanes];
      lane = plus_square(lane, v);
    }
  });
  FASTPRUNE_UNROLLED
  for (int j = 0; j < Own::kOwnLanes; ++j) {
    of_lane[own.tile_channel][own.lane + j * Own::kLaneStride] = lanes[j];
  }
  __syncthreads();
  const int warp = threadIdx.x / kWarpThreads;
  const int64_t channel = chunk * kChannels + warp;
  if (warp < kChannels && channel < entry.tensor.layout.channels()) {
    const double part = sum_of_lanes(of_lane[warp]);
    if (threadIdx.x % kWarpThreads == 0) entry.parts[channel] = part;
  }
  __syncthreads();  // the next tile writes its lanes
}

template <typename T>
__global__ void __launch_bounds__(kWalkThreads, 2)
    step_tiles(Table<SdprunEntry> table, SdprunNumbers numbers) {
  if (is_skipped(numbers)) return;
  __shared__ double of_lane[kManyChannels][kSdprunLanes];
  const double factor = gradient_factor(numbers);
  walk_chunks(table, [&](const SdprunEntry& entry, int64_t chunk) {
    const StepNumbers<T> step(numbers.settings[entry.tensor.row], factor);
    if (has_short_runs(entry.tensor.layout)) {
      step_tile<T, kManyChannels>(entry, chunk, step, of_lane);
    } else {
      step_tile<T, kFewChannels>(entry, chunk, step, of_lane);
    }
  });
}

template <typename T, int kChannels>
__device__ __forceinline__ void shrink_tile(const SdprunEntry& entry, int64_t chunk,
                                            const SdprunNumbers& numbers, double* norms) {
  using Own = Share<kChannels>;
  const Own own(chunk);
  if (own.channel >= entry.tensor.layout.channels()) return;
  const SdprunEntry* const layer = &entry - entry.member;
  double squares = 0;
  FASTPRUNE_ROLLED
  for (int m = 0; m < entry.num_members; ++m) squares += layer[m].parts[own.channel];
  const double norm = sqrt(squares);
  if (entry.member == 0 && own.lane == 0) norms[entry.tensor.first_group + own.channel] = norm;
  const Shrinkage<T> shrinkage(norm, layer_threshold(entry, numbers));
  const Elements<T> elements(entry.tensor, 0);
  own.visit_batches(entry, [&](const int64_t (&offsets)[Own::kBatch]) {
    Lanes<T, 1> v[Own::kBatch] = {};
    FASTPRUNE_UNROLLED
    for (int n = 0; n < Own::kBatch; ++n) {
      if (offsets[n] >= 0 && !shrinkage.pruned) v[n] = load<1>(elements.accumulator + offsets[n]);
    }
    FASTPRUNE_UNROLLED
    for (int n = 0; n < Own::kBatch; ++n) {
      if (offsets[n] >= 0) store_weights(elements, offsets[n], shrinkage.weights(v[n]));
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(kWalkThreads, 2)
    shrink_tiles(Table<SdprunEntry> table, SdprunNumbers numbers, double* norms) {
  if (is_skipped(numbers)) return;
  walk_chunks(table, [&](const SdprunEntry& entry, int64_t chunk) {
    if (has_short_runs(entry.tensor.layout)) {
      shrink_tile<T, kManyChannels>(entry, chunk, numbers, norms);
    } else {
      shrink_tile<T, kFewChannels>(entry, chunk, numbers, norms);
    }
  });
}

}  // namespace

void add_column_chunks(std::vector<SdprunEntry>& layer, int64_t& num_chunks) {
  for (SdprunEntry& entry : layer) {
    const ChannelLayout& layout = entry.tensor.layout;
    const int channels = has_short_runs(layout) ? kManyChannels : kFewChannels;
    entry.first_chunk = num_chunks;
    entry.inner = Divisor(layout.inner);
    num_chunks += (layout.channels() + channels - 1) / channels;
  }
}

template <typename T>
void shrink_columns(const Table<SdprunEntry>& table, const SdprunNumbers& numbers, double* norms,
                    int max_blocks, Stream stream) {
  const unsigned blocks = grid_of(table.num_chunks, max_blocks);
  launch(step_tiles<T>, blocks, kWalkThreads, 0, stream, table, numbers);
  launch(shrink_tiles<T>, blocks, kWalkThreads, 0, stream, table, numbers, norms);
}

template void shrink_columns<float>(const Table<SdprunEntry>&, const SdprunNumbers&, double*, int,
                                    Stream);
template void shrink_columns<double>(const Table<SdprunEntry>&, const SdprunNumbers&, double*, int,
                                     Stream);

}  // namespace fastprune
