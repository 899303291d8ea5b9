// Instructions that only the backward pass issues. As in ptx.cuh, tests/emulator/ptx/backward.cuh declares the same
// ones for the host.
#pragma once

#include "ptx/ptx.cuh"

namespace flashspark::ptx {

// ld.param of a word in every 64 bytes, 32 of them at once: a kernel's arguments are in the constant cache then, and no
// miss falls into a chain of dependent instructions.
template <class Arguments>
FLASHSPARK_DEVICE void warm_constant_cache(const Arguments &arguments) {
  const auto *words = reinterpret_cast<const uint32_t *>(&arguments);
  uint32_t sum = 0;
  for (int32_t n = lane() * 16; n < static_cast<int32_t>(sizeof(Arguments) / 4); n += 32 * 16) sum += words[n];
  asm volatile("" ::"r"(sum));
}

// bar.arrive and bar.sync of two neighbouring warps, 2 pair and 2 pair + 1 with pair < 7: one waits until the other one
// has arrived, and sees what that has written to shared memory before. An arrival is for one wait; two of them, of
// numbers 0 and 1, may be under way.
FLASHSPARK_DEVICE void pair_arrive(int32_t pair, int32_t number) {
  asm volatile("bar.arrive %0, 64;" ::"r"(1 + 2 * pair + number) : "memory");
}
FLASHSPARK_DEVICE void pair_wait(int32_t pair, int32_t number) {
  asm volatile("bar.sync %0, 64;" ::"r"(1 + 2 * pair + number) : "memory");
}

// mbarrier: 8 bytes of shared memory, with phases of so many arrivals of warps each. A warp's arrival releases what all
// of its lanes have written and read before. A wait is for the end of the phase of a parity, the first one's being 0;
// it returns at once where the phase before has not ended, whatever comes after it. One thread calls mbarrier_init, all
// of a warp the others.
FLASHSPARK_DEVICE void mbarrier_init(SharedAddress barrier, uint32_t warps) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(warps) : "memory");
}
// Before another one begins at the same address: by one thread, when all are done with the first.
FLASHSPARK_DEVICE void mbarrier_invalidate(SharedAddress barrier) {
  asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
FLASHSPARK_DEVICE void mbarrier_arrive(SharedAddress barrier) {
  warp_barrier();
  if (lane() == 0)
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}
FLASHSPARK_DEVICE void mbarrier_wait(SharedAddress barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define FLASHSPARK_WAIT "try_wait"  // suspends the thread for a while
#else
#define FLASHSPARK_WAIT "test_wait"
#endif
  asm volatile("{\n.reg .pred ended;\nagain:\nmbarrier." FLASHSPARK_WAIT
               ".parity.shared.b64 ended, [%0], %1;\n@!ended bra again;\n}" ::"r"(barrier),
               "r"(parity)
               : "memory");
#undef FLASHSPARK_WAIT
}

// red.global.add.f32: adds to what lies in memory, in no order. Four at once, aligned to 16 bytes, are one instruction
// from 9.0 on.
FLASHSPARK_DEVICE void add_to_memory(float *to, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "f"(x) : "memory");
}
FLASHSPARK_DEVICE void add_to_memory_4(float *to, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(x[0]),
               "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
#else
  for (int n = 0; n < 4; ++n) add_to_memory(to + n, x[n]);
#endif
}

// The same, or a store where `sign` is less than 0, without a branch.
FLASHSPARK_DEVICE void store_or_add_to_memory_4(int32_t sign, float *to, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred stores;\nsetp.lt.s32 stores, %5, 0;\n@stores st.global.v4.f32 [%0], {%1, %2, %3, %4};\n"
      "@!stores red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n}" ::"l"(__cvta_generic_to_global(to)),
      "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(sign)
      : "memory");
#else
  for (int n = 0; n < 4; ++n) {
    if (sign < 0) {
      to[n] = x[n];
    } else {
      add_to_memory(to + n, x[n]);
    }
  }
#endif
}

// ld.acquire until memory has the value or a larger one; red.release.max, which raises it to one, and red.release.add.
FLASHSPARK_DEVICE void wait_until_at_least(const int32_t *from, int32_t value) {
  int32_t x;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(from)) : "memory");
  } while (x < value);
}
FLASHSPARK_DEVICE void raise_in_memory(int32_t *to, int32_t value) {
  asm volatile("red.release.gpu.global.max.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(value) : "memory");
}
FLASHSPARK_DEVICE void count_in_memory(int32_t *to, int32_t n) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(n) : "memory");
}

// The same by the lanes that say so, without a branch.
FLASHSPARK_DEVICE void raise_in_memory_if(bool raises, int32_t *to, int32_t value) {
  asm volatile(
      "{\n.reg .pred raises;\nsetp.ne.s32 raises, %2, 0;\n@raises red.release.gpu.global.max.s32 [%0], %1;\n}" ::"l"(
          __cvta_generic_to_global(to)),
      "r"(value), "r"(static_cast<int32_t>(raises))
      : "memory");
}

// x, of which the compiler knows nothing: what follows from it is computed where it stands, not kept in a register.
FLASHSPARK_DEVICE uint32_t unknown(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// setp.f16x2: for each half n of `signs`, other[n] where it is less than 0 as fp16, which -0 and NaN are not; else
// x[n].
FLASHSPARK_DEVICE void select_by_signs(float (&x)[2], uint32_t signs, const float (&other)[2]) {
  asm("{ .reg .pred p, q; .reg .b32 zero; mov.b32 zero, 0; setp.lt.f16x2 p|q, %2, zero;\n"
      "selp.f32 %0, %3, %0, p; selp.f32 %1, %4, %1, q; }"
      : "+f"(x[0]), "+f"(x[1])
      : "r"(signs), "f"(other[0]), "f"(other[1]));
}
FLASHSPARK_DEVICE float magnitude(float x) {
  return fabsf(x);
}

}  // namespace flashspark::ptx
