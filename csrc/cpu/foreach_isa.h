// Compiles the file that FASTPRUNE_ISA_BODY names once per instruction set. The body puts its code
// into namespace FASTPRUNE_ISA and may test FASTPRUNE_ISA_LEVEL (0 baseline, 1 AVX2, 2 AVX-512).
//
// One translation unit with target pragmas, not one file per compiler flag: with flags, an inline
// function of a standard header may be emitted with instructions the machine lacks and then be the
// copy that the linker keeps. So the body includes nothing: its includer does.

#define FASTPRUNE_ISA baseline
#define FASTPRUNE_ISA_LEVEL 0
#include FASTPRUNE_ISA_BODY
#undef FASTPRUNE_ISA
#undef FASTPRUNE_ISA_LEVEL

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#define FASTPRUNE_ISA avx2
#define FASTPRUNE_ISA_LEVEL 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#include FASTPRUNE_ISA_BODY
#pragma GCC pop_options
#undef FASTPRUNE_ISA
#undef FASTPRUNE_ISA_LEVEL

#define FASTPRUNE_ISA avx512
#define FASTPRUNE_ISA_LEVEL 2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl")
#pragma GCC target("prefer-vector-width=512")
#include FASTPRUNE_ISA_BODY
#pragma GCC pop_options
#undef FASTPRUNE_ISA
#undef FASTPRUNE_ISA_LEVEL

#define FASTPRUNE_FOR_ISA(isa, name)                \
  ((isa) == Isa::Avx512 ? ::fastprune::avx512::name \
   : (isa) == Isa::Avx2 ? ::fastprune::avx2::name   \
                        : ::fastprune::baseline::name)
#else
#define FASTPRUNE_FOR_ISA(isa, name) ((void)(isa), ::fastprune::baseline::name)
#endif
