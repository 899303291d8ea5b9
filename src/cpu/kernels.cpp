// Compiles the kernels for every SIMD target and picks one at run time. Highway (header only) writes the vectors; the
// choice is ours, so that no libhwy is linked.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/kernels.cpp"
// What remains: SSE4 (this file is compiled for x86-64-v2), AVX2 and AVX-512 on x86-64; NEON on Arm (the length of
// SVE's vectors is not known to the compiler).
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
  with_type(t.p->k.dtype, [&](auto type) HWY_ATTR { run_stream<decltype(type)>(t); });
}

template <class D>
HWY_ATTR void widen_all(const void *from, int64_t count, int32_t dtype, float *to) {
  const D d;
  const auto copy = [&](auto type) HWY_ATTR {
    const auto *elements = static_cast<const typename decltype(type)::Element *>(from);
    for (int64_t n = 0; n < count; n += static_cast<int64_t>(hn::Lanes(d))) {
      hn::StoreU(widen(d, type, elements + n), d, to + n);
    }
  };
  with_type(dtype, copy);
}

HWY_ATTR void widen_row(const void *from, int64_t count, int32_t dtype, int lanes, float *to) {
  if (lanes == 4) return widen_all<D4>(from, count, dtype, to);
  if (lanes == 8) return widen_all<Lanes8>(from, count, dtype, to);
  widen_all<Lanes16>(from, count, dtype, to);
}

HWY_ATTR void narrow_row(const float *from, int64_t count, int32_t dtype, void *to) {
  store_row(from, count, 1.0f, to, 0, dtype);
}

}  // namespace flashspark::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <atomic>
#include <vector>

#include "cpu/features.hpp"
#include "environment.hpp"

namespace flashspark::cpu {
namespace {

struct Candidate {
  Kernels kernels;
  bool (*runs_here)();
};

// Best first.
constexpr Candidate kCandidates[] = {
#if HWY_TARGETS & HWY_AVX3
    // Only the backward pass has products of bfloat16 (backward_kernels.cpp).
    {{"AVX-512-BF16", N_AVX3::run_tile, N_AVX3::widen_row, N_AVX3::narrow_row}, [] { return features().avx512_bf16; }},
    {{"AVX-512", N_AVX3::run_tile, N_AVX3::widen_row, N_AVX3::narrow_row}, [] { return features().avx512; }},
#endif
#if HWY_TARGETS & HWY_AVX2
    {{"AVX2", N_AVX2::run_tile, N_AVX2::widen_row, N_AVX2::narrow_row}, [] { return features().avx2; }},
#endif
#if HWY_TARGETS & HWY_SSE4
    {{"SSE4", N_SSE4::run_tile, N_SSE4::widen_row, N_SSE4::narrow_row},
     [] { return true; }},  // x86-64-v2, the least we build for
#endif
#if HWY_TARGETS & HWY_NEON
    {{"NEON", N_NEON::run_tile, N_NEON::widen_row, N_NEON::narrow_row}, [] { return true; }},
#endif
};

std::atomic<const Kernels *> wanted_by_tests{nullptr};

const Kernels &choose_kernels() {
  for (const Kernels *kernels : all_kernels()) {
    if (environment().cpu_target == kernels->target) return *kernels;
  }
  return *all_kernels().front();
}

}  // namespace

std::span<const Kernels *const> all_kernels() {
  static const std::vector<const Kernels *> all = [] {
    std::vector<const Kernels *> those;
    for (const Candidate &candidate : kCandidates) {
      if (candidate.runs_here()) those.push_back(&candidate.kernels);
    }
    return those;
  }();
  return all;
}

const Kernels &kernels() {
  static const Kernels &chosen = choose_kernels();
  const Kernels *wanted = wanted_by_tests.load(std::memory_order_relaxed);
  return wanted != nullptr ? *wanted : chosen;
}

void use_kernels(const Kernels *kernels) {
  wanted_by_tests = kernels;
}

}  // namespace flashspark::cpu
#endif
