// SDprun's update. A layer of rows takes one pass: a warp or a block steps a group, keeps its
// accumulators on the chip, and makes the weights when the norm is known. Where the chip is too
// small for a group, its block reads them again, from the cache.
#include <algorithm>

#include "cuda/sdprun_entry.cuh"

namespace fastprune {
namespace {

// ---------------------------------------------------------------- rows

constexpr int kLongThreads = 1024;  // alone on a multiprocessor, a block has to fill it

// Who works on a group.
struct Warp {
  static constexpr int kThreads = kWarpThreads;
  static constexpr int kTeams = kWalkThreads / kThreads;  // in a block
  static constexpr int kBlock = kWalkThreads;
  static constexpr int kResident = 4;  // blocks on a multiprocessor
  static constexpr bool kFits = true;  // all groups do
  static constexpr int kOwnLanes = kSdprunLanes / kThreads;

  static __device__ __forceinline__ int number() { return threadIdx.x / kThreads; }
  static __device__ __forceinline__ int thread() { return threadIdx.x % kThreads; }
  static __device__ __forceinline__ void sync() { __syncwarp(); }
  static __device__ __forceinline__ double total(const double (&lanes)[kOwnLanes]) {
    return sum_of_lanes(lanes[0], lanes[1], lanes[2], lanes[3]);
  }
};

template <int kBlockThreads>
struct Block {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kTeams = 1;
  static constexpr int kBlock = kBlockThreads;
  static constexpr int kResident = kLongThreads / kBlockThreads;
  static constexpr bool kFits = kBlockThreads < kLongThreads;
  static constexpr int kOwnLanes = 1;  // and none, from thread kSdprunLanes on
  static_assert(kThreads >= kSdprunLanes, "each lane has a thread");

  static __device__ __forceinline__ int number() { return 0; }
  static __device__ __forceinline__ int thread() { return threadIdx.x; }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  // Between two calls there is a sync.
  static __device__ __forceinline__ double total(const double (&lanes)[kOwnLanes]) {
    __shared__ double of_lane[kSdprunLanes];
    if (thread() < kSdprunLanes) of_lane[thread()] = lanes[0];
    __syncthreads();
    return sum_of_lanes(of_lane);
  }
};

// What a tensor has of a group.
template <typename T>
struct Row {
  Elements<T> elements;
  int64_t size;
  int64_t tile;  // as many are on the chip at a time
  int head;
  bool fits;  // all are
  T* place;

  __device__ Row(const SdprunEntry& entry, int64_t channel, T* chip, int64_t capacity)
      : elements(entry.tensor, channel * entry.tensor.layout.inner),
        size(entry.tensor.layout.inner),
        head(elements.head()),
        fits(entry.place >= 0) {
    constexpr int kLanes = kVectorLanes<T>;
    tile = fits ? size : (capacity - kLanes) / kSdprunLanes * kSdprunLanes;
    place = chip + (fits ? entry.place : 0) + (kLanes - head % kLanes) % kLanes;
  }
};

// Calls visit(first element of the tile, their number) for each tile.
template <typename Team, typename T, typename Visit>
__device__ __forceinline__ void visit_tiles(const Row<T>& row, Visit visit) {
  if constexpr (Team::kFits) {
    visit(0, static_cast<int>(row.size));
  } else {
    FASTPRUNE_ROLLED
    for (int64_t begin = 0; begin < row.size; begin += row.tile) {
      visit(begin, static_cast<int>(min(row.tile, row.size - begin)));
    }
  }
}

template <typename Team, typename T>
__device__ __forceinline__ void add_squares(const T* values, int size,
                                            double (&lanes)[Team::kOwnLanes]) {
  if (Team::thread() >= kSdprunLanes) return;
  FASTPRUNE_ROLLED
  for (int first = Team::thread(); first < size; first += kSdprunLanes) {
    FASTPRUNE_UNROLLED
    for (int own = 0; own < Team::kOwnLanes; ++own) {
      const int i = first + own * Team::kThreads;
      if (i < size) lanes[own] = plus_square(lanes[own], values[i]);
    }
  }
}

// The sum of the squares after the step.
template <typename Team, typename T>
__device__ __forceinline__ double step_row(const Row<T>& row, const StepNumbers<T>& numbers) {
  if (row.size == 0) return 0;
  double lanes[Team::kOwnLanes] = {};
  visit_tiles<Team>(row, [&](int64_t begin, int size) {
    visit_lanes<kVectorLanes<T>>(
        Team::thread(), Team::kThreads, size, row.head, [&](int at, auto count) {
          constexpr int kCount = decltype(count)::value;
          store(row.place + at, step_lanes<kCount>(row.elements, begin + at, numbers));
        });
    Team::sync();
    add_squares<Team>(row.place, size, lanes);
    if (!Team::kFits) Team::sync();  // the next tile may take its place
  });
  return Team::total(lanes);
}

// Each thread writes the elements that it stepped.
template <typename Team, typename T>
__device__ __forceinline__ void write_row(const Row<T>& row, const Shrinkage<T>& shrinkage) {
  visit_tiles<Team>(row, [&](int64_t begin, int size) {
    visit_lanes<kVectorLanes<T>>(
        Team::thread(), Team::kThreads, size, row.head, [&](int at, auto count) {
          constexpr int kCount = decltype(count)::value;
          Lanes<T, kCount> v{};
          if (!shrinkage.pruned) {
            const bool on_chip = Team::kFits || row.fits;
            v = on_chip ? load<kCount>(row.place + at)
                        : load<kCount>(row.elements.accumulator + begin + at);
          }
          store_weights(row.elements, begin + at, shrinkage.weights(v));
        });
  });
}

template <typename Team, typename T>
__device__ __forceinline__ void shrink_group(const SdprunEntry* layer, int64_t channel,
                                             const SdprunNumbers& numbers, double factor,
                                             double* norms, T* chip, int64_t capacity) {
  double squares = 0;
  FASTPRUNE_ROLLED
  for (int m = 0; m < layer->num_members; ++m) {
    const StepNumbers<T> step(numbers.settings[layer[m].tensor.row], factor);
    squares += step_row<Team>(Row<T>(layer[m], channel, chip, capacity), step);
  }
  const double norm = sqrt(squares);
  const Shrinkage<T> shrinkage(norm, layer_threshold(*layer, numbers));
  if (Team::thread() == 0) norms[layer->tensor.first_group + channel] = norm;
  FASTPRUNE_ROLLED
  for (int m = 0; m < layer->num_members; ++m) {
    write_row<Team>(Row<T>(layer[m], channel, chip, capacity), shrinkage);
  }
}

// Neighbouring blocks take neighbouring chunks, so that each has its share of long and short ones.
// The chunks of a layer are its last member's. `capacity` is the memory of a team, in elements.
template <typename T, typename Team>
__global__ void __launch_bounds__(Team::kBlock, Team::kResident)
    shrink_rows(Table<SdprunEntry> table, SdprunNumbers numbers, double* norms, int64_t capacity) {
  if (is_skipped(numbers)) return;
  FASTPRUNE_DYNAMIC_SHARED(T, memory);
  T* const chip = memory + Team::number() * capacity;
  const double factor = gradient_factor(numbers);
  FASTPRUNE_ROLLED
  for (int64_t chunk = blockIdx.x; chunk < table.num_chunks; chunk += gridDim.x) {
    const SdprunEntry* last = table.entries + entry_of_chunk(table, chunk);
    const int64_t channel = (chunk - last->first_chunk) * Team::kTeams + Team::number();
    if (channel < last->tensor.layout.channels()) {
      shrink_group<Team>(last - last->member, channel, numbers, factor, norms, chip, capacity);
    }
    Team::sync();  // the next group takes the same memory
  }
}

// ---------------------------------------------------------------- tensors that are not pruned

template <typename T>
using ChunksOf = Chunks<typename ScoreTraits<T>::Key>;

template <typename T>
__global__ void __launch_bounds__(kWalkThreads, 4)
    step_plain(Table<SdprunEntry> table, SdprunNumbers numbers) {
  if (is_skipped(numbers)) return;
  const double factor = gradient_factor(numbers);
  walk_chunks(table, [&](const SdprunEntry& entry, int64_t chunk) {
    const StepNumbers<T> step(numbers.settings[entry.tensor.row], factor);
    const int64_t begin = chunk * ChunksOf<T>::kSize;
    const Elements<T> elements(entry.tensor, begin);
    const int64_t left = entry.tensor.layout.numel() - begin;
    const auto size = static_cast<int>(min(left, int64_t{ChunksOf<T>::kSize}));
    visit_lanes<kVectorLanes<T>>(
        threadIdx.x, kWalkThreads, size, elements.head(), [&](int at, auto count) {
          const auto v = step_lanes<decltype(count)::value>(elements, at, step);
          if (elements.weight != elements.accumulator) store_weights(elements, at, v);
        });
  });
}

// ---------------------------------------------------------------- the plan, on the host

// The entries of one launch (or of the two passes over columns).
struct Batch {
  std::vector<SdprunEntry> entries;
  int64_t num_chunks = 0;
  int64_t capacity = 0;  // on the chip, in elements; of rows alone

  Table<SdprunEntry> table(const SdprunEntry* memory) const {
    return {memory, static_cast<int32_t>(entries.size()), num_chunks};
  }
};

// All tensors of one type.
struct Plan {
  Batch warp_rows, block_rows, long_rows, columns, plain;
};

constexpr int64_t kWarpBytes = (4 << 10) + 64;  // of a group: four blocks of eight warps fit
constexpr int64_t kBlockBytes = 24 << 10;       // likewise: four blocks of 256 threads

int64_t ceil_divide(int64_t size, int64_t of) { return size / of + (size % of != 0); }

// On the chip a row begins as far from a boundary as it does in memory.
template <typename T>
int64_t room_of_row(int64_t size) {
  return ceil_divide(size + kVectorLanes<T> - 1, kVectorLanes<T>) * kVectorLanes<T>;
}

// Gives each row its place; returns the room for all. Their chunks follow the last one's number.
template <typename T>
int64_t place_rows(std::vector<SdprunEntry>& layer) {
  int64_t room = 0;
  for (SdprunEntry& entry : layer) {
    entry.place = room;
    room += room_of_row<T>(entry.tensor.layout.inner);
  }
  return room;
}

template <typename T>
void add_rows(Plan& plan, std::vector<SdprunEntry>& layer, size_t max_shared) {
  int64_t room = place_rows<T>(layer);
  const int64_t bytes = room * static_cast<int64_t>(sizeof(T));
  const bool is_short = bytes <= kWarpBytes;
  Batch& batch =
      is_short ? plan.warp_rows : (bytes <= kBlockBytes ? plan.block_rows : plan.long_rows);
  const size_t lanes = sizeof(double) * kSdprunLanes;  // in shared memory, too
  const auto max_room = static_cast<int64_t>((max_shared - lanes) / sizeof(Lanes<T, 1>));
  if (room > max_room) {
    for (SdprunEntry& entry : layer) entry.place = -1;
    room = max_room;
  }
  for (SdprunEntry& entry : layer) entry.first_chunk = batch.num_chunks;
  batch.capacity = std::max(batch.capacity, room);
  batch.num_chunks += ceil_divide(layer[0].tensor.layout.channels(), is_short ? Warp::kTeams : 1);
  batch.entries.insert(batch.entries.end(), layer.begin(), layer.end());
}

void add_columns(Batch& batch, std::vector<SdprunEntry>& layer, double*& parts) {
  for (SdprunEntry& entry : layer) {
    entry.parts = parts;
    parts += entry.tensor.layout.channels();
  }
  add_column_chunks(layer, batch.num_chunks);
  batch.entries.insert(batch.entries.end(), layer.begin(), layer.end());
}

std::vector<SdprunEntry> layer_entries(const std::vector<SdprunTensor>& tensors,
                                       const std::vector<size_t>& members) {
  std::vector<SdprunEntry> layer;
  int64_t group_size = 0;
  for (const size_t i : members) group_size += tensors[i].layout.size();
  for (const size_t i : members) {
    SdprunEntry entry{};
    entry.tensor = tensors[i];
    entry.group_size = group_size;
    entry.layer_row = tensors[members[0]].row;
    entry.member = static_cast<int32_t>(layer.size());
    entry.num_members = static_cast<int32_t>(members.size());
    layer.push_back(entry);
  }
  return layer;
}

template <typename T>
Plan make_plan(const std::vector<SdprunTensor>& tensors, size_t max_shared, double*& parts) {
  constexpr DType kDType = sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;
  Plan plan;
  for (const std::vector<size_t>& members : sdprun_layers(tensors)) {
    if (tensors[members[0]].dtype != kDType) continue;
    std::vector<SdprunEntry> layer = layer_entries(tensors, members);
    const bool has_rows = std::all_of(layer.begin(), layer.end(), [](const SdprunEntry& entry) {
      return entry.tensor.layout.has_rows();
    });
    has_rows ? add_rows<T>(plan, layer, max_shared) : add_columns(plan.columns, layer, parts);
  }
  for (const SdprunTensor& tensor : tensors) {
    const int64_t numel = tensor.layout.numel();
    if (tensor.dtype != kDType || tensor.first_group >= 0 || numel == 0) continue;
    SdprunEntry entry{};
    entry.tensor = tensor;
    entry.first_chunk = plan.plain.num_chunks;
    plan.plain.num_chunks += ChunksOf<T>::count(numel);
    plan.plain.entries.push_back(entry);
  }
  return plan;
}

struct Launcher {
  const SdprunNumbers& numbers;
  double* norms;
  SdprunEntry* memory;  // where the next batch's table is
  int max_blocks;
  Stream stream;

  template <typename Kernel, typename... Arguments>
  void run(Kernel kernel, const Batch& batch, int threads, size_t shared, Arguments... arguments) {
    launch(kernel, grid_of(batch.num_chunks, max_blocks), threads, shared, stream,
           batch.table(memory), numbers, arguments...);
  }

  template <typename T, typename Team>
  void rows(const Batch& batch) {
    if (batch.entries.empty()) return;
    const size_t shared = static_cast<size_t>(batch.capacity) * Team::kTeams * sizeof(T);
    run(shrink_rows<T, Team>, batch, Team::kBlock, shared, norms, batch.capacity);
    memory += batch.entries.size();
  }

  // In the order of the table.
  template <typename T>
  void all(const Plan& plan) {
    rows<T, Warp>(plan.warp_rows);
    rows<T, Block<kWalkThreads>>(plan.block_rows);
    rows<T, Block<kLongThreads>>(plan.long_rows);
    if (!plan.columns.entries.empty()) {
      shrink_columns<T>(plan.columns.table(memory), numbers, norms, max_blocks, stream);
      memory += plan.columns.entries.size();
    }
    if (!plan.plain.entries.empty()) run(step_plain<T>, plan.plain, kWalkThreads, 0);
    memory += plan.plain.entries.size();
  }
};

}  // namespace

size_t sdprun_update_scratch(const std::vector<SdprunTensor>& tensors) {
  size_t channels = 0;
  for (const SdprunTensor& tensor : tensors) channels += tensor.layout.channels();
  return tensors.size() * sizeof(SdprunEntry) + channels * sizeof(double);
}

void sdprun_update(const std::vector<SdprunTensor>& tensors, const SdprunNumbers& numbers,
                   double* norms, void* scratch, int max_blocks, size_t max_shared, Stream stream) {
  auto* const memory = static_cast<SdprunEntry*>(scratch);
  auto* parts = reinterpret_cast<double*>(memory + tensors.size());
  const Plan floats = make_plan<float>(tensors, max_shared, parts);
  const Plan doubles = make_plan<double>(tensors, max_shared, parts);
  std::vector<SdprunEntry> entries;
  for (const Plan* plan : {&floats, &doubles}) {
    for (const Batch* batch :
         {&plan->warp_rows, &plan->block_rows, &plan->long_rows, &plan->columns, &plan->plain}) {
      entries.insert(entries.end(), batch->entries.begin(), batch->entries.end());
    }
  }
  upload_table(entries, memory, stream);
  Launcher launcher{numbers, norms, memory, max_blocks, stream};
  launcher.all<float>(floats);
  launcher.all<double>(doubles);
}

}  // namespace fastprune
