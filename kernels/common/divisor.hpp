// Division by an invariant as a multiplication, prepared on the host.
#pragma once

#include <cstdint>

namespace flashspark {

// n / value for 0 <= n < 2^31 and 1 <= value < 2^31: (n * multiplier) >> 32 >> shift. A multiplier of 0 stands for a
// power of two, which is a shift alone. Granlund and Montgomery, "Division by invariant integers using multiplication",
// 1994.
struct Divisor {
  uint32_t value, multiplier, shift;
};

}  // namespace flashspark
