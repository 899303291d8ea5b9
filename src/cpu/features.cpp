// Asked of the CPU itself: the compilers' __builtin_cpu_supports() is no better than their run-time library, and zig's,
// of which the release wheels are made, says no to everything.
#include "cpu/features.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include <cstdint>
#endif

namespace flashspark::cpu {

#if defined(__x86_64__)
namespace {

struct Leaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;  // zeros where the CPU has no such leaf
};

Leaf leaf(uint32_t number, uint32_t part = 0) {
  Leaf l;
  __get_cpuid_count(number, part, &l.eax, &l.ebx, &l.ecx, &l.edx);
  return l;
}

// XCR0: which registers the system saves. Only where CPUID says that it uses XSAVE.
[[gnu::target("xsave")]] uint64_t saved_registers() {
  return _xgetbv(0);
}

bool all(uint64_t value, uint64_t bits) {
  return (value & bits) == bits;
}

}  // namespace

Features features() {
  constexpr uint64_t kXmmYmm = 0x06, kMasksZmm = 0xe0;
  const Leaf basic = leaf(1), extended = leaf(7);
  const uint64_t saved = all(basic.ecx, bit_OSXSAVE) ? saved_registers() : 0;
  Features f;
  f.avx2 =
      all(saved, kXmmYmm) && all(basic.ecx, bit_AVX | bit_FMA | bit_F16C) && all(extended.ebx, bit_AVX2 | bit_BMI2);
  f.avx512 = f.avx2 && all(saved, kMasksZmm) &&
             all(extended.ebx, bit_AVX512F | bit_AVX512VL | bit_AVX512DQ | bit_AVX512BW | bit_AVX512CD);
  f.avx512_bf16 = f.avx512 && extended.eax >= 1 && all(leaf(7, 1).eax, bit_AVX512BF16);
  return f;
}
#else
Features features() {
  return {};
}
#endif

}  // namespace flashspark::cpu
