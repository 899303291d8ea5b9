// Results as e4m3: divides what the forward kernel has written in 16 bits by output_scale and rounds it, for the rows
// in use and for no others. CTA x is the row tile x of a grid without Stream-K; its warps take the rows in turn.
#pragma once

#include "forward/scheduler/single_tile.cuh"

namespace flashspark {

constexpr int32_t kQuantizeWarps = 4, kQuantizeRows = 32;

FLASHSPARK_DEVICE float to_float(uint16_t bits, DType dtype) {
  return dtype == DType::bfloat16 ? ptx::to_float(ptx::Bfloat16{bits}) : ptx::to_float(ptx::Float16{bits});
}

FLASHSPARK_DEVICE void quantize(const QuantizeArguments &q) {
  const ForwardArguments &a = q.forward;
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const RowTile rows = single_tile(a, grid_coordinate(a), kQuantizeRows);
  if (!rows.valid) return;
  const float factor = q.output_scale == nullptr ? 1.0f : 1.0f / *q.output_scale;
  const int32_t warp = ptx::warp(), lane = ptx::lane();
  const int32_t end = min_of(rows.first_row + kQuantizeRows, rows.end_row);
  for (int32_t row = rows.first_row + warp; row < end; row += kQuantizeWarps) {
    const Quotient at = divide(row, a.group);
    const int64_t head = rows.head_kv * static_cast<int64_t>(a.group.value) + at.remainder;
    const auto offset = [&](const Strides &strides) {
      const int64_t batch = a.cu_seqlens_q != nullptr ? 0 : rows.seq * strides.batch;
      return batch + (rows.q_row + at.quotient) * strides.token + head * strides.head;
    };
    const auto *from = static_cast<const uint16_t *>(a.out) + offset(a.out_strides);
    auto *to = static_cast<ptx::E4m3 *>(q.out) + offset(q.out_strides);
    for (int32_t column = 2 * lane; column < a.head_dim_v; column += 64) {  // widths are even
      const uint32_t pair = ptx::convert_f32x2_to_e4m3x2(to_float(from[column], a.out_dtype) * factor,
                                                         to_float(from[column + 1], a.out_dtype) * factor);
      to[column].bits = static_cast<uint8_t>(pair);
      to[column + 1].bits = static_cast<uint8_t>(pair >> 8);
    }
  }
}

}  // namespace flashspark
