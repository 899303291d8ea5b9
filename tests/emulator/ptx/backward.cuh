// The host counterpart of kernels/ptx/backward.cuh.
#pragma once

#include "ptx/ptx.cuh"

#define FLASHSPARK_CALLER ::flashspark::emulator::Site site = {__builtin_LINE(), __builtin_FILE()}

namespace flashspark::ptx {

template <class Arguments>
inline void warm_constant_cache(const Arguments &) {}

inline void pair_arrive(int32_t pair, int32_t number, FLASHSPARK_CALLER) {
  emulator::pair(emulator::Operation::pair_arrive, pair, number, site);
}
inline void pair_wait(int32_t pair, int32_t number, FLASHSPARK_CALLER) {
  emulator::pair(emulator::Operation::pair_wait, pair, number, site);
}

inline void mbarrier_init(SharedAddress barrier, uint32_t warps, FLASHSPARK_CALLER) {
  emulator::mbarrier_init(barrier, warps, site);
}
inline void mbarrier_invalidate(SharedAddress barrier, FLASHSPARK_CALLER) {
  emulator::mbarrier_invalidate(barrier, site);
}
inline void mbarrier_arrive(SharedAddress barrier, FLASHSPARK_CALLER) {
  emulator::mbarrier(emulator::Operation::mbarrier_arrive, barrier, 0, site);
}
inline void mbarrier_wait(SharedAddress barrier, uint32_t parity, FLASHSPARK_CALLER) {
  emulator::mbarrier(emulator::Operation::mbarrier_wait, barrier, parity, site);
}

// Threads run one after another, CTAs in random order.
inline void add_to_memory(float *to, float x) {
  *to += x;
}
inline void add_to_memory_4(float *to, const float (&x)[4], FLASHSPARK_CALLER) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulator::fail("add_to_memory_4 of a misaligned address", site);
  for (int n = 0; n < 4; ++n) to[n] += x[n];
}

inline void store_or_add_to_memory_4(int32_t sign, float *to, const float (&x)[4], FLASHSPARK_CALLER) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulator::fail("stores 4 numbers at a misaligned address", site);
  for (int n = 0; n < 4; ++n) to[n] = x[n] + (sign < 0 ? 0 : to[n]);
}

// CTAs run one after another: what no earlier one has done will not be.
inline void wait_until_at_least(const int32_t *from, int32_t value, FLASHSPARK_CALLER) {
  if (*from < value) emulator::fail("waits for a CTA that does not come first", site);
}
inline void raise_in_memory(int32_t *to, int32_t value) {
  if (*to < value) *to = value;
}
inline void count_in_memory(int32_t *to, int32_t n) {
  *to += n;
}
inline void raise_in_memory_if(bool raises, int32_t *to, int32_t value) {
  if (raises) raise_in_memory(to, value);
}

inline uint32_t unknown(uint32_t x) {
  return x;
}

inline void select_by_signs(float (&x)[2], uint32_t signs, const float (&other)[2]) {
  for (int n = 0; n < 2; ++n) {
    if (to_float(Float16{static_cast<uint16_t>(signs >> 16 * n)}) < 0) x[n] = other[n];
  }
}

inline float magnitude(float x) {
  return std::fabs(x);
}

}  // namespace flashspark::ptx

#undef FLASHSPARK_CALLER
