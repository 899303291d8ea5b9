// One function per PTX instruction, and the project's only inline assembly. tests/emulator/ptx/ptx.cuh declares the
// same functions for the host; whichever folder comes first on the include path decides where a kernel runs.
//
// Names: lane = thread_index() % 32. A "fragment" is what one lane holds of a matrix, packed two 16-bit numbers to a
// register, lower column (or row, for B) in the lower half. Layouts below are those of the PTX ISA manual, section
// "Matrix multiply-accumulate operation using mma".
#pragma once

#include <cstdint>

#define FLASHSPARK_DEVICE __device__ __forceinline__
#define FLASHSPARK_KERNEL(threads, min_ctas) extern "C" __global__ void __launch_bounds__(threads, min_ctas)
#define FLASHSPARK_PARAMETER __grid_constant__ const
#define FLASHSPARK_UNROLL _Pragma("unroll")
#define FLASHSPARK_NO_UNROLL _Pragma("unroll 1")

namespace flashspark::ptx {

// Numbers of 16 bits are their bits; only the instructions below know what they mean.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct E4m3 {
  uint8_t bits;
};

// A byte address in the CTA's shared window.
using SharedAddress = uint32_t;

struct alignas(16) Vector16 {
  uint32_t word[4];
};

// The place of this thread: CTAs and threads have x only, but for the y and z of the grid.
FLASHSPARK_DEVICE uint32_t thread_index() {
  return threadIdx.x;
}
FLASHSPARK_DEVICE int32_t lane() {
  return static_cast<int32_t>(thread_index() % 32);
}
FLASHSPARK_DEVICE int32_t warp() {
  return static_cast<int32_t>(thread_index() / 32);
}
FLASHSPARK_DEVICE uint32_t cta_x() {
  return blockIdx.x;
}
FLASHSPARK_DEVICE uint32_t cta_y() {
  return blockIdx.y;
}
FLASHSPARK_DEVICE uint32_t cta_z() {
  return blockIdx.z;
}

// bar.sync 0: all threads of the CTA meet; shared memory written before is visible after.
FLASHSPARK_DEVICE void cta_barrier() {
  __syncthreads();
}
// bar.warp.sync: the same for a warp.
FLASHSPARK_DEVICE void warp_barrier() {
  __syncwarp();
}

// griddepcontrol.wait: until the kernel before in the stream has ended and what it wrote is visible, where this kernel
// was launched before that (programmatic dependent launch); else at once. griddepcontrol.launch_dependents: the next
// kernel of that kind may be brought in. Devices before 9.0 know neither, and launch no kernel early.
FLASHSPARK_DEVICE void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
FLASHSPARK_DEVICE void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The CTA's dynamic shared memory, aligned to 1024 bytes.
FLASHSPARK_DEVICE SharedAddress shared_memory() {
  extern __shared__ __align__(1024) unsigned char flashspark_shared[];
  return static_cast<SharedAddress>(__cvta_generic_to_shared(flashspark_shared));
}

// prefetch.global.L1: what is about to be read.
FLASHSPARK_DEVICE void prefetch(const void *from) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(__cvta_generic_to_global(from)));
}

// ld.relaxed.gpu: from the L2, whatever the L1 holds.
FLASHSPARK_DEVICE int32_t load_of_device(const int32_t *from) {
  int32_t x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(from)) : "memory");
  return x;
}
// fence.acq_rel.gpu: what this thread has written is where the whole device sees it.
FLASHSPARK_DEVICE void fence() {
  __threadfence();
}

// cp.async.cg: 16 bytes from global to shared memory past L1; both aligned to 16. They may land at any time until the
// wait for their group. With valid = false nothing is read and 16 zero bytes land.
FLASHSPARK_DEVICE void cp_async_16(SharedAddress to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
}
FLASHSPARK_DEVICE void cp_async_16_or_zero(SharedAddress to, const void *from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(bytes)
               : "memory");
}
// Ends this thread's group of copies; an empty group counts too.
FLASHSPARK_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `pending` of this thread's newest groups are still in flight.
template <int pending>
FLASHSPARK_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ldmatrix.x4: four 8x8 matrices of 16-bit numbers. Lane l gives the address of row l % 8 (16 bytes) of matrix l / 8
// and receives, of matrix m in part[m], the numbers (row l / 4, columns 2 * (l % 4) and + 1).
FLASHSPARK_DEVICE void ldmatrix_x4(uint32_t (&part)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
               : "r"(row)
               : "memory");
}
// The same, each matrix transposed: part[m] holds (rows 2 * (l % 4) and + 1, column l / 4).
FLASHSPARK_DEVICE void ldmatrix_x4_trans(uint32_t (&part)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
               : "r"(row)
               : "memory");
}
// ldmatrix.x2: the same of two matrices, whose rows lanes 0 to 15 name.
FLASHSPARK_DEVICE void ldmatrix_x2(uint32_t (&part)[2], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(part[0]), "=r"(part[1])
               : "r"(row)
               : "memory");
}
FLASHSPARK_DEVICE void ldmatrix_x2_trans(uint32_t (&part)[2], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(part[0]), "=r"(part[1])
               : "r"(row)
               : "memory");
}

// ld.shared / st.shared.
FLASHSPARK_DEVICE Vector16 load_shared_16(SharedAddress from) {
  Vector16 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(from)
               : "memory");
  return v;
}
FLASHSPARK_DEVICE void store_shared_16(SharedAddress to, Vector16 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3])
               : "memory");
}
FLASHSPARK_DEVICE uint32_t load_shared_4(SharedAddress from) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
  return word;
}
FLASHSPARK_DEVICE void load_shared_8(uint32_t (&words)[2], SharedAddress from) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(from) : "memory");
}
FLASHSPARK_DEVICE void store_shared_8(SharedAddress to, uint32_t first, uint32_t second) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(first), "r"(second) : "memory");
}
FLASHSPARK_DEVICE void store_shared_4(SharedAddress to, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}
FLASHSPARK_DEVICE float as_float(uint32_t word) {
  return __uint_as_float(word);
}
FLASHSPARK_DEVICE uint32_t as_word(float x) {
  return __float_as_uint(x);
}

// mma.sync.m16n8k16, D += A * B with A (16 x 16) by rows, B (16 x 8) by columns, D (16 x 8) in float. Lane l holds
//   a[0]: row l / 4, columns 2 * (l % 4) and + 1;  a[1]: row + 8;  a[2]: columns + 8;  a[3]: both
//   b0: rows 2 * (l % 4) and + 1, column l / 4;    b1: rows + 8
//   d[0], d[1]: row l / 4, columns 2 * (l % 4) and + 1;  d[2], d[3]: row + 8
template <class Element>
FLASHSPARK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
FLASHSPARK_DEVICE void mma_m16n8k16<Bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
FLASHSPARK_DEVICE void mma_m16n8k16<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// cvt.rn: two floats to one register of 16-bit numbers, `low` in the lower half.
template <class Element>
FLASHSPARK_DEVICE uint32_t pack(float low, float high);
template <>
FLASHSPARK_DEVICE uint32_t pack<Bfloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
FLASHSPARK_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
// cvt.rn.satfinite.f16x2: the same to fp16, but what lies beyond its range becomes its largest number; NaN stays NaN.
FLASHSPARK_DEVICE uint32_t pack_finite(float low, float high) {
  uint32_t word;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
// A 16-bit number as a float, exactly.
template <class Element>
FLASHSPARK_DEVICE float to_float(Element x);
template <>
FLASHSPARK_DEVICE float to_float<Bfloat16>(Bfloat16 x) {
  return __uint_as_float(uint32_t{x.bits} << 16);
}
template <>
FLASHSPARK_DEVICE float to_float<Float16>(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// cvt.rn.f16x2.e4m3x2, twice: four e4m3 numbers (OCP e4m3fn) as two words of two fp16 numbers, exactly; the first in
// the lowest byte, and in the lower half of the first word. One piece of assembly, so that the second conversion takes
// the upper half of its register as it is. Devices before 8.9 have no such instruction: the exponent is 4 bits, biased
// by 7, and a product with 2^8 leads to fp16's 15, subnormal numbers included; what is NaN is found beside it.
FLASHSPARK_DEVICE void convert_e4m3x4_to_f16x4(uint32_t &first, uint32_t &second, uint32_t four) {
#if __CUDA_ARCH__ >= 890
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n"
      "}"
      : "=r"(first), "=r"(second)
      : "r"(four));
#else
  const auto convert = [](uint32_t pair) {
    const uint32_t bytes = (pair & 0xff) | (pair & 0xff00) << 8;
    const uint32_t magnitude = (bytes & 0x007f007f) << 7;
    uint32_t word;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(word) : "r"(magnitude), "r"(0x5c005c00u));
    if ((bytes & 0x7f) == 0x7f) word |= 0x7fff;
    if ((bytes & 0x7f0000) == 0x7f0000) word |= 0x7fff0000;
    return word | (bytes & 0x00800080) << 8;
  };
  first = convert(four);
  second = convert(four >> 16);
#endif
}

// cvt.rn.satfinite.e4m3x2.f32: two floats as e4m3, `low` in the lower byte; beyond 448: 448, NaN: NaN. Devices
// before 8.9 have no such instruction: fp16 has all of e4m3's numbers, so one rounding of the float to e4m3's steps
// suffices.
FLASHSPARK_DEVICE uint32_t convert_f32x2_to_e4m3x2(float low, float high) {
#if __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  const auto round = [](float x) -> uint32_t {
    const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80;
    const float magnitude = fminf(fabsf(x), 448.0f);
    if (x != x) return sign | 0x7f;
    // Steps are 2^-9 below 2^-6, else an eighth of the power of two; rounding to even by adding and taking away.
    const float power = fmaxf(__uint_as_float(__float_as_uint(magnitude) & 0x7f800000), 0.015625f);
    const float steps = power * 1572864.0f;  // 1.5 x 2^23 eighths: the float's last place is one step
    const float rounded = (magnitude + steps) - steps;
    const uint32_t r = __float_as_uint(rounded);
    const uint32_t normal = (r >> 20) - (120u << 3);  // exponent and three bits, rebiased from 127 to 7
    return sign | (rounded < 0.015625f ? static_cast<uint32_t>(rounded * 512.0f) : normal);
  };
  return round(low) | round(high) << 8;
#endif
}

// ex2.approx.ftz: 2^x within 2 ulp; 2^-inf = 0. lg2.approx.ftz: log2 x. rcp.approx.ftz: 1 / x within 1 ulp.
FLASHSPARK_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FLASHSPARK_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FLASHSPARK_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// shfl.sync over the whole warp: the value of lane ^ mask; of lane `from`; of lane - delta (own value where there is
// none).
FLASHSPARK_DEVICE float shuffle_xor(float x, uint32_t mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
FLASHSPARK_DEVICE int32_t shuffle(int32_t x, uint32_t from) {
  return __shfl_sync(0xffffffffu, x, from);
}
FLASHSPARK_DEVICE int32_t shuffle_up(int32_t x, uint32_t delta) {
  return __shfl_up_sync(0xffffffffu, x, delta);
}
// vote.sync: a bit per lane whose x holds; whether any does.
FLASHSPARK_DEVICE uint32_t ballot(bool x) {
  return __ballot_sync(0xffffffffu, x);
}
FLASHSPARK_DEVICE bool any(bool x) {
  return __any_sync(0xffffffffu, x);
}
// redux.sync: the smallest, the largest and the sum of the warp.
FLASHSPARK_DEVICE int32_t reduce_min(int32_t x) {
  return __reduce_min_sync(0xffffffffu, x);
}
FLASHSPARK_DEVICE int32_t reduce_max(int32_t x) {
  return __reduce_max_sync(0xffffffffu, x);
}
FLASHSPARK_DEVICE uint32_t reduce_add(uint32_t x) {
  return __reduce_add_sync(0xffffffffu, x);
}
// The same x of every lane, once more: redux.sync gives its result in a uniform register, and the compiler then knows
// that what follows from it does not diverge.
FLASHSPARK_DEVICE int32_t uniform(int32_t x) {
  return __reduce_max_sync(0xffffffffu, x);
}

// mul.hi: the upper half of the 64-bit product.
FLASHSPARK_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return __umulhi(a, b);
}
// prmt: byte n of the result is byte (order >> 4 n) % 16 of x, from 4 on 0.
FLASHSPARK_DEVICE uint32_t permute_bytes(uint32_t x, uint32_t order) {
  return __byte_perm(x, 0, order);
}
// Each half of the result: 0 where that half of a, without its sign, is less than that of b, as fp16; else all ones,
// also where a is NaN.
FLASHSPARK_DEVICE uint32_t magnitude_not_less_f16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("{ .reg .b32 magnitude; abs.f16x2 magnitude, %1; set.geu.u32.f16x2 %0, magnitude, %2; }"
      : "=r"(result)
      : "r"(a), "r"(b));
  return result;
}
// The same, but for its complement where `flip`: the instruction takes both.
FLASHSPARK_DEVICE uint32_t magnitude_not_less_f16x2(uint32_t a, uint32_t b, bool flip) {
  uint32_t result;
  asm("{ .reg .b32 magnitude; .reg .pred flip; setp.ne.u32 flip, %3, 0; abs.f16x2 magnitude, %1; "
      "set.geu.xor.u32.f16x2 %0, magnitude, %2, flip; }"
      : "=r"(result)
      : "r"(a), "r"(b), "r"(static_cast<uint32_t>(flip)));
  return result;
}
// ffs - 1: place of the lowest set bit; x != 0.
FLASHSPARK_DEVICE uint32_t lowest_bit(uint32_t x) {
  return __ffs(static_cast<int>(x)) - 1;
}

}  // namespace flashspark::ptx
