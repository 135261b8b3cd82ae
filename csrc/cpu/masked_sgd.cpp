// One pass over weights, gradients and momenta; the mask adds a bit to an element's 20 bytes.
#include "cpu/masked_sgd.h"

#include "common/narrow.h"
#include "cpu/isa.h"
#include "cpu/narrow_copy.h"
#include "cpu/prefetch.h"
#include "cpu/sgd.h"

namespace fastprune {
namespace {

enum class Buffer { kNone, kPlain, kNesterov };

struct MaskedTile {
  void* weight;
  void* momentum;  // or null
  const void* gradient;
  const uint8_t* mask;  // or null
  int64_t size;
};

using MaskedStep = void (*)(const MaskedTile& tile, const SgdSettings& settings,
                            double gradient_factor);

}  // namespace
}  // namespace fastprune

#define FASTPRUNE_ISA_BODY "cpu/masked_sgd.inc"
#include "cpu/foreach_isa.h"

namespace fastprune {
namespace {

static_assert(kChunk % kMaskByte == 0, "the bits of a chunk begin with a byte");

MaskedTile tile_of(const MaskedWeight& t, const SgdWork& work) {
  return {advanced(t.weight, t.dtype, work.offset), advanced(t.momentum, t.dtype, work.offset),
          advanced(t.gradient, t.gradient_dtype, work.offset),
          t.mask == nullptr ? nullptr : t.mask + work.offset / kMaskByte, work.size};
}

// Without a buffer the momentum is 0, whatever the settings say.
SgdSettings settings_of(const MaskedWeight& t, const SgdSettings* settings) {
  SgdSettings s = settings[t.row];
  if (t.momentum == nullptr) s.momentum = s.nesterov = 0;
  return s;
}

Buffer buffer_of(const MaskedWeight& t, const SgdSettings& s) {
  if (t.momentum == nullptr) return Buffer::kNone;
  return s.nesterov != 0 ? Buffer::kNesterov : Buffer::kPlain;
}

}  // namespace

void masked_sgd(const std::vector<MaskedWeight>& weights, const SgdSettings* settings,
                double gradient_factor, ParallelFor parallel_for) {
  const Isa isa = best_isa();
  for_work(weights, parallel_for, [&](const SgdWork& work) {
    const MaskedWeight& t = weights[work.tensor];
    const SgdSettings s = settings_of(t, settings);
    const MaskedStep step = FASTPRUNE_FOR_ISA(isa, choose_masked_step)(
        t.dtype, t.gradient_dtype, buffer_of(t, s), t.mask != nullptr, s.weight_decay != 0);
    const MaskedTile tile = tile_of(t, work);
    step(tile, s, gradient_factor);
    if (t.copy != nullptr) {
      narrow_copy(tile.weight, advanced(t.copy, t.copy_dtype, work.offset), t.copy_dtype,
                  work.size);
    }
  });
}

}  // namespace fastprune
