// Compiles the kernels for every SIMD target and picks one at run time. Highway (header only) writes the vectors; the
// choice is ours, so that no libhwy is linked.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/kernels.cpp"
// Left: SSE4 (this file is compiled for x86-64-v2), AVX2 and AVX-512 on x86-64; NEON on Arm (SVE's vectors have no
// fixed length).
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#include <hwy/foreach_target.h>
// Highway's own include guards need it after foreach_target.h.
#include <hwy/highway.h>

#include "cpu/packed-inl.hpp"
#include "cpu/stream-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace flashspark::cpu::HWY_NAMESPACE {

HWY_ATTR void run_tile(const Tile &t) {
  if (t.rows > kStreamRows) return run_packed(t);
  switch (t.p->k.dtype) {
    case FLASHSPARK_FLOAT32:
      return run_stream<F32>(t);
    case FLASHSPARK_FLOAT16:
      return run_stream<F16>(t);
    case FLASHSPARK_BFLOAT16:
      return run_stream<BF16>(t);
    default:
      return run_stream<E4M3>(t);
  }
}

}  // namespace flashspark::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <cstdlib>
#include <cstring>

namespace flashspark::cpu {
namespace {

struct Candidate {
  Kernels kernels;
  bool (*runs_here)();
};

// Best first. __builtin_cpu_supports() also asks whether the system saves the registers.
constexpr Candidate kCandidates[] = {
#if HWY_TARGETS & HWY_AVX3
    {{"AVX-512", N_AVX3::run_tile},
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("fma");
     }},
#endif
#if HWY_TARGETS & HWY_AVX2
    {{"AVX2", N_AVX2::run_tile},
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
#if HWY_TARGETS & HWY_SSE4
    {{"SSE4", N_SSE4::run_tile}, [] { return true; }},  // x86-64-v2, the least we build for
#endif
#if HWY_TARGETS & HWY_NEON
    {{"NEON", N_NEON::run_tile}, [] { return true; }},
#endif
};

const Kernels &choose_kernels() {
  const char *wanted = std::getenv("FLASHSPARK_CPU_TARGET");
  const Candidate *best = nullptr;
  for (const Candidate &candidate : kCandidates) {
    if (!candidate.runs_here()) continue;
    if (best == nullptr) best = &candidate;
    if (wanted != nullptr && std::strcmp(wanted, candidate.kernels.target) == 0) return candidate.kernels;
  }
  return best->kernels;
}

}  // namespace

const Kernels &kernels() {
  static const Kernels &chosen = choose_kernels();
  return chosen;
}

}  // namespace flashspark::cpu
#endif
