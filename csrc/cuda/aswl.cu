// Two passes over the tensors. The first moves the dense weights, adds up gradients times kept
// weights, and counts and collects new weights around the last threshold. Then the attention moves
// and says how many weights each layer keeps. Where the candidates do not tell the threshold, and
// where only some ties are kept, select_threshold reads the layer again. The second pass writes the
// parameters.
#include "cuda/aswl.h"
#include "cuda/aswl_layers.cuh"
#include "cuda/limit.cuh"
#include "cuda/sgd.cuh"

namespace fastprune {
namespace {

// A block's share of a tensor: a run for each warp.
constexpr int kWarps = kWalkThreads / kWarpThreads;
constexpr int kQuad = 4;  // neighbours that are one thread's
constexpr int kLines = kAswlRun / kAswlLanes;
constexpr int kAswlChunk = kWarps * kAswlRun;
static_assert(kAswlLanes == kQuad * kWarpThreads, "a warp holds the lanes of a run");

struct AswlEntry {
  AswlTensor tensor;
  int64_t first_chunk;
  int64_t first_run;
  int64_t slot;  // of the layer; negative: none
};

// ---------------------------------------------------------------- four elements of one thread

template <typename T>
struct Quad {
  T lane[kQuad];
};

// Vectors of at most 16 bytes.
template <typename T>
constexpr int kQuadLanes = kVectorLanes<T> < kQuad ? kVectorLanes<T> : kQuad;

template <typename T>
__device__ __forceinline__ bool is_boundary(const T* data) {
  return data == nullptr || elements_to_boundary<kQuadLanes<T>>(data) == 0;
}

// The first `count` of them; the others are 0.
template <typename T>
__device__ __forceinline__ Quad<T> load_quad(const T* data, int count, bool in_vectors) {
  Quad<T> quad{};
  if (in_vectors && count == kQuad) {
    FASTPRUNE_UNROLLED
    for (int i = 0; i < kQuad; i += kQuadLanes<T>) {
      const auto lanes = load<kQuadLanes<T>>(data + i);
      FASTPRUNE_UNROLLED
      for (int j = 0; j < kQuadLanes<T>; ++j) quad.lane[i + j] = lanes.lane[j];
    }
    return quad;
  }
  FASTPRUNE_UNROLLED
  for (int i = 0; i < kQuad; ++i) {
    if (i < count) quad.lane[i] = data[i];
  }
  return quad;
}

template <typename T>
__device__ __forceinline__ void store_quad(T* data, const Quad<T>& quad, int count,
                                           bool in_vectors) {
  if (in_vectors && count == kQuad) {
    FASTPRUNE_UNROLLED
    for (int i = 0; i < kQuad; i += kQuadLanes<T>) {
      Lanes<T, kQuadLanes<T>> lanes;
      FASTPRUNE_UNROLLED
      for (int j = 0; j < kQuadLanes<T>; ++j) lanes.lane[j] = quad.lane[i + j];
      store(data + i, lanes);
    }
    return;
  }
  FASTPRUNE_UNROLLED
  for (int i = 0; i < kQuad; ++i) {
    if (i < count) data[i] = quad.lane[i];
  }
}

// A bit for each of the elements that a selection keeps.
template <typename Value>
class KeptBits {
 public:
  using Key = typename ScoreTraits<Value>::Key;

  __device__ KeptBits(const AswlTensor& tensor, Value threshold, int64_t tie_end)
      : tensor_(tensor), limit_{score_key<ScoreKind::kMagnitude>(threshold), tie_end} {}

  __device__ __forceinline__ uint32_t of(const Quad<Value>& value, int64_t offset,
                                         int count) const {
    uint32_t kept = 0, ties = 0;
    FASTPRUNE_UNROLLED
    for (int i = 0; i < kQuad; ++i) {
      const Key key = score_key<ScoreKind::kMagnitude>(value.lane[i]);
      kept |= static_cast<uint32_t>(key > limit_.key) << i;
      ties |= static_cast<uint32_t>(key == limit_.key) << i;
    }
    ties &= (1u << count) - 1;
    FASTPRUNE_ROLLED
    for (; ties != 0; ties &= ties - 1) {  // positions cost divisions: for ties alone
      const int i = __ffs(static_cast<int>(ties)) - 1;
      const int64_t position = tensor_.position + position_of(tensor_.layout, offset + i);
      kept |= static_cast<uint32_t>(position < limit_.tie_end) << i;
    }
    return kept;
  }

 private:
  const AswlTensor& tensor_;
  Limit<Key> limit_;
};

__device__ __forceinline__ int count_from(int64_t offset, int64_t numel) {
  const int64_t left = numel - offset;
  return left >= kQuad ? kQuad : left > 0 ? static_cast<int>(left) : 0;
}

// ---------------------------------------------------------------- the first pass

// What a block finds in a chunk.
template <typename Key>
struct Held {
  Key key[kAswlChunk];
  int count;
  unsigned above;
  Count complement;
  Count first;  // where the candidates go
};

// Candidates of one thread's elements go to the block's.
template <typename Key>
struct Collector {
  Held<Key>& held;
  AswlBracket<Key> bracket;
  unsigned above = 0;
  Key smallest = ~Key{0};

  template <typename Value>
  __device__ __forceinline__ void add(const Quad<Value>& value, int count) {
    FASTPRUNE_UNROLLED
    for (int i = 0; i < kQuad; ++i) {
      const Key key = score_key<ScoreKind::kMagnitude>(value.lane[i]);
      const bool is_there = i < count;
      above += is_there && key > bracket.high;
      smallest = is_there && key < smallest ? key : smallest;
      if (is_there && key >= bracket.low && key <= bracket.high) {
        held.key[atomicAdd(&held.count, 1)] = key;
      }
    }
  }
};

// Adds what all threads of a block found to the layer's. All of them take part.
template <typename Key>
__device__ void add_held(const Collector<Key>& own, const AswlLayer& layer, AswlCounts& counts,
                         Key* candidates) {
  Held<Key>& held = own.held;
  const unsigned above = warp_reduce<Sum>(own.above);
  const Count complement = warp_reduce<Max>(~static_cast<Count>(own.smallest));
  if (threadIdx.x % kWarpThreads == 0) {
    atomicAdd(&held.above, above);
    atomicMax(&held.complement, complement);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    held.first = atomicAdd(&counts.inside, static_cast<Count>(held.count));
    atomicAdd(&counts.above, static_cast<Count>(held.above));
    atomicMax(&counts.complement, held.complement);
  }
  __syncthreads();
  const int64_t room = layer.max_candidates - static_cast<int64_t>(held.first);
  const int count = static_cast<int>(min(max(room, int64_t{0}), int64_t{held.count}));
  for (int i = threadIdx.x; i < count; i += kWalkThreads) {
    candidates[layer.first_candidate + held.first + i] = held.key[i];
  }
  __syncthreads();
}

// Halves of a run's lanes are added to each other; every thread of the warp gets the sum.
__device__ __forceinline__ double sum_of_run(const double (&lane)[kQuad]) {
  double sum[kQuad];
  FASTPRUNE_UNROLLED
  for (int i = 0; i < kQuad; ++i) sum[i] = warp_reduce<Sum>(lane[i]);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

__device__ __forceinline__ double wide_product(float a, float b) {
  return __dmul_rn(static_cast<double>(a), static_cast<double>(b));
}
__device__ __forceinline__ double wide_product(double a, double b) { return __dmul_rn(a, b); }

template <typename Value>
struct Motion {
  SgdNumbers<Value> sgd;
  Value attention, decay;
  bool decays;

  __device__ Motion(const AswlTensor& t, const AswlSettings& s, double attention, double factor)
      : sgd(SgdSettings{s.lr, t.momentum == nullptr ? 0 : s.momentum, 0, 0, 0, 0}, factor),
        attention(static_cast<Value>(t.is_scaled ? attention : 1)),
        decay(static_cast<Value>(2 * s.l2)),
        decays(t.position >= 0 && s.l2 != 0) {}
};

// The elements of one tensor that one thread moves.
template <typename Value, typename Gradient>
struct Mover {
  Value* dense;
  Value* momentum;  // or null
  const Gradient* gradient;
  bool in_vectors;

  __device__ explicit Mover(const AswlTensor& t)
      : dense(in_global_memory(static_cast<Value*>(t.dense))),
        momentum(static_cast<Value*>(t.momentum)),
        gradient(in_global_memory(static_cast<const Gradient*>(t.gradient))) {
    if (momentum != nullptr) momentum = in_global_memory(momentum);
    in_vectors = is_boundary(dense) && is_boundary(momentum) && is_boundary(gradient);
  }

  // Adds gradients times kept weights to the lanes; returns the new weights.
  __device__ __forceinline__ Quad<Value> move(const Motion<Value>& motion,
                                              const KeptBits<Value>* kept_bits, int64_t offset,
                                              int count, double (&lane)[kQuad]) const {
    Quad<Value> w = load_quad(dense + offset, count, in_vectors);
    Quad<Value> z{};
    if (momentum != nullptr) z = load_quad(momentum + offset, count, in_vectors);
    const Quad<Gradient> gradients = load_quad(gradient + offset, count, in_vectors);
    const uint32_t kept = kept_bits == nullptr ? ~0u : kept_bits->of(w, offset, count);
    FASTPRUNE_UNROLLED
    for (int i = 0; i < kQuad; ++i) {
      const Value g =
          product(static_cast<Value>(widen(gradients.lane[i])), motion.sgd.gradient_factor);
      const bool is_kept = (kept >> i & 1) != 0;
      const Value shown = is_kept ? w.lane[i] : Value{0};
      // Selected, not multiplied: NaN times 0 would be NaN.
      lane[i] = __dadd_rn(lane[i], wide_product(is_kept ? g : Value{0}, shown));
      Value step = product(g, motion.attention);
      if (motion.decays) step = fused(shown, motion.decay, step);
      sgd_step(motion.sgd, step, w.lane[i], z.lane[i]);
    }
    store_quad(dense + offset, w, count, in_vectors);
    if (momentum != nullptr) store_quad(momentum + offset, z, count, in_vectors);
    return w;
  }
};

template <typename Value>
__global__ void __launch_bounds__(kWalkThreads, 2)
    move_dense(Table<AswlEntry> table, AswlWork work,
               AswlTyped<typename ScoreTraits<Value>::Key> typed, AswlNumbers numbers,
               AswlState state) {
  using Key = typename ScoreTraits<Value>::Key;
  __shared__ Held<Key> held;
  if (is_skipped(numbers)) return;
  const double factor =
      numbers.grad_scale == nullptr ? 1 : 1 / static_cast<double>(*numbers.grad_scale);
  const int warp = threadIdx.x / kWarpThreads, in_warp = threadIdx.x % kWarpThreads;
  walk_chunks(table, [&](const AswlEntry& entry, int64_t chunk) {
    const AswlTensor& tensor = entry.tensor;
    const bool is_layer = entry.slot >= 0, is_pruned = tensor.position >= 0;
    AswlAttention attention{1, 0, 0};
    if (is_layer) attention = state.attention[tensor.layer];
    const KeptBits<Value> kept_bits(tensor, static_cast<Value>(attention.threshold),
                                    is_pruned ? state.tie_end[tensor.layer] : 0);
    const Motion<Value> motion(tensor, *numbers.settings, attention.value, factor);
    if (is_pruned && threadIdx.x == 0) {
      held.count = 0;
      held.above = 0;
      held.complement = 0;
    }
    __syncthreads();
    Collector<Key> collector{held, AswlBracket<Key>(score_key<ScoreKind::kMagnitude>(
                                       static_cast<Value>(attention.threshold)))};
    const int64_t begin = chunk * kAswlChunk + warp * kAswlRun;
    double lane[kQuad] = {};
    with_gradient_of<Value>(tensor, [&](auto of_type) {
      const Mover<Value, decltype(of_type)> mover(tensor);
      FASTPRUNE_ROLLED
      for (int line = 0; line < kLines; ++line) {
        const int64_t offset = begin + line * kAswlLanes + in_warp * kQuad;
        const int count = count_from(offset, tensor.numel);
        if (count == 0) break;
        const Quad<Value> w =
            tensor.gradient == nullptr
                ? load_quad(mover.dense + offset, count, mover.in_vectors)
                : mover.move(motion, is_pruned ? &kept_bits : nullptr, offset, count, lane);
        if (is_pruned) collector.add(w, count);
      }
    });
    if (is_layer && tensor.gradient != nullptr && tensor.is_scaled) {
      const double sum = sum_of_run(lane);
      if (in_warp == 0 && begin < tensor.numel) {
        work.run_sums[entry.first_run + begin / kAswlRun] = sum;
      }
    }
    if (is_pruned) {
      add_held(collector, work.layers[entry.slot], work.counts[entry.slot], typed.candidates);
    }
  });
}

// ---------------------------------------------------------------- the second pass

__device__ __forceinline__ float stored(float value, const float*) { return value; }
__device__ __forceinline__ double stored(double value, const double*) { return value; }
template <typename Narrow>
__device__ __forceinline__ Narrow stored(float value, const Narrow*) {
  return narrowed<Narrow>(value);
}

template <typename Value, typename Use>
__device__ __forceinline__ void with_parameter_of(const AswlTensor& tensor, Use use) {
  if constexpr (sizeof(Value) == sizeof(double)) {
    use(static_cast<double*>(tensor.parameter));
  } else if (tensor.parameter_dtype == DType::kFloat32) {
    use(static_cast<float*>(tensor.parameter));
  } else if (tensor.parameter_dtype == DType::kBFloat16) {
    use(static_cast<BFloat16*>(tensor.parameter));
  } else {
    use(static_cast<Float16*>(tensor.parameter));
  }
}

template <typename Value>
__global__ void __launch_bounds__(kWalkThreads, 3)
    show_parameters(Table<AswlEntry> table, AswlWork work,
                    AswlTyped<typename ScoreTraits<Value>::Key> typed, AswlNumbers numbers,
                    AswlState state) {
  if (is_skipped(numbers)) return;
  walk_chunks(table, [&](const AswlEntry& entry, int64_t chunk) {
    const AswlTensor& tensor = entry.tensor;
    const bool is_pruned = tensor.position >= 0;
    double attention = 1;
    Value threshold{0};
    int64_t tie_end = 0;
    if (is_pruned) {
      threshold = typed.threshold[entry.slot - typed.first_slot];
      tie_end = numbers.keep_ties ? INT64_MAX : work.tie_end[entry.slot];
      if (tensor.position == 0 && chunk == 0 && threadIdx.x == 0) {
        state.attention[tensor.layer].threshold = threshold;
        state.tie_end[tensor.layer] = tie_end;
      }
    }
    if (tensor.is_scaled) attention = state.attention[tensor.layer].value;
    if (tensor.parameter == tensor.dense) return;
    const KeptBits<Value> kept_bits(tensor, threshold, tie_end);
    const Value* const dense = in_global_memory(static_cast<const Value*>(tensor.dense));
    const auto factor = static_cast<Value>(attention);
    with_parameter_of<Value>(tensor, [&](auto* parameter) {
      parameter = in_global_memory(parameter);
      const bool in_vectors = is_boundary(dense) && is_boundary(parameter);
      FASTPRUNE_ROLLED
      for (int i = threadIdx.x * kQuad; i < kAswlChunk; i += kWalkThreads * kQuad) {
        const int64_t offset = chunk * kAswlChunk + i;
        const int count = count_from(offset, tensor.numel);
        if (count == 0) break;
        const Quad<Value> w = load_quad(dense + offset, count, in_vectors);
        const uint32_t kept = is_pruned ? kept_bits.of(w, offset, count) : ~0u;
        Quad<std::remove_pointer_t<decltype(parameter)>> shown;
        FASTPRUNE_UNROLLED
        for (int n = 0; n < kQuad; ++n) {
          const bool is_kept = (kept >> n & 1) != 0;
          shown.lane[n] = stored(is_kept ? product(w.lane[n], factor) : Value{0}, parameter);
        }
        store_quad(parameter + offset, shown, count, in_vectors);
      }
    });
  });
}

// ---------------------------------------------------------------- launches

// The tensors whose dense values are of one type.
template <typename Value>
struct TypePlan {
  using Key = typename ScoreTraits<Value>::Key;
  static constexpr DType kDType =
      sizeof(Value) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;

  std::vector<AswlEntry> entries;
  std::vector<TensorEntry> pools;
  AswlEntry* table;
  int64_t num_chunks = 0, num_candidates = 0;
  AswlTyped<Key> typed{};
  char* selection;

  void add(const AswlTensor& tensor, int64_t slot, int64_t first_run) {
    if (tensor.position >= 0) {
      pools.push_back({tensor.dense, nullptr, tensor.numel, tensor.position,
                       static_cast<int32_t>(slot - typed.first_slot), kDType, kDType,
                       tensor.layout});
    }
    if (tensor.numel == 0) return;
    entries.push_back({tensor, num_chunks, first_run, slot});
    num_chunks += (tensor.numel + kAswlChunk - 1) / kAswlChunk;
  }

  void take(Scratch& scratch) {
    using Score = typename KeyTraits<Key>::Score;
    typed.candidates = scratch.take<Key>(num_candidates);
    typed.known = scratch.take<SegmentState<Key>>(typed.num_layers);
    typed.threshold = scratch.take<Score>(typed.num_layers);
    table = scratch.take<AswlEntry>(entries.size());
    selection =
        typed.num_layers == 0 ? nullptr : scratch.take<char>(select_threshold_scratch(pools, true));
  }

  Table<AswlEntry> uploaded() const {
    return {table, static_cast<int32_t>(entries.size()), num_chunks};
  }
};

// Of normally distributed weights at most 3% lie within the margins; twice as many have room.
int64_t candidates_of(int64_t pool_size) { return pool_size / 16 + 256; }

struct Plan {
  std::vector<AswlLayer> layers;
  std::vector<AswlRuns> runs;
  TypePlan<float> floats;
  TypePlan<double> doubles;
  AswlWork work{};
  AswlLayer* layer_table;
  AswlRuns* run_table;
  size_t cleared_bytes, scratch_bytes;

  Plan(const std::vector<AswlTensor>& tensors, void* memory) {
    const std::vector<int64_t> slots = make_slots(tensors);
    int64_t num_runs = 0;
    for (const AswlTensor& t : tensors) {
      const int64_t slot = t.layer < 0 ? -1 : slots[t.layer];
      const int64_t own = (t.numel + kAswlRun - 1) / kAswlRun;
      t.dtype == DType::kFloat64 ? doubles.add(t, slot, num_runs) : floats.add(t, slot, num_runs);
      if (slot < 0) continue;
      AswlLayer& layer = layers[slot];
      if (layer.end_tensor == 0) layer.first_tensor = static_cast<int32_t>(runs.size());
      layer.number = t.layer;
      const bool counts = t.is_scaled && t.gradient != nullptr;
      runs.push_back({num_runs, counts ? own : 0});
      layer.end_tensor = static_cast<int32_t>(runs.size());
      num_runs += own;
      if (t.position < 0) continue;
      if (t.position == 0 && layer.weight_size == 0) layer.weight_size = t.numel;
      layer.pool_size += t.numel;
    }
    for (size_t slot = 0; slot < layers.size(); ++slot) {
      AswlLayer& layer = layers[slot];
      const bool is_float = static_cast<int64_t>(slot) < floats.typed.num_layers;
      int64_t& next = is_float ? floats.num_candidates : doubles.num_candidates;
      layer.first_candidate = next;
      layer.max_candidates = candidates_of(layer.pool_size);
      next += layer.max_candidates;
      work.total_size += static_cast<double>(layer.weight_size);
    }
    work.num_layers = static_cast<int64_t>(layers.size());
    take(memory, num_runs);
  }

 private:
  // The slot of each layer, by its number.
  std::vector<int64_t> make_slots(const std::vector<AswlTensor>& tensors) {
    std::vector<DType> dtypes;
    for (const AswlTensor& t : tensors) {
      if (t.layer == static_cast<int32_t>(dtypes.size())) dtypes.push_back(t.dtype);
      if (t.position == 0) dtypes[t.layer] = t.dtype;
    }
    const auto is_double = [](DType dtype) { return dtype == DType::kFloat64; };
    const int64_t num_doubles = std::count_if(dtypes.begin(), dtypes.end(), is_double);
    layers.resize(dtypes.size());
    floats.typed.num_layers = static_cast<int64_t>(dtypes.size()) - num_doubles;
    doubles.typed.num_layers = num_doubles;
    doubles.typed.first_slot = floats.typed.num_layers;
    int64_t next[2] = {0, doubles.typed.first_slot};
    std::vector<int64_t> slots;
    for (const DType dtype : dtypes) slots.push_back(next[is_double(dtype) ? 1 : 0]++);
    return slots;
  }

  void take(void* memory, int64_t num_runs) {
    const int64_t count = work.num_layers;
    Scratch scratch(memory);
    work.counts = scratch.take<AswlCounts>(count);
    cleared_bytes = scratch.bytes();
    work.run_sums = scratch.take<double>(num_runs);
    work.inner = scratch.take<double>(count);
    work.terms = scratch.take<double>(count);
    work.slopes = scratch.take<double>(count);
    work.num_kept = scratch.take<int64_t>(count);
    work.num_ties = scratch.take<int64_t>(count);
    work.tie_end = scratch.take<int64_t>(count);
    work.non_finite = scratch.take<int32_t>(1);
    work.layers = layer_table = scratch.take<AswlLayer>(count);
    work.runs = run_table = scratch.take<AswlRuns>(runs.size());
    floats.take(scratch);
    doubles.take(scratch);
    scratch_bytes = scratch.bytes();
  }
};

template <typename Value>
void launch_moves(const Plan& plan, const TypePlan<Value>& own, const AswlNumbers& numbers,
                  const AswlState& state, int max_blocks, Stream stream) {
  if (own.entries.empty()) return;
  upload_table(own.entries, own.table, stream);
  launch(move_dense<Value>, grid_of(own.num_chunks, max_blocks), kWalkThreads, 0, stream,
         own.uploaded(), plan.work, own.typed, numbers, state);
}

template <typename Value>
void launch_selection(const Plan& plan, const TypePlan<Value>& own, const AswlNumbers& numbers,
                      int max_blocks, Stream stream) {
  if (own.typed.num_layers == 0) return;
  rank_candidates(plan.work, own.typed, numbers, stream);
  const int64_t first = own.typed.first_slot;
  const SelectionResult result{own.typed.threshold, plan.work.num_ties + first,
                               plan.work.tie_end + first, plan.work.non_finite};
  select_threshold(own.pools, true, ScoreKind::kMagnitude, plan.work.num_kept + first, result,
                   own.selection, max_blocks, stream, own.typed.known);
}

template <typename Value>
void launch_shows(const Plan& plan, const TypePlan<Value>& own, const AswlNumbers& numbers,
                  const AswlState& state, int max_blocks, Stream stream) {
  if (own.entries.empty()) return;
  launch(show_parameters<Value>, grid_of(own.num_chunks, max_blocks), kWalkThreads, 0, stream,
         own.uploaded(), plan.work, own.typed, numbers, state);
}

}  // namespace

size_t aswl_step_scratch(const std::vector<AswlTensor>& tensors) {
  return Plan(tensors, nullptr).scratch_bytes;
}

void aswl_step(const std::vector<AswlTensor>& tensors, const AswlNumbers& numbers,
               const AswlState& state, void* scratch, int max_blocks, Stream stream) {
  const Plan plan(tensors, scratch);
  fill_zero_async(scratch, plan.cleared_bytes, stream);
  upload_table(plan.layers, plan.layer_table, stream);
  upload_table(plan.runs, plan.run_table, stream);
  launch_moves(plan, plan.floats, numbers, state, max_blocks, stream);
  launch_moves(plan, plan.doubles, numbers, state, max_blocks, stream);
  advance_attention(plan.work, numbers, state, stream);
  launch_selection(plan, plan.floats, numbers, max_blocks, stream);
  launch_selection(plan, plan.doubles, numbers, max_blocks, stream);
  launch_shows(plan, plan.floats, numbers, state, max_blocks, stream);
  launch_shows(plan, plan.doubles, numbers, state, max_blocks, stream);
}

}  // namespace fastprune
