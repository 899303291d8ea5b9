// Compiles the kernels of the backward pass for every SIMD target, as kernels.cpp does those of the forward pass.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward_kernels.cpp"
// As in kernels.cpp, whose choice is followed.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#include <hwy/foreach_target.h>
// Highway's own include guards need it after foreach_target.h.
#include <hwy/highway.h>

#include "cpu/backward-inl.hpp"
#include "cpu/backward_pairs-inl.hpp"

#if HWY_ONCE
#include <cstring>

namespace flashspark::cpu {
namespace {

constexpr BackwardKernels kAllBackwardKernels[] = {
#define FLASHSPARK_BACKWARD_KERNELS(name, target) \
  {name, target::begin_keys, target::add_rows, target::end_keys, target::dot_rows, target::store_row},
#if HWY_TARGETS & HWY_AVX3
    {"AVX-512-BF16", N_AVX3::begin_keys_or_pairs, N_AVX3::add_rows_or_pairs, N_AVX3::end_keys_or_pairs,
     N_AVX3::dot_rows_or_pairs, N_AVX3::store_row},
    FLASHSPARK_BACKWARD_KERNELS("AVX-512", N_AVX3)
#endif
#if HWY_TARGETS & HWY_AVX2
        FLASHSPARK_BACKWARD_KERNELS("AVX2", N_AVX2)
#endif
#if HWY_TARGETS & HWY_SSE4
            FLASHSPARK_BACKWARD_KERNELS("SSE4", N_SSE4)
#endif
#if HWY_TARGETS & HWY_NEON
                FLASHSPARK_BACKWARD_KERNELS("NEON", N_NEON)
#endif
};

}  // namespace

const BackwardKernels &backward_kernels() {
  const char *target = kernels().target;
  for (const BackwardKernels &each : kAllBackwardKernels) {
    if (std::strcmp(each.target, target) == 0) return each;
  }
  return kAllBackwardKernels[0];  // both files are compiled for the same targets
}

}  // namespace flashspark::cpu
#endif
