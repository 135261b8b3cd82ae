// One layer after another: its dense weights are moved, its attention, and what both select is
// written as its parameters while the weights are still in a cache. Nothing else of a layer enters
// another's step, since the density that pulls at all of them is that of the attention before.
#include "cpu/aswl.h"

#include <algorithm>
#include <atomic>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/aswl.h"
#include "common/narrow.h"
#include "cpu/aswl_candidates.h"
#include "cpu/isa.h"
#include "cpu/prefetch.h"
#include "cpu/select.h"
#include "cpu/sgd.h"

namespace fastprune {
namespace {

// Which elements of a piece of memory belong to a selection: those whose keys are above the bound,
// or, where there is a mask, those that it names.
struct Choice {
  int64_t bound;
  const uint8_t* mask;
};

struct MoveTile {
  void* dense;
  void* momentum;  // or null
  const void* gradient;
  int64_t size;
};

struct Motion {
  SgdSettings sgd;
  double gradient_factor, attention, decay;
};

struct ShowTile {
  const void* dense;
  void* parameter;
  int64_t size;
};

using Move = void (*)(const MoveTile& tile, const Motion& motion, const Choice& choice, void* keys,
                      double* run_sums);
using Show = void (*)(const ShowTile& tile, double attention, const Choice& choice, bool stream);

}  // namespace
}  // namespace fastprune

#define FASTPRUNE_ISA_BODY "cpu/aswl.inc"
#include "cpu/foreach_isa.h"

namespace fastprune {
namespace {

static_assert(kChunk % kAswlRun == 0, "a full chunk is whole runs");

// From so many bytes on, parameters would leave the caches before they are read again.
constexpr int64_t kStreamBytes = int64_t{32} << 20;
// A layer of more elements is the work of all threads, others are of one each.
constexpr int64_t kShared = int64_t{4} << 20;

// The tensors of a layer, or one that is of none.
struct Layer {
  const AswlTensor* begin;
  const AswlTensor* end;
  int64_t elements;
  double slope;  // of the density over the attention

  int32_t number() const { return begin->layer; }
  const AswlTensor* weight() const {  // the first that is pruned
    return std::find_if(begin, end, [](const AswlTensor& t) { return t.position >= 0; });
  }
};

void run_here(int64_t begin, int64_t end, int64_t, ParallelFor::Body body, void* context) {
  body(begin, end, context);
}

double sum_of_runs(const std::vector<double>& sums) {
  double lanes[kAswlLanes] = {};
  for (size_t i = 0; i < sums.size(); ++i) lanes[i % kAswlLanes] += sums[i];
  return baseline::sum_of_lanes(lanes);
}

int64_t key_of(double threshold, DType dtype) {
  return dtype == DType::kFloat64 ? score_key<ScoreKind::kMagnitude>(threshold)
                                  : score_key<ScoreKind::kMagnitude>(static_cast<float>(threshold));
}

// Calls run(offset, size, choice) for a chunk of a tensor. It is before the tie end, behind it, or
// holds it: only that one, and tensors whose memory is in another order than their positions, need
// a look at single positions.
template <typename Run>
void with_choice(const AswlTensor& t, double threshold, int64_t tie_end, int64_t offset,
                 const Run& run) {
  const int64_t size = std::min(kChunk, t.numel - offset);
  if (t.position < 0) return run(size, Choice{-1, nullptr});
  const int64_t limit = key_of(threshold, t.dtype);
  const bool row_major = t.layout.rank == 0;
  const int64_t first = t.position + (row_major ? offset : 0);
  const int64_t last = t.position + (row_major ? offset + size : t.numel);
  if (last <= tie_end) return run(size, Choice{limit - 1, nullptr});
  if (first >= tie_end) return run(size, Choice{limit, nullptr});
  uint8_t mask[kChunk];
  const auto mark = [&](auto of_type) {
    const auto* dense = static_cast<const decltype(of_type)*>(t.dense) + offset;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t key = score_key<ScoreKind::kMagnitude>(dense[i]);
      mask[i] =
          key > limit || (key == limit && t.position + position_of(t.layout, offset + i) < tie_end);
    }
  };
  t.dtype == DType::kFloat64 ? mark(double{}) : mark(float{});
  run(size, Choice{limit, mask});
}

class Step {
 public:
  Step(const AswlNumbers& numbers, const AswlState& state, double push, bool stream)
      : numbers_(numbers), state_(state), push_(push), stream_(stream) {}

  void run(const Layer& layer, ParallelFor parallel_for) const {
    if (layer.number() < 0) return run_plain(*layer.begin, parallel_for);
    const AswlTensor* const weight = layer.weight();
    weight->dtype == DType::kFloat64 ? run_layer<uint64_t>(layer, parallel_for)
                                     : run_layer<uint32_t>(layer, parallel_for);
  }

 private:
  void run_plain(const AswlTensor& t, ParallelFor parallel_for) const {
    const AswlAttention none{1, 0, 0};
    move(t, none, 0, static_cast<Candidates<uint32_t>*>(nullptr), parallel_for);
    if (t.parameter != t.dense) show(t, none, 0, parallel_for);
  }

  template <typename Key>
  void run_layer(const Layer& layer, ParallelFor parallel_for) const {
    AswlAttention& attention = state_.attention[layer.number()];
    int64_t& tie_end = state_.tie_end[layer.number()];
    Candidates<Key> candidates(attention.threshold);
    double inner = 0;
    for (const AswlTensor* t = layer.begin; t != layer.end; ++t) {
      const double sum =
          move(*t, attention, tie_end, t->position < 0 ? nullptr : &candidates, parallel_for);
      if (t->is_scaled) inner += sum;
    }
    advance(attention, inner, push_, layer.slope, numbers_.settings);
    const Threshold found = select(layer, attention.value, candidates, parallel_for);
    attention.threshold = found.score;
    tie_end = numbers_.keep_ties ? INT64_MAX : found.tie_end;
    for (const AswlTensor* t = layer.begin; t != layer.end; ++t) {
      show(*t, attention, tie_end, parallel_for);
    }
  }

  // Returns the sum of gradients times what was kept.
  template <typename Key>
  double move(const AswlTensor& t, const AswlAttention& attention, int64_t tie_end,
              Candidates<Key>* candidates, ParallelFor parallel_for) const {
    const AswlSettings& s = numbers_.settings;
    const bool decays = t.position >= 0 && s.l2 != 0;
    const Motion motion{{s.lr, t.momentum == nullptr ? 0 : s.momentum, 0, 0, 0, 0},
                        numbers_.gradient_factor,
                        t.is_scaled ? attention.value : 1,
                        2 * s.l2};
    const Isa isa = best_isa();
    std::vector<double> sums((t.numel + kAswlRun - 1) / kAswlRun);
    for_chunks(t, parallel_for, [&](int64_t begin) {
      with_choice(t, attention.threshold, tie_end, begin, [&](int64_t size, Choice choice) {
        const Move move = FASTPRUNE_FOR_ISA(isa, choose_move)(
            t.dtype, t.gradient_dtype, choice.mask != nullptr, t.momentum != nullptr, decays);
        typename Candidates<Key>::Part part(candidates);
        alignas(kCacheLine) char keys[kTile * sizeof(uint64_t)];
        for (int64_t offset = begin; offset < begin + size; offset += kTile) {
          const MoveTile tile{advanced(t.dense, t.dtype, offset),
                              advanced(t.momentum, t.dtype, offset),
                              advanced(t.gradient, t.gradient_dtype, offset),
                              std::min(kTile, begin + size - offset)};
          if (t.gradient != nullptr) {
            move(tile, motion, choice, keys, sums.data() + offset / kAswlRun);
          } else {
            part.form(tile.dense, tile.size, reinterpret_cast<Key*>(keys));
          }
          part.add(reinterpret_cast<const Key*>(keys), tile.size);
          if (choice.mask != nullptr) choice.mask += kTile;
        }
      });
    });
    return sum_of_runs(sums);
  }

  template <typename Key>
  Threshold select(const Layer& layer, double attention, const Candidates<Key>& candidates,
                   ParallelFor parallel_for) const {
    std::vector<TensorEntry> pool;
    int64_t size = 0;
    for (const AswlTensor* t = layer.begin; t != layer.end; ++t) {
      if (t->position < 0) continue;
      pool.push_back({t->dense, nullptr, t->numel, t->position, 0, t->dtype, t->dtype, t->layout});
      size += t->numel;
    }
    const int64_t kept = num_kept(attention, size, numbers_.settings.alpha);
    Threshold found{};
    if (!candidates.select(kept, size, parallel_for, &found)) {
      select_threshold(pool.data(), pool.size(), ScoreKind::kMagnitude, &kept, 1, parallel_for,
                       &found);
    }
    return found;
  }

  void show(const AswlTensor& t, const AswlAttention& attention, int64_t tie_end,
            ParallelFor parallel_for) const {
    const Isa isa = best_isa();
    const double factor = t.is_scaled ? attention.value : 1;
    for_chunks(t, parallel_for, [&](int64_t offset) {
      with_choice(t, attention.threshold, tie_end, offset, [&](int64_t size, const Choice& choice) {
        const ShowTile tile{advanced(t.dense, t.dtype, offset),
                            advanced(t.parameter, t.parameter_dtype, offset), size};
        FASTPRUNE_FOR_ISA(isa, choose_show)
        (t.dtype, t.parameter_dtype, choice.mask != nullptr)(tile, factor, choice, stream_);
      });
    });
  }

  // Calls run(offset).
  template <typename Run>
  static void for_chunks(const AswlTensor& t, ParallelFor parallel_for, const Run& run) {
    const int64_t chunks = (t.numel + kChunk - 1) / kChunk;
    parallel_for(chunks, grain_of(chunks, t.numel), [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) run(c * kChunk);
#if defined(__x86_64__)
      _mm_sfence();  // streamed parameters are there for whoever is told that this is done
#endif
    });
  }

  const AswlNumbers& numbers_;
  const AswlState& state_;
  double push_;
  bool stream_;
};

std::vector<Layer> layers_of(const std::vector<AswlTensor>& tensors) {
  std::vector<Layer> layers;
  const AswlTensor* const end = tensors.data() + tensors.size();
  for (const AswlTensor* t = tensors.data(); t != end;) {
    Layer layer{t, t, 0, 0};
    do {
      layer.elements += layer.end->numel;
      ++layer.end;
    } while (layer.end != end && t->layer >= 0 && layer.end->layer == t->layer);
    layers.push_back(layer);
    t = layer.end;
  }
  return layers;
}

// Fills in the layers' slopes and advances the multiplier; returns what pushes along the slopes.
double push_on(std::vector<Layer>& layers, const AswlState& state, const AswlSettings& s) {
  double size = 0, density = 0;
  const auto for_layers = [&](const auto& f) {
    for (Layer& layer : layers) {
      if (layer.number() >= 0) f(layer, state.attention[layer.number()]);
    }
  };
  for_layers([&](Layer& layer, const AswlAttention&) {
    size += static_cast<double>(layer.weight()->numel);
  });
  for_layers([&](Layer& layer, const AswlAttention& a) {
    const double share = static_cast<double>(layer.weight()->numel) / size;
    density += density_term(a.value, share, s.alpha);
    layer.slope = density_slope(a.value, share, s.alpha);
  });
  AswlGap gap{density - s.target};
  for_layers([&](Layer& layer, const AswlAttention& a) { gap.add(a, layer.slope); });
  return advanced_push(*state.multiplier, gap, s);
}

}  // namespace

void aswl_step(const std::vector<AswlTensor>& tensors, const AswlNumbers& numbers,
               const AswlState& state, ParallelFor parallel_for) {
  std::vector<Layer> layers = layers_of(tensors);
  const double push = push_on(layers, state, numbers.settings);
  int64_t elements = 0, bytes = 0;
  for (const AswlTensor& t : tensors) {
    bytes += t.numel * (t.parameter_dtype == DType::kFloat32 ? 4 : 2);
  }
  const Step step(numbers, state, push, bytes >= kStreamBytes);
  std::vector<const Layer*> own;  // of one thread each, the large ones first
  for (const Layer& layer : layers) {
    if (layer.elements > kShared) {
      step.run(layer, parallel_for);
    } else {
      own.push_back(&layer);
      elements += layer.elements;
    }
  }
  std::stable_sort(own.begin(), own.end(),
                   [](const Layer* a, const Layer* b) { return a->elements > b->elements; });
  std::atomic<size_t> next{0};
  parallel_for(own.size(), grain_of(own.size(), elements), [&](int64_t, int64_t) {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < own.size();) {
      step.run(*own[i], ParallelFor{run_here});
    }
  });
}

}  // namespace fastprune
