// Between the move of the dense weights and the selection: sums of runs, the attention of all
// layers, and the thresholds of those whose candidates tell it.
#include "common/aswl.h"
#include "cuda/aswl_layers.cuh"

namespace fastprune {
namespace {

// As the lanes of a run are added up, by the threads of one block.
__device__ double sum_of_lanes(double lane, double* lanes) {
  const int thread = threadIdx.x;
  lanes[thread] = lane;
  for (int half = kAswlLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) lanes[thread] += lanes[thread + half];
  }
  __syncthreads();
  const double sum = lanes[0];
  __syncthreads();
  return sum;
}

__global__ void __launch_bounds__(kAswlLanes) sum_runs(AswlWork work, AswlNumbers numbers) {
  __shared__ double lanes[kAswlLanes];
  if (is_skipped(numbers)) return;
  const AswlLayer& layer = work.layers[blockIdx.x];
  double inner = 0;
  for (int32_t t = layer.first_tensor; t < layer.end_tensor; ++t) {
    const AswlRuns runs = work.runs[t];
    if (runs.count == 0) continue;
    double lane = 0;
    for (int64_t i = threadIdx.x; i < runs.count; i += kAswlLanes) {
      lane += work.run_sums[runs.first + i];
    }
    inner += sum_of_lanes(lane, lanes);
  }
  if (threadIdx.x == 0) work.inner[layer.number] = inner;
}

// By one block. Sums over layers are one thread's, in their order.
__global__ void __launch_bounds__(kWalkThreads, 1)
    move_attention(AswlWork work, AswlNumbers numbers, AswlState state) {
  __shared__ double push;
  const AswlSettings s = *numbers.settings;
  const bool skipped = is_skipped(numbers);
  for (int64_t slot = threadIdx.x; slot < work.num_layers; slot += kWalkThreads) {
    const AswlLayer& layer = work.layers[slot];
    const double share = static_cast<double>(layer.weight_size) / work.total_size;
    const double a = state.attention[layer.number].value;
    work.terms[layer.number] = density_term(a, share, s.alpha);
    work.slopes[layer.number] = density_slope(a, share, s.alpha);
  }
  __syncthreads();
  if (threadIdx.x == 0 && !skipped) {
    double density = 0;
    for (int64_t l = 0; l < work.num_layers; ++l) density += work.terms[l];
    AswlGap gap{density - s.target};
    for (int64_t l = 0; l < work.num_layers; ++l) gap.add(state.attention[l], work.slopes[l]);
    double multiplier = *state.multiplier;
    push = advanced_push(multiplier, gap, s);
    *state.multiplier = multiplier;
  }
  __syncthreads();
  for (int64_t slot = threadIdx.x; slot < work.num_layers; slot += kWalkThreads) {
    const AswlLayer& layer = work.layers[slot];
    AswlAttention attention = state.attention[layer.number];
    if (!skipped) {
      advance(attention, work.inner[layer.number], push, work.slopes[layer.number], s);
      state.attention[layer.number] = attention;
    }
    work.num_kept[slot] = num_kept(attention.value, layer.pool_size, s.alpha);
  }
}

constexpr int kRankThreads = 1024;

template <typename Key>
__global__ void __launch_bounds__(kRankThreads, 1)
    rank_layers(AswlWork work, AswlTyped<Key> typed, AswlNumbers numbers) {
  __shared__ uint32_t bins[kBins];
  __shared__ RankScratch<kRankThreads> scratch;
  const int64_t slot = typed.first_slot + blockIdx.x;
  const AswlLayer& layer = work.layers[slot];
  const AswlCounts counts = work.counts[slot];
  const int64_t kept = work.num_kept[slot], inside = counts.inside;
  const int64_t rank = kept - static_cast<int64_t>(counts.above) - 1;
  SegmentState<Key> state{0, 0, 0};
  if (is_skipped(numbers)) {
    state = {0, 1, 1};  // nobody looks at it
  } else if (kept == layer.pool_size) {
    state = {static_cast<Key>(~counts.complement), 1, 1};
  } else if (rank >= 0 && rank < inside && inside <= layer.max_candidates) {
    state = key_of_rank<ScoreKind::kMagnitude>(typed.candidates + layer.first_candidate, inside,
                                               rank, bins, scratch);
  }
  if (threadIdx.x == 0) typed.known[blockIdx.x] = state;
}

}  // namespace

void advance_attention(const AswlWork& work, const AswlNumbers& numbers, const AswlState& state,
                       Stream stream) {
  const auto grid = static_cast<unsigned>(work.num_layers);
  if (grid == 0) return;
  launch(sum_runs, grid, kAswlLanes, 0, stream, work, numbers);
  launch(move_attention, 1, kWalkThreads, 0, stream, work, numbers, state);
}

template <typename Key>
void rank_candidates(const AswlWork& work, const AswlTyped<Key>& typed, const AswlNumbers& numbers,
                     Stream stream) {
  const auto grid = static_cast<unsigned>(typed.num_layers);
  launch(rank_layers<Key>, grid, kRankThreads, 0, stream, work, typed, numbers);
}

template void rank_candidates(const AswlWork&, const AswlTyped<uint32_t>&, const AswlNumbers&,
                              Stream);
template void rank_candidates(const AswlWork&, const AswlTyped<uint64_t>&, const AswlNumbers&,
                              Stream);

}  // namespace fastprune
