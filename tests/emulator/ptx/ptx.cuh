// The host counterpart of kernels/ptx/ptx.cuh: the same names, types and macros, executed by the emulator. Each
// function is documented there; the defaulted last argument passes the kernel's source line to the emulator.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "operations.hpp"

#define FLASHSPARK_DEVICE inline
#define FLASHSPARK_KERNEL(threads, ctas) void
#define FLASHSPARK_PARAMETER const
#define FLASHSPARK_UNROLL
#define FLASHSPARK_NO_UNROLL

// Evaluated at the call site, since it is a default argument.
#define FLASHSPARK_CALLER ::flashspark::emulator::Site site = {__builtin_LINE(), __builtin_FILE()}

namespace flashspark::ptx {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct E4m3 {
  uint8_t bits;
};

using SharedAddress = uint32_t;

// Kernels run one after another, so there is nothing to wait for.
inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

struct alignas(16) Vector16 {
  uint32_t word[4];

  Vector16() = default;
  Vector16(const Vector16 &) = default;
  // User-defined, because UBSan checks the alignment of the destination in the implicit one.
  Vector16 &operator=(const Vector16 &other) {
    for (int n = 0; n < 4; ++n) word[n] = other.word[n];
    return *this;
  }
};

inline uint32_t thread_index() {
  return emulator::position.thread;
}
inline int32_t lane() {
  return static_cast<int32_t>(thread_index() % 32);
}
inline int32_t warp() {
  return static_cast<int32_t>(thread_index() / 32);
}
inline uint32_t cta_x() {
  return emulator::position.cta[0];
}
inline uint32_t cta_y() {
  return emulator::position.cta[1];
}
inline uint32_t cta_z() {
  return emulator::position.cta[2];
}

inline void cta_barrier(FLASHSPARK_CALLER) {
  emulator::barrier(emulator::Operation::cta_barrier, site);
}
inline void warp_barrier(FLASHSPARK_CALLER) {
  emulator::barrier(emulator::Operation::warp_barrier, site);
}

inline SharedAddress shared_memory() {
  return emulator::kSharedBase;
}

inline void prefetch(const void *) {}  // may be given any address, like the instruction
inline int32_t load_of_device(const int32_t *from) {
  return *from;
}
inline void fence() {}

inline void cp_async_16(SharedAddress to, const void *from, FLASHSPARK_CALLER) {
  emulator::copy_async(to, from, true, site);
}
inline void cp_async_16_or_zero(SharedAddress to, const void *from, bool valid, FLASHSPARK_CALLER) {
  emulator::copy_async(to, from, valid, site);
}
inline void cp_async_commit(FLASHSPARK_CALLER) {
  emulator::copy_commit(site);
}
template <int pending>
inline void cp_async_wait(FLASHSPARK_CALLER) {
  static_assert(pending >= 0);
  emulator::copy_wait(pending, site);
}

inline void ldmatrix_x4(uint32_t (&part)[4], SharedAddress row, FLASHSPARK_CALLER) {
  emulator::load_matrices(emulator::Operation::ldmatrix, part, row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&part)[4], SharedAddress row, FLASHSPARK_CALLER) {
  emulator::load_matrices(emulator::Operation::ldmatrix_trans, part, row, site);
}

// For the .x2 forms the device ignores the addresses of lanes 16 to 31; here they name the same rows again.
inline void ldmatrix_x2(uint32_t (&part)[2], SharedAddress row, FLASHSPARK_CALLER) {
  uint32_t both[4];
  emulator::load_matrices(emulator::Operation::ldmatrix, both, row, site);
  part[0] = both[0];
  part[1] = both[1];
}
inline void ldmatrix_x2_trans(uint32_t (&part)[2], SharedAddress row, FLASHSPARK_CALLER) {
  uint32_t both[4];
  emulator::load_matrices(emulator::Operation::ldmatrix_trans, both, row, site);
  part[0] = both[0];
  part[1] = both[1];
}

inline Vector16 load_shared_16(SharedAddress from, FLASHSPARK_CALLER) {
  Vector16 v;
  emulator::load_shared(&v, from, 16, site);
  return v;
}
inline void store_shared_16(SharedAddress to, Vector16 v, FLASHSPARK_CALLER) {
  emulator::store_shared(to, &v, 16, site);
}
inline void store_shared_8(SharedAddress to, uint32_t first, uint32_t second, FLASHSPARK_CALLER) {
  const uint32_t both[] = {first, second};
  emulator::store_shared(to, both, 8, site);
}
inline void load_shared_8(uint32_t (&words)[2], SharedAddress from, FLASHSPARK_CALLER) {
  emulator::load_shared(words, from, 8, site);
}
inline uint32_t load_shared_4(SharedAddress from, FLASHSPARK_CALLER) {
  uint32_t word;
  emulator::load_shared(&word, from, 4, site);
  return word;
}
inline void store_shared_4(SharedAddress to, uint32_t word, FLASHSPARK_CALLER) {
  emulator::store_shared(to, &word, 4, site);
}
inline float as_float(uint32_t word) {
  return std::bit_cast<float>(word);
}
inline uint32_t as_word(float x) {
  return std::bit_cast<uint32_t>(x);
}

template <class Element>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, FLASHSPARK_CALLER);
template <>
inline void mma_m16n8k16<Bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   emulator::Site site) {
  emulator::multiply(emulator::Operation::mma_bfloat16, d, a, b0, b1, site);
}
template <>
inline void mma_m16n8k16<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                  emulator::Site site) {
  emulator::multiply(emulator::Operation::mma_float16, d, a, b0, b1, site);
}

namespace detail {
// Round to nearest even. Every NaN becomes the canonical NaN of the conversion instruction.
inline uint32_t round_bfloat16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t word = std::bit_cast<uint32_t>(x);
  return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}
inline uint32_t round_float16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t word = std::bit_cast<uint32_t>(x);
  const uint32_t sign = word >> 16 & 0x8000;
  const uint32_t magnitude = word & 0x7fffffff;
  // Below 2^-14, the smallest normal fp16, adding 0.5 rounds to the step of subnormals: floats in [0.5, 1) are 2^-24
  // apart.
  if (magnitude < 0x38800000) {
    return sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000);
  }
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // 2^16 and above overflow
  return sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
}  // namespace detail

template <class Element>
inline uint32_t pack(float low, float high);
template <>
inline uint32_t pack<Bfloat16>(float low, float high) {
  return detail::round_bfloat16(low) | detail::round_bfloat16(high) << 16;
}
template <>
inline uint32_t pack<Float16>(float low, float high) {
  return detail::round_float16(low) | detail::round_float16(high) << 16;
}
template <class Element>
inline float to_float(Element x);
template <>
inline float to_float<Bfloat16>(Bfloat16 x) {
  return std::bit_cast<float>(uint32_t{x.bits} << 16);
}
template <>
inline float to_float<Float16>(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // The fp16 bits, shifted into a float's fields, represent the value times 2^-112; this holds for subnormals too.
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f));
}

namespace detail {
// .ftz: subnormals become zeros of the same sign.
inline float flush(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}
}  // namespace detail

inline uint32_t pack_finite(float low, float high) {
  const auto in_range = [](float x) { return x > 65504.0f ? 65504.0f : (x < -65504.0f ? -65504.0f : x); };
  return pack<Float16>(in_range(low), in_range(high));
}

inline void convert_e4m3x4_to_f16x4(uint32_t &first, uint32_t &second, uint32_t four) {
  first = second = 0;
  for (int n = 0; n < 4; ++n) {
    const uint32_t byte = four >> 8 * n & 0xff, magnitude = byte & 0x7f;
    const float x = magnitude == 0x7f ? std::numeric_limits<float>::quiet_NaN()
                    : magnitude < 8
                        ? std::ldexp(static_cast<float>(magnitude), -9)
                        : std::ldexp(static_cast<float>(8 + magnitude % 8), static_cast<int>(magnitude / 8) - 10);
    (n < 2 ? first : second) |= pack<Float16>(byte >= 0x80 ? -x : x, 0.0f) << 16 * (n % 2);
  }
}

// Exhaustive search for the nearest e4m3 value; of two equally near, the even code.
inline uint32_t convert_f32x2_to_e4m3x2(float low, float high) {
  const auto round = [](float x) -> uint32_t {
    const uint32_t sign = std::signbit(x) ? 0x80 : 0;
    if (std::isnan(x)) return sign | 0x7f;
    const double magnitude = std::fabs(static_cast<double>(x));
    uint32_t best = 0;
    double least = std::numeric_limits<double>::infinity();
    for (uint32_t code = 0; code < 0x7f; ++code) {
      const double value = code < 8 ? std::ldexp(code, -9) : std::ldexp(8 + code % 8, static_cast<int>(code / 8) - 10);
      const double distance = std::isinf(magnitude) ? 448 - value : std::fabs(value - magnitude);
      if (distance < least || (distance == least && code % 2 == 0)) best = code, least = distance;
    }
    return sign | best;
  };
  return round(low) | round(high) << 8;
}

inline float exp2_approx(float x) {
  return detail::flush(std::exp2(detail::flush(x)));
}
inline float log2_approx(float x) {
  return detail::flush(std::log2(detail::flush(x)));
}
inline float reciprocal_approx(float x) {
  return 1.0f / x;
}

inline float shuffle_xor(float x, uint32_t mask, FLASHSPARK_CALLER) {
  return as_float(emulator::exchange(emulator::Operation::shuffle_xor, as_word(x), mask, site));
}
inline int32_t shuffle(int32_t x, uint32_t from, FLASHSPARK_CALLER) {
  return static_cast<int32_t>(emulator::exchange(emulator::Operation::shuffle, static_cast<uint32_t>(x), from, site));
}
inline int32_t shuffle_up(int32_t x, uint32_t delta, FLASHSPARK_CALLER) {
  return static_cast<int32_t>(
      emulator::exchange(emulator::Operation::shuffle_up, static_cast<uint32_t>(x), delta, site));
}
inline uint32_t ballot(bool x, FLASHSPARK_CALLER) {
  return emulator::exchange(emulator::Operation::ballot, x, 0, site);
}
inline bool any(bool x, FLASHSPARK_CALLER) {
  return emulator::exchange(emulator::Operation::any, x, 0, site) != 0;
}
inline int32_t reduce_min(int32_t x, FLASHSPARK_CALLER) {
  return static_cast<int32_t>(emulator::exchange(emulator::Operation::reduce_min, static_cast<uint32_t>(x), 0, site));
}
inline int32_t reduce_max(int32_t x, FLASHSPARK_CALLER) {
  return static_cast<int32_t>(emulator::exchange(emulator::Operation::reduce_max, static_cast<uint32_t>(x), 0, site));
}
inline uint32_t reduce_add(uint32_t x, FLASHSPARK_CALLER) {
  return emulator::exchange(emulator::Operation::reduce_add, x, 0, site);
}
// Faults if the lanes hold different values.
inline int32_t uniform(int32_t x, FLASHSPARK_CALLER) {
  return static_cast<int32_t>(emulator::exchange(emulator::Operation::uniform, static_cast<uint32_t>(x), 0, site));
}

inline uint32_t permute_bytes(uint32_t x, uint32_t order) {
  uint32_t result = 0;
  for (int n = 0; n < 4; ++n) {
    const uint32_t byte = order >> 4 * n & 15;
    if (byte < 4) result |= (x >> 8 * byte & 0xff) << 8 * n;
  }
  return result;
}
inline uint32_t magnitude_not_less_f16x2(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (const uint32_t half : {0, 16}) {
    const auto magnitude = static_cast<uint16_t>(a >> half & 0x7fff), other = static_cast<uint16_t>(b >> half);
    const bool less = to_float(Float16{magnitude}) < to_float(Float16{other});  // false of NaN
    if (!less) result |= 0xffffu << half;
  }
  return result;
}
inline uint32_t magnitude_not_less_f16x2(uint32_t a, uint32_t b, bool flip) {
  return flip ? ~magnitude_not_less_f16x2(a, b) : magnitude_not_less_f16x2(a, b);
}
inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline uint32_t lowest_bit(uint32_t x, FLASHSPARK_CALLER) {
  if (x == 0) emulator::fail("lowest_bit of 0", site);
  return static_cast<uint32_t>(std::countr_zero(x));
}

}  // namespace flashspark::ptx

#undef FLASHSPARK_CALLER
