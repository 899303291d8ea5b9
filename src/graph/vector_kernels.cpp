// Compiles the loops for every SIMD target, as cpu/kernels.cpp does for attention itself.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "graph/vector_kernels.cpp"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#include <hwy/foreach_target.h>
// Highway's own include guards need it after foreach_target.h.
#include <hwy/highway.h>

#include "graph/vector-inl.hpp"

#if HWY_ONCE
#include <cstring>

#include "cpu/tile.hpp"

namespace flashspark::graph {
namespace {

using Table = const VectorKernels &(*)();
constexpr Table kTables[] = {
#if HWY_TARGETS & HWY_AVX3
    N_AVX3::table,
#endif
#if HWY_TARGETS & HWY_AVX2
    N_AVX2::table,
#endif
#if HWY_TARGETS & HWY_SSE4
    N_SSE4::table,
#endif
#if HWY_TARGETS & HWY_NEON
    N_NEON::table,
#endif
};

}  // namespace

const VectorKernels &vector_kernels() {
  const char *target = cpu::kernels().target;
  for (const Table table : kTables) {
    if (std::strcmp(table().target, target) == 0) return table();
  }
  return kTables[std::size(kTables) - 1]();
}

}  // namespace flashspark::graph
#endif
