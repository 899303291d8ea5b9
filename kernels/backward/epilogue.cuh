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
  constexpr int32_t kChunks = columns / 8, kAll = T::kWarpKeys * kChunks, kAtOnce = kAll % 128 == 0 ? 4 : 2;
  static_assert(kAll % (32 * kAtOnce) == 0);
  FLASHSPARK_NO_UNROLL
  for (int32_t n = lane; n < kAll; n += 32 * kAtOnce) {
    ptx::Vector16 v[kAtOnce];
    FLASHSPARK_UNROLL
    for (int32_t i = 0; i < kAtOnce; ++i) {
      const auto row = static_cast<uint32_t>((n + 32 * i) / kChunks),
                 chunk = static_cast<uint32_t>((n + 32 * i) % kChunks);
      v[i] = ptx::load_shared_16(own + Layout::step(Layout::offset(row, 0), chunk));
    }
    FLASHSPARK_UNROLL
    for (int32_t i = 0; i < kAtOnce; ++i) {
      const int32_t key = tile.first + first + (n + 32 * i) / kChunks, chunk = (n + 32 * i) % kChunks;
      if (key < tile.held && chunk * 8 < head_columns) store_8(to + key * strides.token + chunk * 8, v[i]);
    }
  }
}

// Of a pair both sums lie in dk.
template <class T>
FLASHSPARK_DEVICE void store_gradients(const BackwardArguments &a, const KeyTile &tile,
                                       const KeyGradient<T, T::kHeadDim> &dk, const KeyGradient<T, T::kHeadDimV> &dv,
                                       ptx::SharedAddress shared) {
  const bool of_values = T::kPaired && T::sums_values();
  if (a.head_parts > 1) {
    if (T::kPaired) {
      add_gradient<T, T::kHeadDim>(of_values ? a.dv_sum : a.dk_sum, tile, dk);
    } else {
      add_gradient<T, T::kHeadDim>(a.dk_sum, tile, dk);
      add_gradient<T, T::kHeadDimV>(a.dv_sum, tile, dv);
    }
    return;
  }
  const float value_scale = T::kNative ? a.dropout.scale : 1.0f;
  if constexpr (T::kPaired) {
    store_gradient<T, typename T::KeyLayout>(of_values ? a.dv : a.dk, of_values ? a.dv_strides : a.dk_strides, tile, dk,
                                             of_values ? value_scale : a.softmax_scale,
                                             of_values ? a.head_dim_v : a.head_dim,
                                             shared + (of_values ? T::kKeys * T::KeyLayout::kPitch : 0));
  } else {
    store_gradient<T, typename T::KeyLayout>(a.dk, a.dk_strides, tile, dk, a.softmax_scale, a.head_dim, shared);
    store_gradient<T, typename T::ValueLayout>(a.dv, a.dv_strides, tile, dv, value_scale, a.head_dim_v, shared);
  }
}

template <class T>
FLASHSPARK_DEVICE void store_gradients(const BackwardArguments &a, const KeyGradient<T, T::kHeadDim> &dk,
                                       const KeyGradient<T, T::kHeadDimV> &dv, ptx::SharedAddress shared) {
  // Found again, instead of being kept through the loop.
  store_gradients<T>(a, find_key_tile(a, static_cast<int32_t>(ptx::cta_x())), dk, dv, shared);
}

}  // namespace flashspark
