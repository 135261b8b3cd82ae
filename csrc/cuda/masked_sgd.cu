// One pass over weights, momenta and gradients; the mask adds a bit to an element's 20 bytes.
#include "cuda/masked_sgd.h"
#include "cuda/sgd.cuh"

namespace fastprune {
namespace {

struct MaskedEntry {
  MaskedWeight tensor;
  int64_t first_chunk;
};

template <typename Key>
constexpr bool kChunkHasWholeBytes = Chunks<Key>::kSize % kMaskByte == 0;
static_assert(kChunkHasWholeBytes<uint32_t> && kChunkHasWholeBytes<uint64_t>);

// The bits of kCount elements of a chunk, from one of them on, lowest first.
template <int kCount>
__device__ __forceinline__ uint32_t bits_at(const uint8_t* mask, int at) {
  static_assert(kCount <= kMaskByte, "they lie in two bytes at most");
  const int first = at % kMaskByte;
  const int last = first + kCount;
  uint32_t bits = mask[at / kMaskByte];
  if (kMaskByte < last) bits |= static_cast<uint32_t>(mask[at / kMaskByte + 1]) << kMaskByte;
  return bits >> first;
}

template <int kCount, typename Weight, typename Gradient>
__device__ __forceinline__ void step_lanes(const SgdChunk<Weight, Gradient>& data,
                                           const uint8_t* mask, int at,
                                           const SgdNumbers<Weight>& numbers) {
  auto weight = load<kCount>(data.weight + at);
  Lanes<Weight, kCount> momentum{};
  if (data.momentum != nullptr) momentum = load<kCount>(data.momentum + at);
  const auto gradient = load<kCount>(data.gradient + at);
  const uint32_t kept = mask == nullptr ? ~0u : bits_at<kCount>(mask, at);
  FASTPRUNE_UNROLLED
  for (int i = 0; i < kCount; ++i) {
    const Weight step = product(widen(gradient.lane[i]), numbers.gradient_factor);
    sgd_step(numbers, step, weight.lane[i], momentum.lane[i]);
    const bool is_kept = (kept >> i & 1) != 0;
    weight.lane[i] = is_kept ? weight.lane[i] : Weight{0};
    momentum.lane[i] = is_kept ? momentum.lane[i] : Weight{0};
  }
  store(data.weight + at, weight);
  if (data.momentum != nullptr) store(data.momentum + at, momentum);
  if constexpr (sizeof(Weight) == sizeof(float)) {
    if (data.copy != nullptr) store_copy(data.copy + at, data.copy_dtype, weight);
  }
}

// Without a buffer the momentum is 0, whatever the settings say.
template <typename Weight>
__device__ __forceinline__ SgdNumbers<Weight> numbers_of(const MaskedWeight& tensor,
                                                         const SgdSettings* settings,
                                                         double factor) {
  SgdNumbers<Weight> numbers(settings[tensor.row], factor);
  numbers.has_momentum &= tensor.momentum != nullptr;
  numbers.nesterov &= tensor.momentum != nullptr;
  return numbers;
}

constexpr int kResidentBlocks = 4;  // on a multiprocessor, as the grid is laid out

template <typename Weight>
__global__ void __launch_bounds__(kWalkThreads, kResidentBlocks)
    step_masked(Table<MaskedEntry> table, MaskedSgdNumbers numbers) {
  if (numbers.found_inf != nullptr && *numbers.found_inf != 0) return;
  const double factor =
      numbers.grad_scale == nullptr ? 1 : 1 / static_cast<double>(*numbers.grad_scale);
  walk_chunks(table, [&](const MaskedEntry& entry, int64_t chunk) {
    const MaskedWeight& tensor = entry.tensor;
    const SgdNumbers<Weight> sgd = numbers_of<Weight>(tensor, numbers.settings, factor);
    with_gradient_of<Weight>(tensor, [&](auto of_type) {
      const SgdChunk<Weight, decltype(of_type)> data(tensor, chunk);
      const uint8_t* mask = tensor.mask;
      if (mask != nullptr) mask = in_global_memory(mask + data.begin / kMaskByte);
      visit_lanes(data, [&](auto lanes, int at) {
        step_lanes<decltype(lanes)::value>(data, mask, at, sgd);
      });
    });
  });
}

// Launches for the weights of one type; returns where the table's memory is free again.
template <typename Weight>
char* step_type(DType dtype, const std::vector<MaskedWeight>& weights,
                const MaskedSgdNumbers& numbers, char* scratch, int max_blocks, Stream stream) {
  std::vector<MaskedEntry> entries;
  int64_t num_chunks = 0;
  for (const MaskedWeight& weight : weights) {
    if (weight.dtype != dtype || weight.numel == 0) continue;
    entries.push_back({weight, num_chunks});
    num_chunks += Chunks<typename ScoreTraits<Weight>::Key>::count(weight.numel);
  }
  if (entries.empty()) return scratch;
  auto* const table = reinterpret_cast<MaskedEntry*>(scratch);
  upload_table(entries, table, stream);
  launch(step_masked<Weight>, grid_of(num_chunks, max_blocks), kWalkThreads, 0, stream,
         Table<MaskedEntry>{table, static_cast<int32_t>(entries.size()), num_chunks}, numbers);
  return scratch + entries.size() * sizeof(MaskedEntry);
}

}  // namespace

size_t masked_sgd_scratch(const std::vector<MaskedWeight>& weights) {
  return weights.size() * sizeof(MaskedEntry);
}

void masked_sgd(const std::vector<MaskedWeight>& weights, const MaskedSgdNumbers& numbers,
                void* scratch, int max_blocks, Stream stream) {
  char* const rest = step_type<float>(DType::kFloat32, weights, numbers,
                                      static_cast<char*>(scratch), max_blocks, stream);
  step_type<double>(DType::kFloat64, weights, numbers, rest, max_blocks, stream);
}

}  // namespace fastprune
