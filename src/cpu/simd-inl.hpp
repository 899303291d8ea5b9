// Vector helpers, compiled once for every SIMD target (hence the toggling guard).
#if defined(FLASHSPARK_CPU_SIMD_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHSPARK_CPU_SIMD_INL_HPP_
#undef FLASHSPARK_CPU_SIMD_INL_HPP_
#else
#define FLASHSPARK_CPU_SIMD_INL_HPP_
#endif

#include <hwy/highway.h>

#include "dtype.hpp"

HWY_BEFORE_NAMESPACE();
namespace flashspark::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// Storage types: they choose the widening load.
struct F32 {
  using Element = float;
};
struct F16 {
  using Element = uint16_t;
};
struct BF16 {
  using Element = uint16_t;
};
struct E4M3 {
  using Element = uint8_t;
};

// Calls f with the storage type of `dtype`.
template <class F>
HWY_INLINE void with_type(int32_t dtype, F &&f) {
  switch (dtype) {
    case FLASHSPARK_FLOAT32:
      return f(F32{});
    case FLASHSPARK_FLOAT16:
      return f(F16{});
    case FLASHSPARK_BFLOAT16:
      return f(BF16{});
    default:
      return f(E4M3{});
  }
}

#if HWY_TARGET == HWY_SSE4
// For CPUs without F16C. Highway's own conversion there takes infinities and NaN for numbers, and truncates. No step
// takes or gives a subnormal float, so that a flush-to-zero mode of the caller changes nothing.
template <class D>
HWY_INLINE hn::Vec<D> floats_of_halves(D d, hn::Vec<hn::Rebind<uint16_t, D>> halves) {
  const hn::RebindToSigned<D> di;
  const auto code = hn::PromoteTo(di, halves);
  const auto magnitude = hn::ShiftLeft<13>(hn::And(code, hn::Set(di, 0x7fff)));
  const auto sign = hn::ShiftLeft<16>(hn::And(code, hn::Set(di, 0x8000)));
  const auto normal = hn::Add(magnitude, hn::Set(di, (127 - 15) << 23));
  // 2^-14 plus the fraction as that exponent's mantissa, less 2^-14.
  const auto least = hn::Set(di, (127 - 14) << 23);
  const auto subnormal = hn::BitCast(di, hn::Sub(hn::BitCast(d, hn::Or(magnitude, least)), hn::BitCast(d, least)));
  const auto special = hn::Or(magnitude, hn::Set(di, 0x7f800000));
  const auto number = hn::IfThenElse(hn::Gt(hn::Set(di, 1 << 23), magnitude), subnormal, normal);
  const auto is_special = hn::Gt(magnitude, hn::Set(di, 0x0f7fffff));
  return hn::BitCast(d, hn::Or(sign, hn::IfThenElse(is_special, special, number)));
}

template <class D>
HWY_INLINE hn::Vec<hn::Rebind<uint16_t, D>> halves_of_floats(D d, hn::Vec<D> x) {
  const hn::RebindToSigned<D> di;
  const auto bits = hn::BitCast(di, x);
  const auto magnitude = hn::And(bits, hn::Set(di, 0x7fffffff));
  const auto sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(di, 0x8000));
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(di, 1));
  const auto rebased = hn::Sub(magnitude, hn::Set(di, (127 - 15) << 23));
  const auto normal = hn::ShiftRight<13>(hn::Add(rebased, hn::Add(odd, hn::Set(di, 0xfff))));
  // A unit of 1/2's mantissa is the smallest half, 2^-24: the sum rounds as the half does.
  const auto base = hn::Set(di, 126 << 23);
  const auto sum = hn::Add(hn::BitCast(d, magnitude), hn::BitCast(d, base));
  const auto subnormal = hn::Sub(hn::BitCast(di, sum), base);
  const auto number = hn::IfThenElse(hn::Gt(hn::Set(di, (127 - 14) << 23), magnitude), subnormal, normal);
  // 65520, half way between the largest half and 2^16, rounds to infinity.
  const auto is_large = hn::Gt(magnitude, hn::Set(di, 0x477fefff));
  const auto is_nan = hn::Gt(magnitude, hn::Set(di, 0x7f800000));
  const auto large = hn::IfThenElse(is_nan, hn::Set(di, 0x7e00), hn::Set(di, 0x7c00));
  return hn::DemoteTo(hn::Rebind<uint16_t, D>(), hn::Or(sign, hn::IfThenElse(is_large, large, number)));
}
#else
template <class D>
HWY_INLINE hn::Vec<D> floats_of_halves(D d, hn::Vec<hn::Rebind<uint16_t, D>> halves) {
  return hn::PromoteTo(d, hn::BitCast(hn::Rebind<hwy::float16_t, D>(), halves));
}
template <class D>
HWY_INLINE hn::Vec<hn::Rebind<uint16_t, D>> halves_of_floats(D, hn::Vec<D> x) {
  return hn::BitCast(hn::Rebind<uint16_t, D>(), hn::DemoteTo(hn::Rebind<hwy::float16_t, D>(), x));
}
#endif

// Lanes(d) elements at p as floats.
template <class D>
HWY_INLINE hn::Vec<D> widen(D d, F32, const float *p) {
  return hn::LoadU(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> widen(D d, BF16, const uint16_t *p) {
  const hn::RebindToUnsigned<D> du;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(hn::Rebind<uint16_t, D>(), p))));
}
template <class D>
HWY_INLINE hn::Vec<D> widen(D d, F16, const uint16_t *p) {
  return floats_of_halves(d, hn::LoadU(hn::Rebind<uint16_t, D>(), p));
}
// An e4m3 code with its exponent moved into a half's field is the value times 2^-8, subnormals included; only NaN (all
// ones) needs a test.
template <class D>
HWY_INLINE hn::Vec<D> widen(D d, E4M3, const uint8_t *p) {
  const hn::Rebind<int16_t, D> di;
  const hn::Rebind<uint16_t, D> du;
  const auto code = hn::BitCast(di, hn::PromoteTo(hn::Rebind<uint16_t, D>(), hn::LoadU(hn::Rebind<uint8_t, D>(), p)));
  const auto moved = hn::And(hn::ShiftRight<1>(hn::ShiftLeft<8>(code)), hn::Set(di, static_cast<int16_t>(0xbf80)));
  const auto all_ones = hn::Set(di, 0x3f80);
  const auto is_nan = hn::Eq(hn::And(moved, all_ones), all_ones);
  const auto half = hn::Or(moved, hn::IfThenElseZero(is_nan, hn::Set(di, 0x7fff)));
  return hn::Mul(floats_of_halves(d, hn::BitCast(du, half)), hn::Set(d, 256.0f));
}

// The larger of x and `low`; NaN stays NaN. x86's maximum gives its second operand where one is NaN, Arm's the number.
template <class D, class V>
HWY_INLINE V at_least(D d, float low, V x) {
#if HWY_ARCH_X86
  return hn::Max(hn::Set(d, low), x);
#else
  return hn::IfThenElse(hn::Lt(x, hn::Set(d, low)), hn::Set(d, low), x);
#endif
}

// 2^x for x <= 0 (x = -inf gives 0, NaN stays NaN) to about one ulp: 2^round(x) times the degree-6 polynomial of
// Cephes' exp2f for the rest in [-1/2, 1/2].
template <class D, class V>
HWY_INLINE V exp2_nonpositive(D d, V x) {
  const hn::RebindToSigned<D> di;
  const V clamped = at_least(d, -127.0f, x);
  const V whole = hn::Round(clamped);
  const V f = hn::Sub(clamped, whole);
  V y = hn::Set(d, 1.535336188e-4f);
  y = hn::MulAdd(y, f, hn::Set(d, 1.339887440e-3f));
  y = hn::MulAdd(y, f, hn::Set(d, 9.618437357e-3f));
  y = hn::MulAdd(y, f, hn::Set(d, 5.550332471e-2f));
  y = hn::MulAdd(y, f, hn::Set(d, 2.402264791e-1f));
  y = hn::MulAdd(y, f, hn::Set(d, 6.931472029e-1f));
  y = hn::MulAdd(y, f, hn::Set(d, 1.0f));
  // A product, not a sum of exponents: whatever a NaN becomes as an integer, y is still NaN. At -127 the factor is 0.
  return hn::Mul(y, hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, whole), hn::Set(di, 127)))));
}

// tanh x within 2 ulp, NaN and infinities included: (1 - u) / (1 + u) with u = e^(-2|x|), and below 0.55, where 1 - u
// would cancel, x + x^3 times a minimax polynomial in x^2 (relative error 3.7e-8). A third of Highway's time.
template <class D, class V>
HWY_INLINE V tanh_of(D d, V x) {
  const V one = hn::Set(d, 1.0f), size = hn::Abs(x);
  const V u = exp2_nonpositive(d, hn::Mul(size, hn::Set(d, -2.88539008f)));  // -2 log2(e)
  const V large = hn::CopySign(hn::Div(hn::Sub(one, u), hn::Add(one, u)), x);
  const V y = hn::Mul(x, x);
  V p = hn::Set(d, 0x1.0d5032p-6f);
  p = hn::MulAdd(p, y, hn::Set(d, -0x1.af7cccp-5f));
  p = hn::MulAdd(p, y, hn::Set(d, 0x1.10cef6p-3f));
  p = hn::MulAdd(p, y, hn::Set(d, -0x1.555452p-2f));
  const V small = hn::MulAdd(hn::Mul(x, y), p, x);
  return hn::IfThenElse(hn::Lt(size, hn::Set(d, 0.55f)), small, large);
}

template <class D>
HWY_INLINE float max_of(D d, hn::Vec<D> v) {
  return hn::GetLane(hn::MaxOfLanes(d, v));
}
template <class D>
HWY_INLINE float sum_of(D d, hn::Vec<D> v) {
  return hn::GetLane(hn::SumOfLanes(d, v));
}

// Writes `count` floats, each times `factor`, as elements of `dtype` from element `at` of data. count % 8 == 0.
inline HWY_ATTR void store_row(const float *row, int64_t count, float factor, void *data, int64_t at, int32_t dtype) {
  const hn::CappedTag<float, 8> d;
  const hn::RebindToSigned<decltype(d)> di;
  const hn::Rebind<uint16_t, decltype(d)> d16;
  const auto vfactor = hn::Set(d, factor);
  const int64_t step = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t n = 0; n < count; n += step) {
    const auto x = hn::Mul(hn::LoadU(d, row + n), vfactor);
    if (dtype == FLASHSPARK_FLOAT32) {
      hn::StoreU(x, d, static_cast<float *>(data) + at + n);
    } else if (dtype == FLASHSPARK_BFLOAT16) {
      const hn::RebindToUnsigned<decltype(d)> du;
      const auto bits = hn::BitCast(du, x);
      const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
      const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(du, 0x7fffu)), odd));
      const auto quiet = hn::Or(hn::ShiftRight<16>(bits), hn::Set(du, 0x40u));
      const auto result = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(x)), quiet, rounded);
      hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di, result)), d16, static_cast<uint16_t *>(data) + at + n);
    } else if (dtype == FLASHSPARK_FLOAT16) {
      hn::StoreU(halves_of_floats(d, x), d16, static_cast<uint16_t *>(data) + at + n);
    } else {
      for (int64_t m = n; m < n + step; ++m) store_from_float(data, at + m, dtype, row[m] * factor);
    }
  }
}

}  // namespace flashspark::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
