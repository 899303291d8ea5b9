// Integer arithmetic of the kernels.
#pragma once

#include "common/divisor.hpp"
#include "ptx/ptx.cuh"

namespace flashspark {

FLASHSPARK_DEVICE int32_t min_of(int32_t a, int32_t b) {
  return a < b ? a : b;
}
FLASHSPARK_DEVICE int32_t max_of(int32_t a, int32_t b) {
  return a > b ? a : b;
}
FLASHSPARK_DEVICE uint32_t min_of(uint32_t a, uint32_t b) {
  return a < b ? a : b;
}
FLASHSPARK_DEVICE int32_t clamp(int32_t x, int32_t low, int32_t high) {
  return max_of(low, min_of(x, high));
}
FLASHSPARK_DEVICE int32_t ceil_div(int32_t a, int32_t b) {
  return (a + b - 1) / b;
}
// a / b for a >= 0 and b > 0; an unsigned division takes fewer instructions than a signed one.
FLASHSPARK_DEVICE int32_t quotient(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

struct Quotient {
  int32_t quotient, remainder;
};
FLASHSPARK_DEVICE Quotient divide(int32_t n, const Divisor &d) {
  const uint32_t q = d.multiplier == 0 ? static_cast<uint32_t>(n) >> d.shift
                                       : ptx::multiply_high(static_cast<uint32_t>(n), d.multiplier) >> d.shift;
  return {static_cast<int32_t>(q), n - static_cast<int32_t>(q * d.value)};
}

struct Interval {
  int32_t begin, end;  // [begin, end); empty when begin >= end
};
FLASHSPARK_DEVICE bool is_empty(Interval x) {
  return x.begin >= x.end;
}
FLASHSPARK_DEVICE Interval uniform(Interval x) {
  return {ptx::uniform(x.begin), ptx::uniform(x.end)};
}

// Inclusive prefix sum over the warp: this lane's x and those of the lanes before it.
FLASHSPARK_DEVICE int32_t prefix_sum(int32_t x) {
  const int32_t lane = ptx::lane();
  FLASHSPARK_UNROLL
  for (uint32_t delta = 1; delta < 32; delta *= 2) {
    const int32_t other = ptx::shuffle_up(x, delta);
    if (lane >= static_cast<int32_t>(delta)) x += other;
  }
  return x;
}

}  // namespace flashspark
