// Which probabilities dropout drops, as docs/design/dropout.md defines it. The kernels compute the same in their own
// way (kernels/attention/dropout.cuh).
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

#include "problem.hpp"

namespace flashspark {

using PhiloxCounter = std::array<uint32_t, 4>;

struct PhiloxKey {
  uint32_t low, high;
};

// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
constexpr PhiloxCounter philox(PhiloxKey key, PhiloxCounter c) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * c[0], second = uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<uint32_t>(second >> 32) ^ c[1] ^ key.low, static_cast<uint32_t>(second),
         static_cast<uint32_t>(first >> 32) ^ c[3] ^ key.high, static_cast<uint32_t>(first)};
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return c;
}

// The key of all draws of a call.
constexpr PhiloxKey dropout_key(uint64_t seed, uint64_t offset) {
  const PhiloxCounter drawn = philox({static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                                     {static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), 0, 0});
  return {drawn[0], drawn[1]};
}

constexpr int kDropoutBits = 15;  // of a draw

// Draws below `limit` are what is dropped, or what is kept: whichever is less.
struct DropoutLimit {
  uint32_t limit;
  bool keeps;
};
inline DropoutLimit dropout_limit(float p) {
  constexpr long kDraws = 1L << kDropoutBits;
  const long dropped = std::min(std::lround(static_cast<double>(p) * kDraws), kDraws - 1);
  const bool keeps = dropped > kDraws / 2;
  return {static_cast<uint32_t>(keeps ? kDraws - dropped : dropped), keeps};
}

inline float dropout_scale(float p) {
  return static_cast<float>(1 / (1 - double{p}));
}

struct Dropout {
  DropoutLimit limit;
  float scale;  // of what is kept: 1 / (1 - p)
  PhiloxKey key;

  constexpr bool any() const { return limit.limit > 0; }

  // Whether query token i of sequence b and head h loses key j, left padding included.
  constexpr bool drops(int64_t b, int64_t h, int64_t i, int64_t j) const {
    // One call of Philox is for sixteen keys: 2n, 2n + 1, and the same in each of the next seven groups of eight.
    const auto number = static_cast<uint32_t>(j / 64 * 4 + j % 8 / 2);
    const PhiloxCounter drawn =
        philox(key, {number, static_cast<uint32_t>(i), static_cast<uint32_t>(h), static_cast<uint32_t>(b)});
    const uint32_t word = drawn[static_cast<size_t>(j % 64 / 16)];
    const uint32_t draw = std::rotr(word, static_cast<int>(j % 2 * 16 + j % 16 / 8 * 8)) & ((1u << kDropoutBits) - 1);
    return (draw < limit.limit) != limit.keeps;
  }
};

// Of a problem of the CPU, whose memory can be read.
inline Dropout dropout_of(const Params &p) {
  if (!(p.dropout_p > 0)) return {{0, false}, 1.0f, {0, 0}};
  const uint64_t seed = p.dropout_state != nullptr ? p.dropout_state[0] : p.dropout_seed;
  const uint64_t offset = p.dropout_state != nullptr ? p.dropout_state[1] : p.dropout_offset;
  return {dropout_limit(p.dropout_p), dropout_scale(p.dropout_p), dropout_key(seed, offset)};
}

}  // namespace flashspark
