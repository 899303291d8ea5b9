// Element types known at run time.
#pragma once

#include <cstdint>

namespace flashspark {

enum class DType : int32_t { float32, float16, bfloat16, e4m3 };

constexpr int32_t bytes_of(DType dtype) {
  return dtype == DType::float32 ? 4 : (dtype == DType::e4m3 ? 1 : 2);
}

}  // namespace flashspark
