#pragma once
// How the blocks of a kernel walk a list of tensors: chunks of one tensor each, numbered through
// the whole list, and 128-bit loads inside a chunk.
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/tensor_list.h"
#include "cuda/launch.h"

namespace fastprune {

constexpr int kWalkThreads = 256;

// 128-bit loads that a thread starts before it waits for the first. Enough to cover the latency of
// memory with a thousand threads on a multiprocessor; more would cost the registers they need.
constexpr int kLoadsInFlight = 2;

#if defined(__CUDACC__)
// Kernel parameters hold 32,764 bytes since CUDA 12.1 on compute capability 7.0.
constexpr size_t kSliceBytes = 32512;
#else
constexpr size_t kSliceBytes = 3840;
#endif

// A table goes to the device as kernel parameters, slice by slice: unlike a copy from pageable
// memory this may be captured in a graph, and replays do not depend on the host's copy.
template <typename Entry>
struct TableSlice {
  static_assert(sizeof(Entry) % sizeof(uint64_t) == 0, "copied in words");
  static constexpr int64_t kEntries = kSliceBytes / sizeof(Entry);
  Entry entries[kEntries];
};

template <typename Entry>
__global__ void __launch_bounds__(kWalkThreads)
    upload_slice(const __grid_constant__ TableSlice<Entry> slice, Entry* table, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kWalkThreads) table[i] = slice.entries[i];
}

template <typename Entry>
void upload_table(const std::vector<Entry>& entries, Entry* table, Stream stream) {
  using Slice = TableSlice<Entry>;
  const int64_t total = entries.size();
  for (int64_t first = 0; first < total; first += Slice::kEntries) {
    const int64_t count = std::min(Slice::kEntries, total - first);
    Slice slice;
    std::copy_n(entries.begin() + first, count, slice.entries);
    launch(upload_slice<Entry>, 1, kWalkThreads, 0, stream, slice, table + first, count);
  }
}

// Hands out the parts of one allocation; without one it only measures.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* part = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += (count * sizeof(T) + 15) / 16 * 16;
    return part;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

// A table on the device, as kernels get it.
template <typename Entry>
struct Table {
  const Entry* entries;
  int32_t num_entries;
  int64_t num_chunks;
};

// The entry that holds a chunk: the last one that starts at it or before. An empty tensor starts
// where the next one does, so it is never the last.
template <typename Entry>
__device__ int32_t entry_of_chunk(const Table<Entry>& table, int64_t chunk) {
  int32_t low = 0;
  int32_t high = table.num_entries - 1;
  while (low < high) {
    const int32_t middle = high - (high - low) / 2;
    const bool starts_later = table.entries[middle].first_chunk > chunk;
    high = starts_later ? middle - 1 : high;
    low = starts_later ? low : middle;
  }
  return low;
}

// Each block takes a contiguous run of chunks, so that it meets few tensors.
struct ChunkRun {
  int64_t begin;
  int64_t end;
};

__device__ __forceinline__ ChunkRun own_chunks(int64_t num_chunks) {
  const int64_t share = num_chunks / gridDim.x;
  const int64_t rest = num_chunks % gridDim.x;
  const int64_t block = blockIdx.x;
  const int64_t begin = block * share + (block > rest ? rest : block);
  return {begin, begin + share + (block + 1 > rest ? 0 : 1)};
}

// Calls visit(entry, chunk number within its tensor) for each chunk of this block. The calls are
// uniform over the block, so they may hold barriers.
template <typename Entry, typename Visit>
__device__ __forceinline__ void walk_chunks(const Table<Entry>& table, Visit visit) {
  const ChunkRun run = own_chunks(table.num_chunks);
  if (run.begin == run.end) return;
  int32_t e = entry_of_chunk(table, run.begin);
  for (int64_t chunk = run.begin; chunk != run.end; ++chunk) {
    while (e + 1 != table.num_entries && table.entries[e + 1].first_chunk <= chunk) ++e;
    visit(table.entries[e], chunk - table.entries[e].first_chunk);
  }
}

inline unsigned grid_of(int64_t num_chunks, int max_blocks) {
  return static_cast<unsigned>(std::clamp<int64_t>(num_chunks, 1, max_blocks));
}

// A tensor of the selection and where its chunks are in the list's numbering.
struct WalkEntry {
  TensorEntry tensor;
  int64_t first_chunk;
  bool* mask;  // of select_masks alone
};

template <typename Key>
struct Chunks {
  // 16 KiB of keys.
  static constexpr int kSize = (16 << 10) / sizeof(Key);
  static_assert(kSize % kWalkThreads == 0, "each thread has its share of the positions");
  static_assert(kSize * sizeof(BFloat16) % 16 == 0, "all chunks of a tensor are aligned alike");

  static int64_t count(int64_t numel) { return numel / kSize + (numel % kSize != 0); }
};

template <typename Key>
std::vector<WalkEntry> walk_entries(const std::vector<TensorEntry>& tensors) {
  std::vector<WalkEntry> entries;
  int64_t first_chunk = 0;
  for (const TensorEntry& tensor : tensors) {
    entries.push_back({tensor, first_chunk, nullptr});
    first_chunk += Chunks<Key>::count(tensor.numel);
  }
  return entries;
}

template <typename Key>
int64_t total_chunks(const std::vector<WalkEntry>& entries) {
  if (entries.empty()) return 0;
  return entries.back().first_chunk + Chunks<Key>::count(entries.back().tensor.numel);
}

// Lists are float64 altogether or not at all.
inline bool has_double(const std::vector<TensorEntry>& tensors) {
  return !tensors.empty() && tensors[0].dtype == DType::kFloat64;
}

// Calls run(a key, the kind as a constant): what kernels are compiled for.
template <typename Run>
void with_key_and_kind(bool is_double, ScoreKind kind, Run run) {
  const auto with_kind = [&](auto key) {
    switch (kind) {
      case ScoreKind::kValue:
        return run(key, std::integral_constant<ScoreKind, ScoreKind::kValue>{});
      case ScoreKind::kMagnitude:
        return run(key, std::integral_constant<ScoreKind, ScoreKind::kMagnitude>{});
      case ScoreKind::kSaliency:
        return run(key, std::integral_constant<ScoreKind, ScoreKind::kSaliency>{});
    }
  };
  is_double ? with_kind(uint64_t{}) : with_kind(uint32_t{});
}

// The tensor's data as pointers of their types; a 64-bit key means float64. Only a saliency has a
// gradient, and only that of a float32 value may be of another type.
template <ScoreKind kKind, typename Key, typename Use>
__device__ __forceinline__ void with_storage(const TensorEntry& tensor, Use use) {
  const auto as = [&](auto of_type, auto of_gradient) {
    use(static_cast<const decltype(of_type)*>(tensor.value),
        static_cast<const decltype(of_gradient)*>(tensor.gradient));
  };
  const bool has_pair = kKind == ScoreKind::kSaliency && tensor.gradient_dtype != tensor.dtype;
  if constexpr (sizeof(Key) == sizeof(double)) {
    as(double{}, double{});
  } else if (tensor.dtype == DType::kBFloat16) {
    as(BFloat16{}, BFloat16{});
  } else if (tensor.dtype == DType::kFloat16) {
    as(Float16{}, Float16{});
  } else if (!has_pair) {
    as(float{}, float{});
  } else if constexpr (kKind == ScoreKind::kSaliency) {
    if (tensor.gradient_dtype == DType::kBFloat16) {
      as(float{}, BFloat16{});
    } else {
      as(float{}, Float16{});
    }
  }
}

// Neighbouring elements that one instruction loads or stores: 128 bits, or fewer.
template <typename Storage, int kCount>
struct alignas(kCount * sizeof(Storage)) Lanes {
  Storage lane[kCount];
};

template <typename Storage>
constexpr int kVectorLanes = 16 / sizeof(Storage);

// Keys of neighbouring elements.
template <typename Key, int kCount>
struct Keys {
  static constexpr int kSize = kCount;
  Key key[kCount];
};

// Pointers read from a table could be to any memory; saying which gives the plain load
// instructions.
template <typename T>
__device__ __forceinline__ T* in_global_memory(T* pointer) {
#if defined(__CUDACC__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// How many elements come before the first one where Lanes of them may begin.
template <int kCount, typename Storage>
__device__ __forceinline__ int elements_to_boundary(const Storage* data) {
  constexpr size_t kBytes = sizeof(Lanes<Storage, kCount>);
  const auto past = static_cast<int>(reinterpret_cast<uintptr_t>(data) % kBytes / sizeof(Storage));
  return past == 0 ? 0 : kCount - past;
}

// Calls visit(keys, index of the first one) for all of `size` elements, each thread with its own:
// vectors of them between the 16-byte boundaries of the value, single ones elsewhere. A narrower
// gradient is loaded in vectors of as many elements, so of fewer bytes.
template <ScoreKind kKind, typename Key, typename Storage, typename Gradient, typename Visit>
__device__ __forceinline__ void visit_stored(const Storage* value, const Gradient* gradient,
                                             int size, Visit& visit) {
  constexpr int kLanes = kVectorLanes<Storage>;
  using Values = Lanes<Storage, kLanes>;
  using Gradients = Lanes<Gradient, kLanes>;
  constexpr bool kSaliency = kKind == ScoreKind::kSaliency;
  const int thread = threadIdx.x;
  value = in_global_memory(value);
  if constexpr (kSaliency) gradient = in_global_memory(gradient);

  int head = elements_to_boundary<kLanes>(value);
  if (kSaliency && elements_to_boundary<kLanes>(gradient) != head) head = size;
  head = head > size ? size : head;
  const int num_vectors = (size - head) / kLanes;

  FASTPRUNE_ROLLED
  for (int first = thread; first < num_vectors; first += kLoadsInFlight * kWalkThreads) {
    Values values[kLoadsInFlight];
    Gradients gradients[kSaliency ? kLoadsInFlight : 1];
    FASTPRUNE_UNROLLED
    for (int row = 0; row < kLoadsInFlight; ++row) {  // all loads before the first use
      const int v = first + row * kWalkThreads;
      values[row] = v < num_vectors ? reinterpret_cast<const Values*>(value + head)[v] : Values{};
      if constexpr (kSaliency) {
        gradients[row] =
            v < num_vectors ? reinterpret_cast<const Gradients*>(gradient + head)[v] : Gradients{};
      }
    }
    FASTPRUNE_UNROLLED
    for (int row = 0; row < kLoadsInFlight; ++row) {
      const int v = first + row * kWalkThreads;
      if (v >= num_vectors) break;
      Keys<Key, kLanes> keys;
      const Gradient* pair = gradients[kSaliency ? row : 0].lane;
      FASTPRUNE_UNROLLED
      for (int lane = 0; lane < kLanes; ++lane) {
        keys.key[lane] = element_key<kKind>(values[row].lane, pair, lane);
      }
      visit(keys, head + v * kLanes);
    }
  }
  const int num_single = size - num_vectors * kLanes;
  FASTPRUNE_ROLLED
  for (int i = thread; i < num_single; i += kWalkThreads) {
    const int at = i >= head ? i + num_vectors * kLanes : i;
    visit(Keys<Key, 1>{{element_key<kKind>(value, gradient, at)}}, at);
  }
}

template <typename Key>
__device__ __forceinline__ int chunk_size(const TensorEntry& tensor, int64_t chunk) {
  const int64_t left = tensor.numel - chunk * Chunks<Key>::kSize;
  return left > Chunks<Key>::kSize ? Chunks<Key>::kSize : static_cast<int>(left);
}

// The keys of a chunk of memory, in no order.
template <ScoreKind kKind, typename Key, typename Visit>
__device__ __forceinline__ void visit_keys(const TensorEntry& tensor, int64_t chunk, Visit visit) {
  const int size = chunk_size<Key>(tensor, chunk);
  const int64_t begin = chunk * Chunks<Key>::kSize;
  with_storage<kKind, Key>(tensor, [&](const auto* value, const auto* gradient) {
    visit_stored<kKind, Key>(value + begin, gradient == nullptr ? nullptr : gradient + begin, size,
                             visit);
  });
}

// The key at a position, wherever the tensor's layout puts it.
template <ScoreKind kKind, typename Key>
__device__ __forceinline__ Key key_at(const TensorEntry& tensor, int64_t position) {
  const int64_t offset = offset_of(tensor.layout, position);
  Key key = 0;
  with_storage<kKind, Key>(tensor, [&](const auto* value, const auto* gradient) {
    key = element_key<kKind>(value, gradient, offset);
  });
  return key;
}

}  // namespace fastprune
