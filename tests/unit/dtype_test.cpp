// Every code of every storage format, and every place where rounding turns, against conversions written another way:
// formats as tables of values, rounding as a search for the nearest one.
#include "dtype.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>
#include <vector>

namespace flashspark {
namespace {

struct Format {
  int exponent_bits, mantissa_bits, bias;
  bool has_infinity;
};
constexpr Format kF16{5, 10, 15, true}, kBf16{8, 7, 127, true}, kE4m3{4, 3, 7, false};

// The value of a code, by the definition: (-1)^s 2^(e - bias) 1.m, or 2^(1 - bias) 0.m for e = 0.
double value_of(uint32_t code, const Format &f) {
  const int mantissa = static_cast<int>(code % (1u << f.mantissa_bits));
  const int exponent = static_cast<int>((code >> f.mantissa_bits) % (1u << f.exponent_bits));
  const bool negative = code >> (f.mantissa_bits + f.exponent_bits) & 1;
  const int top = (1 << f.exponent_bits) - 1;
  double x = exponent == 0 ? std::ldexp(mantissa, 1 - f.bias - f.mantissa_bits)
                           : std::ldexp(mantissa + (1 << f.mantissa_bits), exponent - f.bias - f.mantissa_bits);
  if (f.has_infinity && exponent == top) x = mantissa == 0 ? INFINITY : NAN;
  if (!f.has_infinity && exponent == top && mantissa == (1 << f.mantissa_bits) - 1) x = NAN;
  return negative ? -x : x;
}

class Nearest {
 public:
  explicit Nearest(const Format &f) : format_(f) {
    const uint32_t codes = 1u << (f.mantissa_bits + f.exponent_bits);
    for (uint32_t c = 0; c < codes && std::isfinite(value_of(c, f)); ++c) values_.push_back(value_of(c, f));
  }
  // The code nearest to x >= 0, an even one when two are; one past the end means "rounds beyond the largest".
  uint32_t operator()(double x) const {
    const auto above = std::lower_bound(values_.begin(), values_.end(), x);
    auto code = static_cast<uint32_t>(above - values_.begin());
    if (code == 0) return 0;
    const double low = values_[code - 1];
    const double high = code < values_.size() ? values_[code] : 2 * low - values_[code - 2];
    const double middle = (low + high) / 2;
    if (x < middle || (x == middle && (code - 1) % 2 == 0)) --code;
    return code;
  }
  const std::vector<double> &values() const { return values_; }

 private:
  Format format_;
  std::vector<double> values_;
};

void expect_same(float got, double want, uint32_t code) {
  if (std::isnan(want)) {
    EXPECT_TRUE(std::isnan(got)) << "code " << code;
  } else {
    EXPECT_EQ(got, want) << "code " << code;
    EXPECT_EQ(std::signbit(got), std::signbit(want)) << "code " << code;
  }
}

TEST(Dtype, EveryF16CodeHasItsValue) {
  for (uint32_t c = 0; c < 65536; ++c) expect_same(f16_to_float(static_cast<uint16_t>(c)), value_of(c, kF16), c);
}
TEST(Dtype, EveryBf16CodeHasItsValue) {
  for (uint32_t c = 0; c < 65536; ++c) expect_same(bf16_to_float(static_cast<uint16_t>(c)), value_of(c, kBf16), c);
}
TEST(Dtype, EveryE4m3CodeHasItsValue) {
  for (uint32_t c = 0; c < 256; ++c) expect_same(e4m3_to_float(static_cast<uint8_t>(c)), value_of(c, kE4m3), c);
}

// Every code, every tie between neighbours, and the floats just beside both.
template <class Encode>
void check_rounding(const Format &format, Encode encode, uint32_t overflow_code) {
  const Nearest nearest(format);
  const auto &values = nearest.values();
  const uint32_t sign = 1u << (format.mantissa_bits + format.exponent_bits);
  const auto check = [&](float x) {
    if (!std::isfinite(x) || x < 0) return;
    uint32_t want = nearest(x);
    if (want >= values.size()) want = overflow_code;
    ASSERT_EQ(uint32_t{encode(x)}, want) << "x = " << x;
    ASSERT_EQ(uint32_t{encode(-x)}, want | sign) << "x = -" << x;
  };
  for (size_t n = 0; n < values.size(); ++n) {
    const double next = n + 1 < values.size() ? values[n + 1] : 2 * values[n] - values[n - 1];
    for (const double x : {values[n], (values[n] + next) / 2, next}) {
      const auto at = static_cast<float>(x);
      check(at);
      check(std::nextafterf(at, INFINITY));
      check(std::nextafterf(at, -INFINITY));
    }
  }
  std::mt19937 rng(3);
  for (int n = 0; n < 200000; ++n) check(std::bit_cast<float>(static_cast<uint32_t>(rng()) & 0x7fffffffu));
  check(std::numeric_limits<float>::max());
  check(std::numeric_limits<float>::denorm_min());
}

TEST(Dtype, F16RoundsToNearestEven) {
  check_rounding(kF16, float_to_f16, 0x7c00);
}
TEST(Dtype, Bf16RoundsToNearestEven) {
  check_rounding(kBf16, float_to_bf16, 0x7f80);
}
TEST(Dtype, E4m3RoundsToNearestEvenAndSaturates) {
  check_rounding(kE4m3, float_to_e4m3, 0x7e);
}

TEST(Dtype, InfinitiesStayOrSaturate) {
  EXPECT_EQ(float_to_f16(INFINITY), 0x7c00);
  EXPECT_EQ(float_to_f16(-INFINITY), 0xfc00);
  EXPECT_EQ(float_to_bf16(INFINITY), 0x7f80);
  EXPECT_EQ(float_to_bf16(-INFINITY), 0xff80);
  EXPECT_EQ(float_to_e4m3(INFINITY), 0x7e);
  EXPECT_EQ(float_to_e4m3(-INFINITY), 0xfe);
}

TEST(Dtype, NanStaysNanWhateverItsPayload) {
  for (const uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffffffffu}) {
    const float nan = std::bit_cast<float>(bits);
    EXPECT_TRUE(std::isnan(f16_to_float(float_to_f16(nan)))) << std::hex << bits;
    EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(nan)))) << std::hex << bits;
    EXPECT_TRUE(std::isnan(e4m3_to_float(float_to_e4m3(nan)))) << std::hex << bits;
  }
}

TEST(Dtype, SizesAndNames) {
  EXPECT_EQ(flashspark_dtype_size(FLASHSPARK_FLOAT32), 4u);
  EXPECT_EQ(flashspark_dtype_size(FLASHSPARK_FLOAT16), 2u);
  EXPECT_EQ(flashspark_dtype_size(FLASHSPARK_BFLOAT16), 2u);
  EXPECT_EQ(flashspark_dtype_size(FLASHSPARK_FLOAT8_E4M3), 1u);
  for (const int32_t unknown : {-1, 0, 5, INT32_MAX}) EXPECT_EQ(flashspark_dtype_size(unknown), 0u);
}

TEST(Dtype, LoadAndStoreMeetInTheMiddle) {
  for (const int32_t dtype : {FLASHSPARK_FLOAT32, FLASHSPARK_FLOAT16, FLASHSPARK_BFLOAT16, FLASHSPARK_FLOAT8_E4M3}) {
    std::vector<unsigned char> bytes(3 * dtype_size(dtype), 0xee);
    store_from_float(bytes.data(), 1, dtype, -1.5f);
    EXPECT_EQ(load_as_float(bytes.data(), 1, dtype), -1.5f);
    for (size_t n = 0; n < dtype_size(dtype); ++n) {
      EXPECT_EQ(bytes[n], 0xee);
      EXPECT_EQ(bytes[2 * dtype_size(dtype) + n], 0xee);
    }
  }
}

}  // namespace
}  // namespace flashspark
