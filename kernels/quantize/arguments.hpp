// What the host hands to the quantize kernel.
#pragma once

#include "forward/arguments.hpp"

namespace flashspark {

struct QuantizeArguments {
  ForwardArguments forward;  // which rows there are: its out is where they lie in 16 bits, as out_dtype says
  void *out;                 // e4m3
  Strides out_strides;
  const float *output_scale;  // out is divided by it; NULL: 1
};

}  // namespace flashspark
