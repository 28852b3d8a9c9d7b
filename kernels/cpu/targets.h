// Instruction sets that vector code is compiled for; included before hwy/highway.h. AVX-512, AVX2 and NEON, and one
// lane where there is none of them. Vectors without a fixed size cannot be members. DISTILL_SKIPPED_TARGETS: more to
// leave out (sanitizer builds leave out AVX-512, whose code they take minutes to compile).
#pragma once

#if !defined(DISTILL_SKIPPED_TARGETS)
#define DISTILL_SKIPPED_TARGETS 0
#endif
#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV | DISTILL_SKIPPED_TARGETS)
