// Functions of numbers that only user-written score functions call (attention/functions.cuh). As in ptx.cuh,
// tests/emulator/ptx/math.cuh declares the same ones for the host.
#pragma once

#include "ptx/ptx.cuh"

namespace flashspark::ptx {

// One instruction each. sin and cos within 2^-20.5 for |x| <= pi; tanh within 2^-10.9 of its value.
FLASHSPARK_DEVICE float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FLASHSPARK_DEVICE float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FLASHSPARK_DEVICE float sin_approx(float x) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FLASHSPARK_DEVICE float cos_approx(float x) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FLASHSPARK_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// div.full: a / b within 2 ulp, for every b.
FLASHSPARK_DEVICE float divide(float a, float b) {
  float y;
  asm("div.full.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
// max.NaN, min.NaN: NaN if an operand is NaN.
FLASHSPARK_DEVICE float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
FLASHSPARK_DEVICE float min_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
// cvt.rzi: towards zero, saturated; NaN becomes 0 (of 64 bits: 2^63).
FLASHSPARK_DEVICE int32_t to_int32(float x) {
  return __float2int_rz(x);
}
FLASHSPARK_DEVICE int64_t to_int64(float x) {
  return x == x ? __float2ll_rz(x) : 0;
}
// To the nearest integer, ties to even.
FLASHSPARK_DEVICE float round_even(float x) {
  return ::rintf(x);
}

// Of CUDA's library.
FLASHSPARK_DEVICE float asin(float x) {
  return ::asinf(x);
}
FLASHSPARK_DEVICE float acos(float x) {
  return ::acosf(x);
}
FLASHSPARK_DEVICE float atan(float x) {
  return ::atanf(x);
}
FLASHSPARK_DEVICE float sinh(float x) {
  return ::sinhf(x);
}
FLASHSPARK_DEVICE float cosh(float x) {
  return ::coshf(x);
}
FLASHSPARK_DEVICE float erf(float x) {
  return ::erff(x);
}
FLASHSPARK_DEVICE float expm1(float x) {
  return ::expm1f(x);
}
FLASHSPARK_DEVICE float log1p(float x) {
  return ::log1pf(x);
}
FLASHSPARK_DEVICE float floor(float x) {
  return ::floorf(x);
}
FLASHSPARK_DEVICE float ceil(float x) {
  return ::ceilf(x);
}
FLASHSPARK_DEVICE float trunc(float x) {
  return ::truncf(x);
}
FLASHSPARK_DEVICE float pow(float x, float y) {
  return ::powf(x, y);
}
FLASHSPARK_DEVICE float atan2(float x, float y) {
  return ::atan2f(x, y);
}

}  // namespace flashspark::ptx
