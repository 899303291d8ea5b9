// What the host tells a kernel about dropout (docs/design/dropout.md).
#pragma once

#include <cstdint>

namespace flashspark {

constexpr int32_t kDropoutRowWords = 2;  // 32-bit words that a forward kernel keeps of each row (DropoutRow)

struct DropoutArguments {
  const uint64_t *state;  // (2) on the device: seed and offset; NULL: the next two
  uint64_t seed, offset;
  uint32_t limit;  // a draw of 15 bits below it is dropped, or kept; twice, in both halves
  uint32_t flip;   // 0: dropped; all ones: kept
  float scale;     // of what is kept: 1 / (1 - p)
};

}  // namespace flashspark
