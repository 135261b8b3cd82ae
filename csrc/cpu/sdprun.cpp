// A unit of work is a few channels of a layer, or a piece of a tensor that is not pruned: moved,
// measured and written as weights while it stays in the first-level cache. The weights are not
// read.
#include "cpu/sdprun.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/narrow.h"
#include "cpu/isa.h"
#include "cpu/prefetch.h"

namespace fastprune {
namespace {

// A tensor's move. Made before the work begins: what a unit of work has just written to memory may
// be read only after the streamed weights before it.
struct Motion {
  void* accumulator;
  void* momentum;
  const void* gradient;
  double lr, beta, gradient_factor;
};

// What a group's weights are: its accumulator times a factor, or zeros.
struct Shrinkage {
  double factor;
  bool pruned;
};

constexpr int64_t kTileChannels = 64;

// Rows of weights that are still to be written. That overlaps with the next rows, which are read:
// a core that only writes leaves half of the memory's time unused.
struct Unwritten {
  const float* accumulator;  // where it goes on
  float* weight;
  const Shrinkage* by;  // of this row and those that follow
  int64_t left;         // of this row
  int64_t rows, width;

  void advance(int64_t size) {
    accumulator += size;
    weight += size;
    left -= size;
    if (left > 0) return;
    left = width;
    ++by;
    --rows;
  }
};

struct Pending {
  Unwritten unwritten;
  Shrinkage by[kTileChannels];
};

using Move = void (*)(const Motion& motion, int64_t offset, int64_t size);
using MoveRows = void (*)(const Motion& motion, int64_t offset, int64_t rows, int64_t width,
                          double* sums, Unwritten& unwritten);
using AddSquares = void (*)(const void* values, int64_t size, int64_t lane, double* lanes);
using AddRowSquares = void (*)(const void* values, int64_t rows, int64_t width, double* sums);
using ShrinkRows = void (*)(const void* values, int64_t rows, int64_t width, const Shrinkage* by,
                            bool stream, void* weights);

struct Kernels {
  Move move;
  MoveRows move_rows;
  AddSquares add_squares;
  AddRowSquares add_row_squares;
  ShrinkRows shrink_rows;
};

inline float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fused_multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

}  // namespace
}  // namespace fastprune

#define FASTPRUNE_ISA_BODY "cpu/sdprun.inc"
#include "cpu/foreach_isa.h"

namespace fastprune {
namespace {

constexpr int64_t kTileElements = 2048;  // with gradients 16 KB
constexpr int64_t kSplitChannels = 16;   // of a tensor whose channels are in pieces: a cache line
// From so many bytes on, weights would leave the caches before they are read again.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

template <typename Pointer>
Pointer* advanced(Pointer* pointer, DType dtype, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
  return pointer == nullptr ? nullptr
                            : static_cast<Byte*>(pointer) + elements * element_size(dtype);
}

// Tensors that share channels, or one that is not pruned.
struct Layer {
  const SdprunTensor* begin;
  const SdprunTensor* end;
  double threshold;

  bool is_pruned() const { return begin->first_group >= 0; }
  int64_t channels() const { return begin->layout.channels(); }
  int64_t size() const {  // elements of a channel
    int64_t size = 0;
    for (const SdprunTensor* t = begin; t != end; ++t) size += t->layout.size();
    return size;
  }
};

std::vector<Layer> layers_of(const std::vector<SdprunTensor>& tensors,
                             const SdprunNumbers& numbers) {
  std::vector<Layer> layers;
  const SdprunTensor* const end = tensors.data() + tensors.size();
  for (const SdprunTensor* t = tensors.data(); t != end;) {
    Layer layer{t, t + 1, 0};
    while (layer.is_pruned() && layer.end != end && layer.end->first_group == t->first_group) {
      ++layer.end;
    }
    layer.threshold =
        group_threshold(numbers.progress[t->row], numbers.settings[t->row], layer.size());
    layers.push_back(layer);
    t = layer.end;
  }
  return layers;
}

Kernels kernels_of(const SdprunTensor& t) {
  const Isa isa = best_isa();
  return FASTPRUNE_FOR_ISA(isa, kernels_for)(t.dtype, t.gradient_dtype, t.weight_dtype,
                                             t.momentum != nullptr);
}

// Channels of a pruned layer, elements of another.
struct Work {
  const Layer* layer;
  int64_t begin, end;
};

void finish(Unwritten& unwritten) {
  const Isa isa = best_isa();
  FASTPRUNE_FOR_ISA(isa, write_some)(unwritten, INT64_MAX);
}

Motion motion_of(const SdprunTensor& t, const SdprunNumbers& numbers) {
  const SdprunSettings& s = numbers.settings[t.row];
  const double factor = numbers.gradient_factor;
  return {t.accumulator, t.momentum, t.gradient,
          s.lr,          s.momentum, s.maximize != 0 ? -factor : factor};
}

class Update {
 public:
  Update(const std::vector<SdprunTensor>& tensors, const SdprunNumbers& numbers, double* norms,
         bool stream)
      : first_(tensors.data()), norms_(norms), stream_(stream) {
    for (const SdprunTensor& t : tensors) {
      motions_.push_back(motion_of(t, numbers));
      kernels_.push_back(kernels_of(t));
    }
  }

  void run(const Work& work, Pending& pending) const {
    const Layer& layer = *work.layer;
    if (!layer.is_pruned()) return run_unpruned(work);
    double sums[kTileChannels] = {};
    for (const SdprunTensor* t = layer.begin; t != layer.end; ++t) {
      for_runs(*t, work, [&](int64_t first, int64_t channels) {
        move_and_measure(*t, first, channels, sums + (first - work.begin), pending.unwritten);
      });
    }
    finish(pending.unwritten);
    Shrinkage* const by = pending.by;
    for (int64_t c = 0; c < work.end - work.begin; ++c) {
      const double norm = std::sqrt(sums[c]);
      norms_[layer.begin->first_group + work.begin + c] = norm;
      by[c] = {group_factor(norm, layer.threshold), is_pruned(norm, layer.threshold)};
    }
    for (const SdprunTensor* t = layer.begin; t != layer.end; ++t) {
      if (t == layer.begin && can_wait(*t)) {
        pending.unwritten = all_of(*t, work, by);
        continue;
      }
      for_runs(*t, work, [&](int64_t first, int64_t channels) {
        shrink(*t, first, channels, by + (first - work.begin));
      });
    }
  }

 private:
  // Of a layer the first tensor is the large one.
  bool can_wait(const SdprunTensor& t) const {
    return stream_ && t.layout.has_rows() && t.weight_dtype == DType::kFloat32;
  }

  static Unwritten all_of(const SdprunTensor& t, const Work& work, const Shrinkage* by) {
    const int64_t begin = t.layout.begin(work.begin), width = t.layout.inner;
    return {static_cast<const float*>(t.accumulator) + begin,
            static_cast<float*>(t.weight) + begin,
            by,
            width,
            work.end - work.begin,
            width};
  }

  // Channels that are neighbours in memory.
  template <typename F>
  static void for_runs(const SdprunTensor& t, const Work& work, const F& f) {
    if (t.layout.has_rows()) return f(work.begin, work.end - work.begin);
    const int64_t columns = t.layout.columns;
    for (int64_t first = work.begin; first < work.end;) {
      const int64_t end = std::min(work.end, (first / columns + 1) * columns);
      f(first, end - first);
      first = end;
    }
  }

  const Motion& motion(const SdprunTensor& t) const { return motions_[&t - first_]; }
  const Kernels& kernels(const SdprunTensor& t) const { return kernels_[&t - first_]; }

  void move(const SdprunTensor& t, int64_t offset, int64_t size) const {
    if (t.gradient != nullptr) kernels(t).move(motion(t), offset, size);
  }

  void move_and_measure(const SdprunTensor& t, int64_t first, int64_t channels, double* sums,
                        Unwritten& unwritten) const {
    const int64_t begin = t.layout.begin(first), inner = t.layout.inner;
    if (t.layout.has_rows()) {
      if (t.gradient != nullptr) {
        kernels(t).move_rows(motion(t), begin, channels, inner, sums, unwritten);
      } else {
        kernels(t).add_row_squares(advanced(t.accumulator, t.dtype, begin), channels, inner, sums);
      }
      return;
    }
    alignas(kCacheLine) double lanes[kSplitChannels][kSdprunLanes] = {};
    for (int64_t m = 0; m < t.layout.middle; ++m) {
      const int64_t offset = begin + m * t.layout.columns * inner;
      move(t, offset, channels * inner);
      for (int64_t c = 0; c < channels; ++c) {
        kernels(t).add_squares(advanced(t.accumulator, t.dtype, offset + c * inner), inner,
                               m * inner % kSdprunLanes, lanes[c]);
      }
    }
    for (int64_t c = 0; c < channels; ++c) sums[c] += baseline::lane_sum(lanes[c], kSdprunLanes);
  }

  void shrink(const SdprunTensor& t, int64_t first, int64_t channels, const Shrinkage* by) const {
    for (int64_t m = 0; m < t.layout.middle; ++m) {
      const int64_t offset = t.layout.begin(first) + m * t.layout.columns * t.layout.inner;
      kernels(t).shrink_rows(advanced(t.accumulator, t.dtype, offset), channels, t.layout.inner, by,
                             stream_, advanced(t.weight, t.weight_dtype, offset));
    }
  }

  void run_unpruned(const Work& work) const {
    const SdprunTensor& t = *work.layer->begin;
    const int64_t size = work.end - work.begin;
    move(t, work.begin, size);
    if (t.accumulator == t.weight) return;
    const Shrinkage as_it_is{1, false};
    kernels(t).shrink_rows(advanced(t.accumulator, t.dtype, work.begin), 1, size, &as_it_is,
                           stream_, advanced(t.weight, t.weight_dtype, work.begin));
  }

  const SdprunTensor* first_;
  std::vector<Motion> motions_;
  std::vector<Kernels> kernels_;
  double* norms_;
  bool stream_;
};

int64_t tile_of(const Layer& layer) {
  if (!layer.is_pruned()) return kTileElements;
  const bool in_rows = std::all_of(layer.begin, layer.end,
                                   [](const SdprunTensor& t) { return t.layout.has_rows(); });
  if (!in_rows) return kSplitChannels;
  const int64_t size = std::max<int64_t>(1, layer.size());
  return std::clamp<int64_t>(kTileElements / size, 1, kTileChannels);
}

// How many units are worth a thread: 64K elements of them.
int64_t grain_of(int64_t units, int64_t elements) {
  constexpr int64_t kWorthwhile = 1 << 16;
  return std::max<int64_t>(1, units * kWorthwhile / std::max<int64_t>(1, elements));
}

// A NaN ranks above infinity; norms have no sign.
uint64_t rank_of(double norm) { return score_key<ScoreKind::kMagnitude>(norm); }

// The accumulator of a channel as its weights.
void restore(const SdprunTensor& t, int64_t channel) {
  const Kernels kernels = kernels_of(t);
  const Shrinkage as_it_is{1, false};
  for (int64_t m = 0; m < t.layout.middle; ++m) {
    const int64_t offset = t.layout.begin(channel) + m * t.layout.columns * t.layout.inner;
    kernels.shrink_rows(advanced(t.accumulator, t.dtype, offset), 1, t.layout.inner, &as_it_is,
                        false, advanced(t.weight, t.weight_dtype, offset));
  }
}

void guard_layer(const Layer& layer, const SdprunWhole& whole, double min_groups,
                 const double* norms) {
  norms += whole.first;
  const auto kept = std::count_if(norms, norms + whole.size,
                                  [&](double norm) { return !is_pruned(norm, layer.threshold); });
  if (static_cast<double>(kept) >= min_groups) return;
  std::vector<int64_t> order(whole.size);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return rank_of(norms[i]) > rank_of(norms[j]); });
  const int64_t own = layer.begin->first_group - whole.first;  // the first channel that is here
  for (int64_t i = 0; i < whole.size && static_cast<double>(i) < min_groups; ++i) {
    const int64_t channel = order[i] - own;
    if (channel < 0 || channel >= layer.channels()) continue;
    for (const SdprunTensor* t = layer.begin; t != layer.end; ++t) restore(*t, channel);
  }
}

}  // namespace

void sdprun_update(const std::vector<SdprunTensor>& tensors, const SdprunNumbers& numbers,
                   double* norms, ParallelFor parallel_for) {
  const std::vector<Layer> layers = layers_of(tensors, numbers);
  std::vector<Work> work;
  for (const Layer& layer : layers) {
    const int64_t tile = tile_of(layer);
    const int64_t end = layer.is_pruned() ? layer.channels() : layer.begin->layout.numel();
    for (int64_t begin = 0; begin < end; begin += tile) {
      work.push_back({&layer, begin, std::min(begin + tile, end)});
    }
  }
  int64_t elements = 0, bytes = 0;
  for (const SdprunTensor& t : tensors) {
    elements += t.layout.numel();
    bytes += t.layout.numel() * element_size(t.weight_dtype);
  }
  const Update update(tensors, numbers, norms, bytes >= kStreamBytes);
  parallel_for(work.size(), grain_of(work.size(), elements), [&](int64_t first, int64_t last) {
    Pending pending{};
    for (int64_t i = first; i < last; ++i) update.run(work[i], pending);
    finish(pending.unwritten);
#if defined(__x86_64__)
    _mm_sfence();  // streamed weights are there for whoever is told that this is done
#endif
  });
}

void sdprun_guard(const std::vector<SdprunTensor>& tensors, const std::vector<SdprunWhole>& wholes,
                  const SdprunNumbers& numbers, const double* norms) {
  for (const Layer& layer : layers_of(tensors, numbers)) {
    if (!layer.is_pruned()) continue;
    guard_layer(layer, wholes[layer.begin - tensors.data()],
                numbers.settings[layer.begin->row].min_groups, norms);
  }
}

}  // namespace fastprune
