// dK and dV from registers to memory.
#pragma once

#include "backward/blocks.cuh"
#include "backward/products.cuh"
#include "forward/output.cuh"

namespace flashspark {

// Adds a warp's sums to those of other CTAs with the same keys.
template <class T, int32_t columns>
FLASHSPARK_DEVICE void add_gradient(float *sums, const KeyTile &tile, const KeyGradient<T, columns> &gradient) {
  if (sums == nullptr) return;
  const int32_t first_atom = (tile.number * T::kKeys + T::key_warp() * T::kWarpKeys) / 16;
  float *to = sums + static_cast<int64_t>(first_atom) * (columns / 8 * 128) + ptx::lane() * 4;
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < columns / 8; ++n)
      ptx::add_to_memory_4(to + (m * (columns / 8) + n) * 128, gradient.at[m][n]);
  }
}

// Each warp's keys pass through its own part of shared memory, so that rows are written 16 bytes at a time. Keys that
// the sequence has but does not use have a gradient of 0, as no row has seen them.
template <class T, class Layout, int32_t columns>
FLASHSPARK_DEVICE void store_gradient(void *data, const Strides &strides, const KeyTile &tile,
                                      const KeyGradient<T, columns> &gradient, float scale, int32_t head_columns,
                                      ptx::SharedAddress shared) {
  using Element = typename T::Element;
  if (data == nullptr) return;
  const int32_t lane = ptx::lane(), first = T::key_warp() * T::kWarpKeys;
  const ptx::SharedAddress own = shared + first * Layout::kPitch;
  ptx::warp_barrier();  // all lanes have read what passed here before
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 2; ++x) {
      const auto row = static_cast<uint32_t>(m * 16 + x * 8 + lane / 4);
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < columns / 8; ++n)
        ptx::store_shared_4(own + Layout::step(Layout::offset(row, 0), n) + lane % 4 * 4,
                            ptx::pack<Element>(gradient.at[m][n][2 * x] * scale, gradient.at[m][n][2 * x + 1] * scale));
    }
  }
  ptx::warp_barrier();
  auto *to = static_cast<Element *>(data) + tile.batch * strides.batch + tile.row * strides.token +
             tile.head_kv * strides.head;
  constexpr int32_t kChunks = columns / 8;
  static_assert(T::kWarpKeys * kChunks % 32 == 0);
  FLASHSPARK_NO_UNROLL
  for (int32_t n = lane; n < T::kWarpKeys * kChunks; n += 32) {
    const int32_t row = n / kChunks, chunk = n % kChunks, key = tile.first + first + row;
    const ptx::Vector16 v = ptx::load_shared_16(
        own + Layout::step(Layout::offset(static_cast<uint32_t>(row), 0), static_cast<uint32_t>(chunk)));
    if (key < tile.held && chunk * 8 < head_columns) store_8(to + key * strides.token + chunk * 8, v);
  }
}

}  // namespace flashspark
