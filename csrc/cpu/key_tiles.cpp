#include "cpu/key_tiles.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "cpu/prefetch.h"

#define FASTPRUNE_ISA_BODY "cpu/key_tiles.inc"
#include "cpu/foreach_isa.h"

namespace fastprune {

template <>
TileFunctions<uint32_t> tile_functions<uint32_t>(ScoreKind kind) {
  return FASTPRUNE_FOR_ISA(best_isa(), make_tile_functions<uint32_t>)(kind);
}

template <>
TileFunctions<uint64_t> tile_functions<uint64_t>(ScoreKind kind) {
  return FASTPRUNE_FOR_ISA(best_isa(), make_tile_functions<uint64_t>)(kind);
}

}  // namespace fastprune
