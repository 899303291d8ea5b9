// dK and dV of warps that have all keys of a CTA, and some of the columns, from registers to memory.
#pragma once

#include "backward/column_loop.cuh"
#include "backward/epilogue.cuh"

namespace flashspark {

// Rows of a gradient pass whole through shared memory, in which each warp puts its columns together.
template <class T>
FLASHSPARK_DEVICE void store_column_gradients(const ColumnLoop<T> &loop) {
  using Element = typename T::Element;
  using Layout = typename T::KeyLayout;
  constexpr int32_t kColumns = T::kGradientColumns / 8, kChunks = T::kHeadDim / 8;
  const BackwardArguments &a = loop.a;
  const KeyTile tile = find_key_tile(a, static_cast<int32_t>(ptx::cta_x()));
  const bool of_values = loop.values_summed();
  // Not what the loop knows of the lane: else that is kept through it.
  const int32_t lane = ptx::lane() ^ static_cast<int32_t>(loop.nothing(0)), part = loop.pair();
  if (a.head_parts > 1) {
    float *to = of_values ? a.dv_sum : a.dk_sum;
    if (to == nullptr) return;
    to += (static_cast<int64_t>(tile.number) * (T::kKeys / 16) * kChunks + part * kColumns) * 128 + lane * 4;
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kKeys / 16; ++m) {
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < kColumns; ++n) ptx::add_to_memory_4(to + (m * kChunks + n) * 128, loop.gradient.at[m][n]);
    }
    return;
  }
  const float scale = !of_values ? a.softmax_scale : T::kNative ? a.dropout.scale : 1.0f;
  const ptx::SharedAddress shared = loop.shared + (of_values ? T::kKeys * Layout::kPitch : 0);
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kKeys / 16; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 2; ++x) {
      const uint32_t row = Layout::offset(static_cast<uint32_t>(m * 16 + x * 8 + lane / 4), 0) + lane % 4 * 4;
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < kColumns; ++n)
        ptx::store_shared_4(
            shared + Layout::step(row, static_cast<uint32_t>(part * kColumns + n)),
            ptx::pack<Element>(loop.gradient.at[m][n][2 * x] * scale, loop.gradient.at[m][n][2 * x + 1] * scale));
    }
  }
  ptx::cta_barrier();
  auto *to = static_cast<Element *>(of_values ? a.dv : a.dk);
  if (to == nullptr) return;
  const Strides &strides = of_values ? a.dv_strides : a.dk_strides;
  const int32_t columns = of_values ? a.head_dim_v : a.head_dim;
  to += tile.batch * strides.batch + tile.row * strides.token + tile.head_kv * strides.head;
  FLASHSPARK_NO_UNROLL
  for (int32_t n = lane; n < T::kWarpKeys * kChunks; n += 32) {
    const int32_t row = part * T::kWarpKeys + n / kChunks, chunk = n % kChunks, key = tile.first + row;
    const ptx::Vector16 v = ptx::load_shared_16(
        shared + Layout::step(Layout::offset(static_cast<uint32_t>(row), 0), static_cast<uint32_t>(chunk)));
    if (key < tile.held && chunk * 8 < columns) store_8(to + key * strides.token + chunk * 8, v);
  }
}

}  // namespace flashspark
