// One pass over weights, momenta and gradients. The threshold comes from select_threshold; whether
// an element is active follows from the element and its position, so no mask is stored or read.
#include "common/divisor.h"
#include "cuda/gsm.h"
#include "cuda/limit.cuh"
#include "cuda/sgd.cuh"

namespace fastprune {
namespace {

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

template <typename Weight, typename Gradient>
struct ChunkData : SgdChunk<Weight, Gradient> {
  bool in_pool;

  __device__ ChunkData(const GsmWeight& tensor, int64_t chunk)
      : SgdChunk<Weight, Gradient>(tensor, chunk), in_pool(tensor.position >= 0) {}
};

template <int kCount, typename Weight, typename Gradient, typename Choice>
__device__ __forceinline__ void update_lanes(const ChunkData<Weight, Gradient>& data, int at,
                                             const Choice& choice,
                                             const SgdNumbers<Weight>& numbers) {
  auto weight = load<kCount>(data.weight + at);
  auto momentum = load<kCount>(data.momentum + at);
  const auto gradient = load<kCount>(data.gradient + at);
  const uint32_t active = data.in_pool ? choice.active(weight, gradient, data.begin + at) : ~0u;
  FASTPRUNE_UNROLLED
  for (int i = 0; i < kCount; ++i) {
    const Weight scaled = product(widen(gradient.lane[i]), numbers.gradient_factor);
    // Selected, not multiplied: NaN times 0 would be NaN.
    const Weight step = (active >> i & 1) != 0 ? scaled : Weight{0};
    sgd_step(numbers, step, weight.lane[i], momentum.lane[i]);
  }
  store(data.weight + at, weight);
  store(data.momentum + at, momentum);
  if constexpr (sizeof(Weight) == sizeof(float)) {
    if (data.copy != nullptr) store_copy(data.copy + at, data.copy_dtype, weight);
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
    const SgdNumbers<Weight> step(numbers.settings[tensor.row], factor);
    const decltype(choice_of<Weight>(entry)) choice(entry, numbers);
    with_gradient_of<Weight>(tensor, [&](auto of_type) {
      const ChunkData<Weight, decltype(of_type)> data(tensor, chunk);
      visit_lanes(data, [&](auto lanes, int at) {
        update_lanes<decltype(lanes)::value>(data, at, choice, step);
      });
    });
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
