// Storage formats: names, sizes, and conversions to and from float, which round to nearest even and keep NaN.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "flashspark/flashspark.h"

namespace flashspark {

constexpr size_t dtype_size(int32_t dtype) {
  switch (dtype) {
    case FLASHSPARK_FLOAT32:
      return 4;
    case FLASHSPARK_FLOAT16:
    case FLASHSPARK_BFLOAT16:
      return 2;
    case FLASHSPARK_FLOAT8_E4M3:
      return 1;
    default:
      return 0;
  }
}

constexpr const char *dtype_name(int32_t dtype) {
  switch (dtype) {
    case FLASHSPARK_FLOAT32:
      return "float32";
    case FLASHSPARK_FLOAT16:
      return "float16";
    case FLASHSPARK_BFLOAT16:
      return "bfloat16";
    case FLASHSPARK_FLOAT8_E4M3:
      return "float8_e4m3";
    case FLASHSPARK_DTYPE_NONE:
      return "none";
    default:
      return "unknown";
  }
}

// std::bit_cast of these two types. It takes its argument by reference, which is an object on the stack to GCC's
// AddressSanitizer: with its upkeep, one number took longer to load than an oracle takes for all else.
constexpr float float_of(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}
constexpr uint32_t bits_of(float x) {
  return __builtin_bit_cast(uint32_t, x);
}

inline float bf16_to_float(uint16_t x) {
  return float_of(uint32_t{x} << 16);
}

inline uint16_t float_to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);  // NaN: keep it quiet
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

namespace detail {
// The value of a small float, given without its sign bit, that has so many mantissa bits and this exponent bias.
// Special codes are the caller's.
inline float small_to_float(uint32_t magnitude, int mantissa_bits, int bias) {
  const uint32_t exponent = magnitude >> mantissa_bits;
  const uint32_t mantissa = magnitude & ((1u << mantissa_bits) - 1);
  if (exponent == 0) return std::ldexp(static_cast<float>(mantissa), 1 - bias - mantissa_bits);
  return float_of(((exponent - bias + 127) << 23) | (mantissa << (23 - mantissa_bits)));
}

// The nearest such code to a finite x >= 0, ties to even. It may exceed the format's largest code: the caller clamps.
inline uint32_t float_to_small(float x, int mantissa_bits, int bias) {
  const uint32_t u = bits_of(x);
  const int exponent = static_cast<int>(u >> 23) - 127 + bias;
  if (exponent <= 0) {  // subnormal in the small format: the code counts units of its smallest step
    return static_cast<uint32_t>(std::nearbyint(std::ldexp(x, bias + mantissa_bits - 1)));
  }
  const int shift = 23 - mantissa_bits;
  const uint32_t rounded = u + ((1u << (shift - 1)) - 1) + ((u >> shift) & 1u);
  return (rounded >> shift) - (static_cast<uint32_t>(127 - bias) << mantissa_bits);
}
}  // namespace detail

inline float f16_to_float(uint16_t x) {
  const uint32_t magnitude = x & 0x7fffu;
  float value;
  if (magnitude >= 0x7c00u) {
    value = float_of(0x7f800000u | ((magnitude & 0x3ffu) << 13));
  } else {
    value = detail::small_to_float(magnitude, 10, 15);
  }
  return std::copysign(value, (x & 0x8000u) ? -1.0f : 1.0f);
}

inline uint16_t float_to_f16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000u : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7e00u;
  if (magnitude >= 65520.0f) return sign | 0x7c00u;  // half way between 65504 and 2^16 rounds to infinity
  return static_cast<uint16_t>(sign | detail::float_to_small(magnitude, 10, 15));
}

inline float e4m3_to_float(uint8_t x) {
  const uint32_t magnitude = x & 0x7fu;
  const float value = magnitude == 0x7fu ? float_of(0x7fc00000u) : detail::small_to_float(magnitude, 3, 7);
  return std::copysign(value, (x & 0x80u) ? -1.0f : 1.0f);
}

// Saturates to 448, as the GPU's cvt.satfinite does; infinities too.
inline uint8_t float_to_e4m3(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80u : 0;
  if (std::isnan(x)) return sign | 0x7fu;
  const float magnitude = std::fmin(std::fabs(x), 448.0f);
  return static_cast<uint8_t>(sign | detail::float_to_small(magnitude, 3, 7));
}

// What `body` makes of a function that loads an element of an array of `dtype` by its index. A loop in it knows the
// type.
template <class Body>
inline auto with_elements(const void *data, int32_t dtype, Body &&body) {
  switch (dtype) {
    case FLASHSPARK_FLOAT32:
      return body([data](int64_t index) { return static_cast<const float *>(data)[index]; });
    case FLASHSPARK_FLOAT16:
      return body([data](int64_t index) { return f16_to_float(static_cast<const uint16_t *>(data)[index]); });
    case FLASHSPARK_BFLOAT16:
      return body([data](int64_t index) { return bf16_to_float(static_cast<const uint16_t *>(data)[index]); });
    default:
      return body([data](int64_t index) { return e4m3_to_float(static_cast<const uint8_t *>(data)[index]); });
  }
}

// One element at `index` of an array of `dtype`.
inline float load_as_float(const void *data, int64_t index, int32_t dtype) {
  return with_elements(data, dtype, [index](auto element) { return element(index); });
}

inline void store_from_float(void *data, int64_t index, int32_t dtype, float value) {
  switch (dtype) {
    case FLASHSPARK_FLOAT32:
      static_cast<float *>(data)[index] = value;
      break;
    case FLASHSPARK_FLOAT16:
      static_cast<uint16_t *>(data)[index] = float_to_f16(value);
      break;
    case FLASHSPARK_BFLOAT16:
      static_cast<uint16_t *>(data)[index] = float_to_bf16(value);
      break;
    default:
      static_cast<uint8_t *>(data)[index] = float_to_e4m3(value);
  }
}

}  // namespace flashspark
