#include "cpu/narrow_copy.h"

#include "common/narrow.h"
#include "cpu/isa.h"

namespace fastprune {
namespace {

using Narrow = void (*)(const void* from, void* copy, int64_t size);

}  // namespace
}  // namespace fastprune

#define FASTPRUNE_ISA_BODY "cpu/narrow_copy.inc"
#include "cpu/foreach_isa.h"

namespace fastprune {

void narrow_copy(const void* from, void* copy, DType dtype, int64_t size) {
  const Isa isa = best_isa();
  FASTPRUNE_FOR_ISA(isa, choose_narrow)(dtype)(from, copy, size);
}

}  // namespace fastprune
