// The operations of score graphs (docs/design/score-graph.md) as functions of numbers. The text that src/graph writes
// calls them by the names of the operations.
#pragma once

#include "attention/function_arguments.hpp"
#include "common/math.cuh"
#include "ptx/math.cuh"

namespace flashspark {

// A score function divides by softmax_scale, and what it adds must not overflow: a smaller scale than this makes no
// difference to any product of 16-bit queries and keys.
constexpr float kMinFunctionScale = 0x1p-40f;

}  // namespace flashspark

namespace flashspark::fn {

// Of the kernels with bfloat16 or e4m3 operands one instruction is precise enough: it is as good as a bfloat16.
#if defined(FLASHSPARK_FAST_TANH)
constexpr bool kFastTanh = true;
#else
constexpr bool kFastTanh = false;
#endif
constexpr float kLog2e = 1.4426950408889634f, kNaturalLog2 = 0.6931471805599453f;

FLASHSPARK_DEVICE float infinity() {
  return __builtin_huge_valf();
}
FLASHSPARK_DEVICE float nan() {
  return ptx::as_float(0x7fc00000u);
}

// ---- f32

FLASHSPARK_DEVICE float exp2(float x) {
  return ptx::exp2_approx(x);
}
FLASHSPARK_DEVICE float exp(float x) {
  return ptx::exp2_approx(x * kLog2e);
}
FLASHSPARK_DEVICE float log2(float x) {
  return ptx::log2_approx(x);
}
FLASHSPARK_DEVICE float log(float x) {
  return ptx::log2_approx(x) * kNaturalLog2;
}
FLASHSPARK_DEVICE float sqrt(float x) {
  return ptx::sqrt_approx(x);
}
FLASHSPARK_DEVICE float rsqrt(float x) {
  return ptx::rsqrt_approx(x);
}
FLASHSPARK_DEVICE float div(float a, float b) {
  return ptx::divide(a, b);
}
FLASHSPARK_DEVICE float sigmoid(float x) {
  return ptx::reciprocal_approx(1.0f + exp(-x));
}
// 1 - 2 / (e^2x + 1)
FLASHSPARK_DEVICE float tanh(float x) {
  return kFastTanh ? ptx::tanh_approx(x) : 1.0f - 2.0f * ptx::reciprocal_approx(exp(2.0f * x) + 1.0f);
}
// x minus whole turns, in two parts of 2 pi: the instructions for sine and cosine are precise within one turn only.
FLASHSPARK_DEVICE float within_a_turn(float x) {
  const float turns = ptx::round_even(x * 0.15915494309189535f);
  return (x - turns * 6.28125f) - turns * 0.0019353071795864769f;
}
FLASHSPARK_DEVICE float sin(float x) {
  return ptx::sin_approx(within_a_turn(x));
}
FLASHSPARK_DEVICE float cos(float x) {
  return ptx::cos_approx(within_a_turn(x));
}
FLASHSPARK_DEVICE float tan(float x) {
  const float turn = within_a_turn(x);
  return ptx::divide(ptx::sin_approx(turn), ptx::cos_approx(turn));
}
using ptx::acos;
using ptx::asin;
using ptx::atan;
using ptx::atan2;
using ptx::ceil;
using ptx::cosh;
using ptx::erf;
using ptx::expm1;
using ptx::floor;
using ptx::log1p;
using ptx::pow;
using ptx::sinh;
using ptx::trunc;
FLASHSPARK_DEVICE float round(float x) {
  return ptx::round_even(x);
}
FLASHSPARK_DEVICE bool isnan(float x) {
  return x != x;
}
FLASHSPARK_DEVICE bool isinf(float x) {
  return x == infinity() || x == -infinity();
}
FLASHSPARK_DEVICE float max(float a, float b) {
  return ptx::max_nan(a, b);
}
FLASHSPARK_DEVICE float min(float a, float b) {
  return ptx::min_nan(a, b);
}
FLASHSPARK_DEVICE float abs(float x) {
  return ptx::as_float(ptx::as_word(x) & 0x7fffffffu);
}
FLASHSPARK_DEVICE float sign(float x) {
  return x > 0 ? 1.0f : (x < 0 ? -1.0f : x);  // 0 and NaN stay
}
// With the sign of the divisor, as in Python.
FLASHSPARK_DEVICE float floordiv(float a, float b) {
  return ptx::floor(a / b);
}
FLASHSPARK_DEVICE float mod(float a, float b) {
  const float rest = a - ptx::trunc(a / b) * b;
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

// ---- i32 and i64: as unsigned numbers they wrap

template <class Integer>
struct UnsignedOf;
template <>
struct UnsignedOf<int32_t> {
  using Type = uint32_t;
};
template <>
struct UnsignedOf<int64_t> {
  using Type = uint64_t;
};
template <class Integer>
using Unsigned = typename UnsignedOf<Integer>::Type;

template <class Integer>
FLASHSPARK_DEVICE Integer add(Integer a, Integer b) {
  return static_cast<Integer>(static_cast<Unsigned<Integer>>(a) + static_cast<Unsigned<Integer>>(b));
}
template <class Integer>
FLASHSPARK_DEVICE Integer sub(Integer a, Integer b) {
  return static_cast<Integer>(static_cast<Unsigned<Integer>>(a) - static_cast<Unsigned<Integer>>(b));
}
template <class Integer>
FLASHSPARK_DEVICE Integer mul(Integer a, Integer b) {
  return static_cast<Integer>(static_cast<Unsigned<Integer>>(a) * static_cast<Unsigned<Integer>>(b));
}
template <class Integer>
FLASHSPARK_DEVICE Integer neg(Integer a) {
  return sub(Integer{0}, a);
}
template <class Integer>
FLASHSPARK_DEVICE Integer max(Integer a, Integer b) {
  return a > b ? a : b;
}
template <class Integer>
FLASHSPARK_DEVICE Integer min(Integer a, Integer b) {
  return a < b ? a : b;
}
template <class Integer>
FLASHSPARK_DEVICE Integer abs(Integer a) {
  return a < 0 ? neg(a) : a;
}
template <class Integer>
FLASHSPARK_DEVICE Integer sign(Integer a) {
  return static_cast<Integer>((a > 0) - (a < 0));
}
// The most negative number by -1 wraps; by 0 it is 0.
template <class Integer>
FLASHSPARK_DEVICE Integer floordiv(Integer a, Integer b) {
  if (b == 0) return 0;
  if (b == -1) return neg(a);
  const Integer q = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? q - 1 : q;
}
template <class Integer>
FLASHSPARK_DEVICE Integer mod(Integer a, Integer b) {
  if (b == 0 || b == -1) return 0;
  const Integer rest = a % b;
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}
template <class Integer>
FLASHSPARK_DEVICE Integer shl(Integer a, Integer count) {
  return static_cast<Integer>(static_cast<Unsigned<Integer>>(a) << (count & (8 * sizeof(Integer) - 1)));
}
template <class Integer>
FLASHSPARK_DEVICE Integer shr(Integer a, Integer count) {
  return a >> (count & (8 * sizeof(Integer) - 1));
}

// ---- conversions

FLASHSPARK_DEVICE int32_t to_i32(float x) {
  return ptx::to_int32(x);
}
FLASHSPARK_DEVICE int32_t to_i32(int64_t x) {
  return static_cast<int32_t>(static_cast<uint64_t>(x));
}
FLASHSPARK_DEVICE int32_t to_i32(int32_t x) {
  return x;
}
FLASHSPARK_DEVICE int32_t to_i32(bool x) {
  return x ? 1 : 0;
}
FLASHSPARK_DEVICE int64_t to_i64(float x) {
  return ptx::to_int64(x);
}
FLASHSPARK_DEVICE int64_t to_i64(int64_t x) {
  return x;
}
FLASHSPARK_DEVICE int64_t to_i64(int32_t x) {
  return x;
}
FLASHSPARK_DEVICE int64_t to_i64(bool x) {
  return x ? 1 : 0;
}

// ---- captured tensors

// An index that may be negative counts from the end; what is out of range becomes the nearest that exists.
FLASHSPARK_DEVICE int32_t index(int32_t i, int32_t size) {
  return clamp(i < 0 ? i + size : i, 0, size - 1);
}
FLASHSPARK_DEVICE int32_t index(int64_t i, int32_t size) {
  const int64_t wrapped = i < 0 ? i + size : i;
  return static_cast<int32_t>(max<int64_t>(0, min<int64_t>(wrapped, size - 1)));
}
FLASHSPARK_DEVICE int32_t index_from_0(int32_t i, int32_t size) {
  return min_of(i, size - 1);
}
template <class Tensor, class... Index>
FLASHSPARK_DEVICE int64_t offset(const Tensor &t, Index... indices) {
  const int32_t at[sizeof...(indices) + 1] = {indices..., 0};
  int64_t sum = 0;
  FLASHSPARK_UNROLL
  for (uint32_t d = 0; d < sizeof...(indices); ++d) sum += at[d] * t.strides[d];
  return sum;
}
FLASHSPARK_DEVICE bool load_bool(const CapturedTensor &t, int64_t at) {
  return static_cast<const uint8_t *>(t.data)[at] != 0;
}
FLASHSPARK_DEVICE int32_t load_u8(const CapturedTensor &t, int64_t at) {
  return static_cast<const uint8_t *>(t.data)[at];
}
FLASHSPARK_DEVICE int32_t load_i8(const CapturedTensor &t, int64_t at) {
  return static_cast<const int8_t *>(t.data)[at];
}
FLASHSPARK_DEVICE int32_t load_i16(const CapturedTensor &t, int64_t at) {
  return static_cast<const int16_t *>(t.data)[at];
}
FLASHSPARK_DEVICE int32_t load_i32(const CapturedTensor &t, int64_t at) {
  return static_cast<const int32_t *>(t.data)[at];
}
FLASHSPARK_DEVICE int64_t load_i64(const CapturedTensor &t, int64_t at) {
  return static_cast<const int64_t *>(t.data)[at];
}
FLASHSPARK_DEVICE float load_f16(const CapturedTensor &t, int64_t at) {
  return ptx::to_float(static_cast<const ptx::Float16 *>(t.data)[at]);
}
FLASHSPARK_DEVICE float load_bf16(const CapturedTensor &t, int64_t at) {
  return ptx::to_float(static_cast<const ptx::Bfloat16 *>(t.data)[at]);
}
FLASHSPARK_DEVICE float load_f32(const CapturedTensor &t, int64_t at) {
  return static_cast<const float *>(t.data)[at];
}
FLASHSPARK_DEVICE float load_f64(const CapturedTensor &t, int64_t at) {
  return static_cast<float>(static_cast<const double *>(t.data)[at]);
}

}  // namespace flashspark::fn
