// One pass over weights, momenta and gradients. The threshold comes from select_threshold; whether
// an element is active follows from the element and its position, so no mask is stored or read.
#include "common/divisor.h"
#include "common/narrow.h"
#include "cuda/gsm.h"
#include "cuda/limit.cuh"
#include "cuda/tensor_walk.cuh"

namespace fastprune {
namespace {

// Each product and each sum is rounded once, fused where torch fuses, whatever the compiler's
// flags.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

template <typename Weight>
struct StepNumbers {
  Weight gradient_factor, weight_decay, momentum, undamped, minus_lr;
  bool decays, has_momentum, nesterov;
};

// Differences and signs are formed in double, then rounded, as torch does with its scalars.
template <typename Weight>
__device__ __forceinline__ StepNumbers<Weight> step_numbers(const double* settings,
                                                            double gradient_factor) {
  const double lr = settings[0];
  const double momentum = settings[1];
  const double dampening = settings[2];
  const double weight_decay = settings[3];
  const bool maximize = settings[5] != 0;
  return {static_cast<Weight>(maximize ? -gradient_factor : gradient_factor),
          static_cast<Weight>(weight_decay),
          static_cast<Weight>(momentum),
          static_cast<Weight>(1 - dampening),
          static_cast<Weight>(-lr),
          weight_decay != 0,
          momentum != 0,
          settings[4] != 0};
}

// The arithmetic of torch.optim.SGD(foreach=False, fused=False).
template <typename Weight>
__device__ __forceinline__ void step_element(const StepNumbers<Weight>& n, Weight gradient,
                                             bool active, Weight& weight, Weight& momentum) {
  Weight step = product(gradient, n.gradient_factor);
  step = active ? step : Weight{0};  // selected, not multiplied: NaN times 0 would be NaN
  if (n.decays) step = fused(weight, n.weight_decay, step);
  momentum = n.has_momentum ? fused(step, n.undamped, product(n.momentum, momentum)) : step;
  const Weight direction = n.nesterov ? fused(momentum, n.momentum, step) : momentum;
  weight = fused(direction, n.minus_lr, weight);
}

struct UpdateEntry {
  GsmWeight tensor;
  int64_t first_chunk;
};

// From an offset in memory to the block that holds the element; every element takes this way, so
// its divisions are prepared.
struct GateMap {
  const bool* kept;
  Divisor memory_stride[kMaxLayoutDims];
  Divisor output, tap;  // elements of an output, of an input
  Divisor block_outputs, block_inputs;
  int64_t block_columns;
};

struct GatedEntry {
  GsmWeight tensor;
  int64_t first_chunk;
  GateMap gate;
};

__device__ __forceinline__ int64_t position_of(const GateMap& gate, const Layout& layout,
                                               int64_t offset) {
  if (layout.rank == 0) return offset;
  int64_t position = 0;
  FASTPRUNE_ROLLED
  for (int d = 0; d < layout.rank; ++d) {
    const int64_t index = gate.memory_stride[d].quotient(offset);
    position += index * layout.position_stride[d];
    offset -= index * layout.memory_stride[d];
  }
  return position;
}

__device__ __forceinline__ bool is_kept(const GateMap& gate, const Layout& layout, int64_t offset) {
  const int64_t position = position_of(gate, layout, offset);
  const int64_t output = gate.output.quotient(position);
  const int64_t in_output = position - output * gate.output.value();
  const int64_t input = gate.tap.quotient(in_output);
  const int64_t tap = in_output - input * gate.tap.value();
  const int64_t block =
      gate.block_outputs.quotient(output) * gate.block_columns + gate.block_inputs.quotient(input);
  return gate.kept[block * gate.tap.value() + tap];
}

// What decides which elements their gradients reach. active() has a bit for each of the elements
// that lie at `offset` of their tensor.
template <typename Weight>
class BlockChoice {
 public:
  __device__ BlockChoice(const GatedEntry& entry, const GsmNumbers&) : entry_(entry) {}

  template <typename Gradient, int kCount>
  __device__ __forceinline__ uint32_t active(const Lanes<Weight, kCount>&,
                                             const Lanes<Gradient, kCount>&, int64_t offset) const {
    uint32_t active = 0;
    FASTPRUNE_ROLLED
    for (int i = 0; i < kCount; ++i) {
      const bool kept = is_kept(entry_.gate, entry_.tensor.layout, offset + i);
      active |= static_cast<uint32_t>(kept) << i;
    }
    return active;
  }

 private:
  const GatedEntry& entry_;
};

template <typename Weight>
class ThresholdChoice {
 public:
  using Key = typename ScoreTraits<Weight>::Key;

  __device__ ThresholdChoice(const UpdateEntry& entry, const GsmNumbers& numbers) : entry_(entry) {
    if (entry.tensor.position < 0) return;  // nobody asks, and there may be no threshold
    limit_ = limit_of<ScoreKind::kSaliency, Key>(*static_cast<const Weight*>(numbers.threshold),
                                                 *numbers.tie_end);
  }

  template <typename Gradient, int kCount>
  __device__ __forceinline__ uint32_t active(const Lanes<Weight, kCount>& weight,
                                             const Lanes<Gradient, kCount>& gradient,
                                             int64_t offset) const {
    uint32_t active = 0;
    uint32_t ties = 0;
    FASTPRUNE_UNROLLED
    for (int i = 0; i < kCount; ++i) {
      // The bits of select_threshold: the gradient as it came, scaled or not.
      const Key key =
          score_key<ScoreKind::kSaliency>(product(weight.lane[i], widen(gradient.lane[i])));
      active |= static_cast<uint32_t>(key > limit_.key) << i;
      ties |= static_cast<uint32_t>(key == limit_.key) << i;
    }
    FASTPRUNE_ROLLED
    for (; ties != 0; ties &= ties - 1) {  // positions cost divisions: for ties alone
      const int i = __ffs(static_cast<int>(ties)) - 1;
      const int64_t position =
          entry_.tensor.position + fastprune::position_of(entry_.tensor.layout, offset + i);
      active |= static_cast<uint32_t>(position < limit_.tie_end) << i;
    }
    return active;
  }

 private:
  const UpdateEntry& entry_;
  Limit<Key> limit_{};
};

template <typename Weight>
ThresholdChoice<Weight> choice_of(const UpdateEntry&);
template <typename Weight>
BlockChoice<Weight> choice_of(const GatedEntry&);

template <int kCount, typename T>
__device__ __forceinline__ Lanes<T, kCount> load(const T* data) {
  return *reinterpret_cast<const Lanes<T, kCount>*>(data);
}

template <typename T, int kCount>
__device__ __forceinline__ void store(T* data, const Lanes<T, kCount>& lanes) {
  *reinterpret_cast<Lanes<T, kCount>*>(data) = lanes;
}

template <int kCount>
__device__ __forceinline__ void store_copy(uint16_t* copy, DType dtype,
                                           const Lanes<float, kCount>& weight) {
  Lanes<uint16_t, kCount> bits;
  FASTPRUNE_UNROLLED
  for (int i = 0; i < kCount; ++i) {
    bits.lane[i] = dtype == DType::kBFloat16 ? narrowed<BFloat16>(weight.lane[i]).bits
                                             : narrowed<Float16>(weight.lane[i]).bits;
  }
  store(copy, bits);
}

// The elements of a chunk.
template <typename Weight, typename Gradient>
struct ChunkData {
  Weight* weight;
  Weight* momentum;
  const Gradient* gradient;
  uint16_t* copy;  // or null
  DType copy_dtype;
  int64_t begin;
  int size;
  bool in_pool;

  __device__ ChunkData(const GsmWeight& tensor, int64_t chunk)
      : weight(static_cast<Weight*>(tensor.weight)),
        momentum(static_cast<Weight*>(tensor.momentum)),
        gradient(static_cast<const Gradient*>(tensor.gradient)),
        copy(static_cast<uint16_t*>(tensor.copy)),
        copy_dtype(tensor.copy_dtype),
        in_pool(tensor.position >= 0) {
    constexpr int kSize = Chunks<typename ScoreTraits<Weight>::Key>::kSize;
    begin = chunk * kSize;
    const int64_t left = tensor.numel - begin;
    size = left > kSize ? kSize : static_cast<int>(left);
    weight = in_global_memory(weight + begin);
    momentum = in_global_memory(momentum + begin);
    gradient = in_global_memory(gradient + begin);
    if (copy != nullptr) copy = in_global_memory(copy + begin);
  }

  // Elements before the first boundary of vectors; all of them if the tensors' boundaries differ.
  template <int kCount>
  __device__ __forceinline__ int head() const {
    const int head = elements_to_boundary<kCount>(weight);
    bool agree = elements_to_boundary<kCount>(momentum) == head &&
                 elements_to_boundary<kCount>(gradient) == head;
    if (copy != nullptr) agree &= elements_to_boundary<kCount>(copy) == head;
    return agree ? min(head, size) : size;
  }
};

template <int kCount, typename Weight, typename Gradient, typename Choice>
__device__ __forceinline__ void update_lanes(const ChunkData<Weight, Gradient>& data, int at,
                                             const Choice& choice,
                                             const StepNumbers<Weight>& numbers) {
  auto weight = load<kCount>(data.weight + at);
  auto momentum = load<kCount>(data.momentum + at);
  const auto gradient = load<kCount>(data.gradient + at);
  const uint32_t active = data.in_pool ? choice.active(weight, gradient, data.begin + at) : ~0u;
  FASTPRUNE_UNROLLED
  for (int i = 0; i < kCount; ++i) {
    step_element<Weight>(numbers, widen(gradient.lane[i]), (active >> i & 1) != 0, weight.lane[i],
                         momentum.lane[i]);
  }
  store(data.weight + at, weight);
  store(data.momentum + at, momentum);
  if constexpr (sizeof(Weight) == sizeof(float)) {
    if (data.copy != nullptr) store_copy(data.copy + at, data.copy_dtype, weight);
  }
}

// Each thread takes vectors of elements between the 16-byte boundaries, single ones elsewhere. The
// three loads of a vector are enough in flight, and two vectors at a time would cost registers.
template <typename Weight, typename Gradient, typename Choice>
__device__ __forceinline__ void update_chunk(const ChunkData<Weight, Gradient>& data,
                                             const Choice& choice,
                                             const StepNumbers<Weight>& numbers) {
  constexpr int kLanes = kVectorLanes<Weight>;
  const int head = data.template head<kLanes>();
  const int num_vectors = (data.size - head) / kLanes;
  FASTPRUNE_ROLLED
  for (int v = threadIdx.x; v < num_vectors; v += kWalkThreads) {
    update_lanes<kLanes>(data, head + v * kLanes, choice, numbers);
  }
  const int num_single = data.size - num_vectors * kLanes;
  FASTPRUNE_ROLLED
  for (int i = threadIdx.x; i < num_single; i += kWalkThreads) {
    const int at = i >= head ? i + num_vectors * kLanes : i;
    update_lanes<1>(data, at, choice, numbers);
  }
}

template <typename Weight, typename Entry>
__global__ void __launch_bounds__(kWalkThreads, 2)
    update_weights(Table<Entry> table, GsmNumbers numbers) {
  if (numbers.found_inf != nullptr && *numbers.found_inf != 0) return;
  const double factor =
      numbers.grad_scale == nullptr ? 1 : 1 / static_cast<double>(*numbers.grad_scale);
  walk_chunks(table, [&](const Entry& entry, int64_t chunk) {
    const GsmWeight& tensor = entry.tensor;
    const StepNumbers<Weight> step =
        step_numbers<Weight>(numbers.settings + int64_t{tensor.row} * kGsmSettings, factor);
    const decltype(choice_of<Weight>(entry)) choice(entry, numbers);
    const auto with_gradient = [&](auto of_type) {
      update_chunk(ChunkData<Weight, decltype(of_type)>(tensor, chunk), choice, step);
    };
    if constexpr (sizeof(Weight) == sizeof(double)) {
      with_gradient(double{});
    } else if (tensor.gradient_dtype == DType::kFloat32) {
      with_gradient(float{});
    } else if (tensor.gradient_dtype == DType::kBFloat16) {
      with_gradient(BFloat16{});
    } else {
      with_gradient(Float16{});
    }
  });
}

GateMap gate_map(const Layout& layout, const GsmGate& gate, GsmBlock block) {
  GateMap map{};
  map.kept = gate.kept;
  for (int d = 0; d < layout.rank; ++d) map.memory_stride[d] = Divisor(layout.memory_stride[d]);
  map.output = Divisor(gate.inputs * gate.taps);
  map.tap = Divisor(gate.taps);
  map.block_outputs = Divisor(block.outputs);
  map.block_inputs = Divisor(block.inputs);
  map.block_columns = gate.inputs / block.inputs + (gate.inputs % block.inputs != 0);
  return map;
}

// Launches for the weights of one type; returns where the table's memory is free again.
template <typename Weight, typename Entry, typename MakeEntry>
char* update_type(DType dtype, const std::vector<GsmWeight>& weights, MakeEntry make_entry,
                  const GsmNumbers& numbers, char* scratch, int max_blocks, Stream stream) {
  std::vector<Entry> entries;
  int64_t num_chunks = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i].dtype != dtype || weights[i].numel == 0) continue;
    entries.push_back(make_entry(i, num_chunks));
    num_chunks += Chunks<typename ScoreTraits<Weight>::Key>::count(weights[i].numel);
  }
  if (entries.empty()) return scratch;
  auto* const table = reinterpret_cast<Entry*>(scratch);
  upload_table(entries, table, stream);
  launch(update_weights<Weight, Entry>, grid_of(num_chunks, max_blocks), kWalkThreads, 0, stream,
         Table<Entry>{table, static_cast<int32_t>(entries.size()), num_chunks}, numbers);
  return scratch + entries.size() * sizeof(Entry);
}

template <typename Entry, typename MakeEntry>
void update_all(const std::vector<GsmWeight>& weights, MakeEntry make_entry,
                const GsmNumbers& numbers, void* scratch, int max_blocks, Stream stream) {
  char* const rest = update_type<float, Entry>(DType::kFloat32, weights, make_entry, numbers,
                                               static_cast<char*>(scratch), max_blocks, stream);
  update_type<double, Entry>(DType::kFloat64, weights, make_entry, numbers, rest, max_blocks,
                             stream);
}

}  // namespace

size_t gsm_update_scratch(const std::vector<GsmWeight>& weights, bool gated) {
  return weights.size() * (gated ? sizeof(GatedEntry) : sizeof(UpdateEntry));
}

void gsm_update(const std::vector<GsmWeight>& weights, const std::vector<GsmGate>& gates,
                GsmBlock block, const GsmNumbers& numbers, void* scratch, int max_blocks,
                Stream stream) {
  if (gates.empty()) {
    const auto entry = [&](size_t i, int64_t first_chunk) {
      return UpdateEntry{weights[i], first_chunk};
    };
    update_all<UpdateEntry>(weights, entry, numbers, scratch, max_blocks, stream);
  } else {
    const auto entry = [&](size_t i, int64_t first_chunk) {
      return GatedEntry{weights[i], first_chunk, gate_map(weights[i].layout, gates[i], block)};
    };
    update_all<GatedEntry>(weights, entry, numbers, scratch, max_blocks, stream);
  }
}

}  // namespace fastprune
