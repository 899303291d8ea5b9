// The host counterpart of kernels/ptx/math.cuh.
#pragma once

#include "ptx/ptx.cuh"

namespace flashspark::ptx {

inline float sqrt_approx(float x) {
  return std::sqrt(x);
}
inline float rsqrt_approx(float x) {
  return 1.0f / std::sqrt(x);
}
inline float sin_approx(float x) {
  return std::sin(x);
}
inline float cos_approx(float x) {
  return std::cos(x);
}
inline float tanh_approx(float x) {
  return std::tanh(x);
}
inline float divide(float a, float b) {
  return a / b;
}
inline float max_nan(float a, float b) {
  return a != a ? a : (b != b ? b : (a > b ? a : b));
}
inline float min_nan(float a, float b) {
  return a != a ? a : (b != b ? b : (a < b ? a : b));
}
namespace detail {
template <class Integer>
Integer saturated(float x) {
  constexpr auto kMin = std::numeric_limits<Integer>::min(), kMax = std::numeric_limits<Integer>::max();
  if (x != x) return 0;
  if (x <= static_cast<float>(kMin)) return kMin;
  return x >= static_cast<float>(kMax) ? kMax : static_cast<Integer>(x);
}
}  // namespace detail
inline int32_t to_int32(float x) {
  return detail::saturated<int32_t>(x);
}
inline int64_t to_int64(float x) {
  return detail::saturated<int64_t>(x);
}
inline float round_even(float x) {
  return std::nearbyint(x);
}
inline float asin(float x) {
  return std::asin(x);
}
inline float acos(float x) {
  return std::acos(x);
}
inline float atan(float x) {
  return std::atan(x);
}
inline float sinh(float x) {
  return std::sinh(x);
}
inline float cosh(float x) {
  return std::cosh(x);
}
inline float erf(float x) {
  return std::erf(x);
}
inline float expm1(float x) {
  return std::expm1(x);
}
inline float log1p(float x) {
  return std::log1p(x);
}
inline float floor(float x) {
  return std::floor(x);
}
inline float ceil(float x) {
  return std::ceil(x);
}
inline float trunc(float x) {
  return std::trunc(x);
}
inline float pow(float x, float y) {
  return std::pow(x, y);
}
inline float atan2(float x, float y) {
  return std::atan2(x, y);
}

}  // namespace flashspark::ptx
