// Sums of float32 numbers that are exact, so that the order of additions does not matter: with `deterministic`, the
// gradients of captured tensors. Additions of integers have no order, and every finite number is a whole number of
// 2^-149, of 277 bits. Word n of a sum counts 2^(28 n) of that, as a signed number of 64 bits: a number is added to one
// word or two, by less than 2^28 each, so that up to 2^35 numbers do not overflow.
//
// Infinity and NaN go to a float32 of their own, where they give the same in any order.
#pragma once

#include "backward/function_arguments.hpp"
#include "ptx/exact_sums.cuh"

namespace flashspark {

constexpr uint32_t kExactWordBits = 28, kMantissaBits = 23, kInfiniteExponent = 255;
static_assert(kExactWords * kExactWordBits >= kInfiniteExponent - 1 + kMantissaBits);

// x = (low + high 2^28) 2^(28 word - 149), for a finite x. Both have its sign.
struct ExactParts {
  uint32_t word;
  int64_t low, high;
};
FLASHSPARK_DEVICE ExactParts exact_parts(float x) {
  const uint32_t bits = ptx::as_word(x), exponent = bits >> kMantissaBits & 255;
  const uint32_t fraction = bits & ((1u << kMantissaBits) - 1);
  const uint32_t mantissa = exponent > 0 ? fraction | 1u << kMantissaBits : fraction;
  const uint32_t place = exponent > 0 ? exponent - 1 : 0, word = place / kExactWordBits;
  const uint64_t wide = static_cast<uint64_t>(mantissa) << (place - word * kExactWordBits);
  const auto low = static_cast<int64_t>(wide & ((1u << kExactWordBits) - 1)),
             high = static_cast<int64_t>(wide >> kExactWordBits);
  const bool negative = bits >> 31 != 0;
  return {word, negative ? -low : low, negative ? -high : high};
}

// `to`: where an element of the sums' row would lie. What is not of the row is not added.
FLASHSPARK_DEVICE void add_exactly(const ExactSums &sums, float *to, float x) {
  const uint64_t element = (reinterpret_cast<uint64_t>(to) - reinterpret_cast<uint64_t>(sums.special)) / sizeof(float);
  if (element >= static_cast<uint64_t>(sums.count)) return;
  if ((ptx::as_word(x) >> kMantissaBits & 255) == kInfiniteExponent) {
    ptx::add_to_memory(to, x);
    return;
  }
  const ExactParts parts = exact_parts(x);
  uint64_t *const at = sums.words + static_cast<int64_t>(parts.word) * sums.count + element;
  if (parts.low != 0) ptx::add_to_memory(at, static_cast<uint64_t>(parts.low));
  if (parts.high != 0) ptx::add_to_memory(at + sums.count, static_cast<uint64_t>(parts.high));
}

// The float32 number next to a sum, to nearest, ties to even.
FLASHSPARK_DEVICE float rounded(const uint64_t (&words)[kExactWords]) {
  constexpr uint32_t kAll = (1u << kExactWordBits) - 1;
  uint32_t digits[kExactWords];
  int64_t carry = 0;
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < kExactWords; ++n) {
    const int64_t word = static_cast<int64_t>(words[n]) + carry;
    digits[n] = static_cast<uint32_t>(word) & kAll;
    carry = word >> kExactWordBits;
  }
  const bool negative = carry < 0;  // the sum is carry 2^280 + what digits say, all of which are >= 0
  uint32_t borrowed = 1;
  FLASHSPARK_UNROLL
  for (int32_t n = 0; negative && n < kExactWords; ++n) {
    const uint32_t digit = (digits[n] ^ kAll) + borrowed;
    digits[n] = digit & kAll;
    borrowed = digit >> kExactWordBits;
  }
  if (negative) carry = ~carry + borrowed;
  // The first digit that is not 0 and the one behind it, which are 29 bits or more, and whether there is more.
  uint64_t first = 0, more = 0;
  int32_t place = -1;
  FLASHSPARK_UNROLL
  for (int32_t n = kExactWords - 1; n > 0; --n) {
    if (place >= 0) {
      more |= n < place ? digits[n] : 0;
    } else if (digits[n] != 0) {
      first = static_cast<uint64_t>(digits[n]) << kExactWordBits | digits[n - 1];
      place = n - 1;
    }
  }
  if (place > 0) more |= digits[0];
  if (place < 0) first = digits[0], place = 0;
  const uint32_t sign = negative ? 1u << 31 : 0;
  if (carry == 0 && place == 0 && first < 1u << kMantissaBits)
    return ptx::as_float(sign | static_cast<uint32_t>(first));
  const auto value = static_cast<float>(first | (more != 0 ? 1 : 0));
  const uint32_t bits = ptx::as_word(value) + ((place * kExactWordBits - 149u) << kMantissaBits);
  const bool infinite = carry != 0 || bits >= kInfiniteExponent << kMantissaBits;
  return ptx::as_float(sign | (infinite ? kInfiniteExponent << kMantissaBits : bits));
}

}  // namespace flashspark
