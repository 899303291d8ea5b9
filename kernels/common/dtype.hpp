// Element types known at run time.
#pragma once

#include <cstdint>

namespace flashspark {

enum class DType : int32_t { float32, float16, bfloat16, e4m3 };

}  // namespace flashspark
