// Element types written from their definitions, apart from the library's own conversions, which they help to test.
#include <bit>
#include <cmath>
#include <cstring>

#include "cases/cases.hpp"

namespace flashspark::cases {
namespace {

struct Format {
  int mantissa_bits;
  int exponent_bits;
  bool has_infinity;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
};
constexpr Format kHalf{10, 5, true};
constexpr Format kBfloat{7, 8, true};
constexpr Format kE4m3{3, 4, false};

// 2^n, where that is a normal number. By the C library, powers would take most of the time it takes to make a problem.
double power_of_2(int n) {
  return std::bit_cast<double>(static_cast<uint64_t>(1023 + n) << 52);
}

float decode(Format f, uint32_t bits) {
  const uint32_t mantissa = bits & ((1u << f.mantissa_bits) - 1);
  const int exponent_max = (1 << f.exponent_bits) - 1;
  const int exponent = static_cast<int>(bits >> f.mantissa_bits) & exponent_max;
  const float sign = bits >> (f.mantissa_bits + f.exponent_bits) & 1 ? -1.0f : 1.0f;
  if (f.has_infinity && exponent == exponent_max) return mantissa ? NAN : sign * INFINITY;
  if (!f.has_infinity && exponent == exponent_max && mantissa == (1u << f.mantissa_bits) - 1) return NAN;
  const bool subnormal = exponent == 0;
  const double significand = mantissa + (subnormal ? 0 : 1u << f.mantissa_bits);
  const double step = power_of_2((subnormal ? 1 : exponent) - f.bias() - f.mantissa_bits);
  return sign * static_cast<float>(significand * step);
}

uint32_t encode(Format f, float value) {
  const uint32_t sign = std::signbit(value) ? 1u << (f.mantissa_bits + f.exponent_bits) : 0;
  const uint32_t exponent_max = ((1u << f.exponent_bits) - 1) << f.mantissa_bits;
  const uint32_t mantissa_max = (1u << f.mantissa_bits) - 1;
  if (std::isnan(value)) return sign | exponent_max | mantissa_max;
  const uint32_t largest = f.has_infinity ? exponent_max : exponent_max | (mantissa_max - 1);
  if (std::isinf(value)) return sign | largest;
  const float x = std::fabs(value);
  if (x == 0) return sign;
  const int of_float = static_cast<int>(std::bit_cast<uint32_t>(x) >> 23) - 127;  // at most, of a subnormal one
  int exponent = std::max(of_float, 1 - f.bias());
  auto significand = static_cast<uint32_t>(std::nearbyint(x * power_of_2(f.mantissa_bits - exponent)));
  if (significand == 2u << f.mantissa_bits) {
    significand >>= 1;
    ++exponent;
  }
  if (exponent > f.bias() + 1) return sign | largest;
  const uint32_t bits =
      significand >> f.mantissa_bits
          ? (static_cast<uint32_t>(exponent + f.bias()) << f.mantissa_bits) + (significand & mantissa_max)
          : significand;
  return sign | std::min(bits, largest);
}

}  // namespace

float load(int32_t dtype, const void *base, int64_t index) {
  switch (dtype) {
    case FLASHSPARK_FLOAT32:
      return static_cast<const float *>(base)[index];
    case FLASHSPARK_FLOAT16:
      return decode(kHalf, static_cast<const uint16_t *>(base)[index]);
    case FLASHSPARK_BFLOAT16:
      return std::bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t *>(base)[index]) << 16);
    case FLASHSPARK_FLOAT8_E4M3:
      return decode(kE4m3, static_cast<const uint8_t *>(base)[index]);
    default:
      return NAN;
  }
}

void store(int32_t dtype, void *base, int64_t index, float value) {
  switch (dtype) {
    case FLASHSPARK_FLOAT32:
      static_cast<float *>(base)[index] = value;
      break;
    case FLASHSPARK_FLOAT16:
      static_cast<uint16_t *>(base)[index] = static_cast<uint16_t>(encode(kHalf, value));
      break;
    case FLASHSPARK_BFLOAT16:
      static_cast<uint16_t *>(base)[index] = static_cast<uint16_t>(encode(kBfloat, value));
      break;
    case FLASHSPARK_FLOAT8_E4M3:
      static_cast<uint8_t *>(base)[index] = static_cast<uint8_t>(encode(kE4m3, value));
      break;
    default:
      break;
  }
}

const char *dtype_name(int32_t dtype) {
  switch (dtype) {
    case FLASHSPARK_FLOAT32:
      return "f32";
    case FLASHSPARK_FLOAT16:
      return "f16";
    case FLASHSPARK_BFLOAT16:
      return "bf16";
    case FLASHSPARK_FLOAT8_E4M3:
      return "e4m3";
    default:
      return "none";
  }
}

}  // namespace flashspark::cases
