// The vector instructions that this CPU has and whose registers its system saves.
#pragma once

namespace flashspark::cpu {

struct Features {
  bool avx2 = false;         // with FMA, BMI2 and F16C
  bool avx512 = false;       // F, VL, DQ, BW and CD, and all of the above
  bool avx512_bf16 = false;  // and products of bfloat16
};

// All false but on x86-64.
Features features();

}  // namespace flashspark::cpu
