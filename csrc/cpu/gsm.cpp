// One pass over weights, gradients and momenta. The threshold comes from select_threshold; whether
// an element is active follows from the element alone, so nothing about the pool is stored.
#include "cpu/gsm.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "common/narrow.h"
#include "cpu/isa.h"
#include "cpu/key_tiles.h"
#include "cpu/prefetch.h"

namespace fastprune {
namespace {

enum class Gating { kNone, kFrom, kAbove, kMask };

struct StepTile {
  void* weight;
  void* momentum;
  const void* gradient;
  const uint8_t* active;  // for Gating::kMask
  int64_t size;
};

struct StepNumbers {
  double lr, momentum, dampening, weight_decay, gradient_factor;
  uint64_t limit;  // the threshold's key
};

using Step = void (*)(const StepTile& tile, const StepNumbers& numbers);
using Narrow = void (*)(const void* weight, void* copy, int64_t size);

inline float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fused_multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

}  // namespace
}  // namespace fastprune

#define FASTPRUNE_ISA_BODY "cpu/gsm.inc"
#include "cpu/foreach_isa.h"

namespace fastprune {
namespace {

int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

template <typename Pointer>
Pointer* advanced(Pointer* pointer, DType dtype, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
  return static_cast<Byte*>(pointer) + elements * element_size(dtype);
}

struct Work {
  size_t tensor;
  int64_t offset;
  int64_t size;
};

class Update {
 public:
  Update(const std::vector<GsmWeight>& weights, const std::vector<GsmGate>& gates, GsmBlock block,
         const GsmNumbers& numbers)
      : weights_(weights), gates_(gates), block_(block), numbers_(numbers) {
    limit32_ = score_key<ScoreKind::kSaliency>(static_cast<float>(numbers.threshold));
    limit64_ = score_key<ScoreKind::kSaliency>(numbers.threshold);
  }

  // A chunk is before the tie end, behind it, or the one that holds it: only that one, and tensors
  // whose memory is in another order than their positions, need a look at single positions.
  void run(const Work& work) const {
    const GsmWeight& t = weights_[work.tensor];
    if (t.position < 0) return step(work, Gating::kNone, nullptr);
    uint8_t active[kChunk];
    if (!gates_.empty()) {
      expand_gate(work, active);
      return step(work, Gating::kMask, active);
    }
    const bool row_major = t.layout.rank == 0;
    const int64_t first = t.position + (row_major ? work.offset : 0);
    const int64_t last = t.position + (row_major ? work.offset + work.size : t.numel);
    if (last <= numbers_.tie_end) return step(work, Gating::kFrom, nullptr);
    if (first >= numbers_.tie_end) return step(work, Gating::kAbove, nullptr);
    mark_active(work, active);
    step(work, Gating::kMask, active);
  }

 private:
  void step(const Work& work, Gating gating, const uint8_t* active) const {
    const GsmWeight& t = weights_[work.tensor];
    const GsmSettings& s = numbers_.settings[t.row];
    const StepTile tile{advanced(t.weight, t.dtype, work.offset),
                        advanced(t.momentum, t.dtype, work.offset),
                        advanced(t.gradient, t.gradient_dtype, work.offset), active, work.size};
    const double sign = s.maximize != 0 ? -1 : 1;
    const StepNumbers numbers{s.lr,
                              s.momentum,
                              s.dampening,
                              s.weight_decay,
                              sign * numbers_.gradient_factor,
                              t.dtype == DType::kFloat64 ? limit64_ : limit32_};
    const Isa isa = best_isa();
    FASTPRUNE_FOR_ISA(isa, choose_step)
    (t.dtype, t.gradient_dtype, gating, s.weight_decay != 0, s.nesterov != 0)(tile, numbers);
    if (t.copy != nullptr) {
      FASTPRUNE_FOR_ISA(isa, choose_narrow)
      (t.copy_dtype)(tile.weight, advanced(t.copy, t.copy_dtype, work.offset), work.size);
    }
  }

  void expand_gate(const Work& work, uint8_t* active) const {
    const Layout& layout = weights_[work.tensor].layout;
    const GsmGate& gate = gates_[work.tensor];
    const int64_t row = gate.inputs * gate.taps;
    const int64_t block_columns = (gate.inputs + block_.inputs - 1) / block_.inputs;
    for (int64_t i = 0; i < work.size; ++i) {
      const int64_t position = position_of(layout, work.offset + i);
      const int64_t output = position / row, column = position % row;
      const int64_t input = column / gate.taps, tap = column % gate.taps;
      const int64_t block = output / block_.outputs * block_columns + input / block_.inputs;
      active[i] = gate.kept[block * gate.taps + tap];
    }
  }

  void mark_active(const Work& work, uint8_t* active) const {
    const GsmWeight& t = weights_[work.tensor];
    if (t.dtype == DType::kFloat64) return mark<double, double>(work, active);
    switch (t.gradient_dtype) {
      case DType::kBFloat16:
        return mark<float, BFloat16>(work, active);
      case DType::kFloat16:
        return mark<float, Float16>(work, active);
      default:
        return mark<float, float>(work, active);
    }
  }

  template <typename Weight, typename Gradient>
  void mark(const Work& work, uint8_t* active) const {
    const GsmWeight& t = weights_[work.tensor];
    const Weight* weight = static_cast<const Weight*>(t.weight) + work.offset;
    const Gradient* gradient = static_cast<const Gradient*>(t.gradient) + work.offset;
    const uint64_t limit = t.dtype == DType::kFloat64 ? limit64_ : limit32_;
    for (int64_t i = 0; i < work.size; ++i) {
      const uint64_t key = score_key<ScoreKind::kSaliency>(weight[i] * widen(gradient[i]));
      active[i] =
          key > limit ||
          (key == limit && t.position + position_of(t.layout, work.offset + i) < numbers_.tie_end);
    }
  }

  const std::vector<GsmWeight>& weights_;
  const std::vector<GsmGate>& gates_;
  GsmBlock block_;
  const GsmNumbers& numbers_;
  uint64_t limit32_, limit64_;
};

}  // namespace

void gsm_update(const std::vector<GsmWeight>& weights, const std::vector<GsmGate>& gates,
                GsmBlock block, const GsmNumbers& numbers, ParallelFor parallel_for) {
  std::vector<Work> work;
  int64_t elements = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t numel = weights[i].numel;
    elements += numel;
    for (int64_t offset = 0; offset < numel; offset += kChunk) {
      work.push_back({i, offset, std::min(kChunk, numel - offset)});
    }
  }
  const Update update(weights, gates, block, numbers);
  parallel_for(work.size(), grain_of(work.size(), elements), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) update.run(work[i]);
  });
}

}  // namespace fastprune
