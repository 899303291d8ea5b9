// Loads and stores of single elements whose type is known at run time.
#pragma once

#include "common/dtype.hpp"
#include "ptx/ptx.cuh"

namespace flashspark {

FLASHSPARK_DEVICE int32_t bytes_of(DType dtype) {
  return dtype == DType::float32 ? 4 : (dtype == DType::e4m3 ? 1 : 2);
}

// Element n as a float, exactly. Not for e4m3.
FLASHSPARK_DEVICE float load_as_float(const void *from, int64_t n, DType dtype) {
  if (dtype == DType::float32) return static_cast<const float *>(from)[n];
  if (dtype == DType::float16) return ptx::to_float(static_cast<const ptx::Float16 *>(from)[n]);
  return ptx::to_float(static_cast<const ptx::Bfloat16 *>(from)[n]);
}

// x as element n, rounded to nearest even; beyond e4m3's 448: 448.
FLASHSPARK_DEVICE void store_from_float(void *to, int64_t n, DType dtype, float x) {
  switch (dtype) {
    case DType::float32:
      static_cast<float *>(to)[n] = x;
      break;
    case DType::float16:
      static_cast<ptx::Float16 *>(to)[n].bits = static_cast<uint16_t>(ptx::pack<ptx::Float16>(x, 0));
      break;
    case DType::bfloat16:
      static_cast<ptx::Bfloat16 *>(to)[n].bits = static_cast<uint16_t>(ptx::pack<ptx::Bfloat16>(x, 0));
      break;
    case DType::e4m3:
      static_cast<ptx::E4m3 *>(to)[n].bits = static_cast<uint8_t>(ptx::convert_f32x2_to_e4m3x2(x, 0));
      break;
  }
}

}  // namespace flashspark
