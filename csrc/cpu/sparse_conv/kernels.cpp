#include "cpu/sparse_conv/kernels.h"

#include "cpu/prefetch.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTPRUNE_ISA_BODY "cpu/sparse_conv/kernels.inc"
#include "cpu/foreach_isa.h"

namespace fastprune {
namespace sparse {

const KernelTable& kernel_table(Isa isa) { return FASTPRUNE_FOR_ISA(isa, sparse_conv_kernels)(); }

}  // namespace sparse
}  // namespace fastprune
