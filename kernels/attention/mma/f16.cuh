// Operand policy: Q, K, V and out of one 16-bit type.
//
// An operand policy says how elements get from shared memory into the operands of mma_m16n8k16, and which columns of
// the result a lane then holds. A kernel asks its policy wherever formats differ; one file a format. T: the kernel's
// Traits.
#pragma once

#include "attention/arguments.hpp"
#include "attention/sequence.cuh"
#include "attention/tile_layout.cuh"

namespace flashspark {

template <class Type>
struct MmaF16 {
  using Element = Type;    // of the products
  using ElementKV = Type;  // of K and V in memory

  // Queries are copied by cp.async: their copy may start before anything else is known.
  static constexpr bool kAsyncQueries = true;

  // Factors of Q K^T and of P V: the host's alone.
  struct Scales {
    FLASHSPARK_DEVICE float qk(const AttentionArguments &a) const { return a.softmax_scale; }
    FLASHSPARK_DEVICE float v() const { return 1.0f; }
  };
  static FLASHSPARK_DEVICE Scales scales(const AttentionArguments &, const RowTile &) { return {}; }

  // Eight queries, 16 bytes, of row `row` of the tile: chunk `chunk` + `chunks`, where `chunks` is a multiple of the
  // layout's group. Zeros where they are not valid.
  template <class T>
  static FLASHSPARK_DEVICE void copy_query_chunk(const AttentionArguments &a, ptx::SharedAddress to, int32_t row,
                                                 int32_t chunk, int32_t chunks, const Element *from, bool valid) {
    ptx::cp_async_16_or_zero(to + T::QueryLayout::offset(row, chunk) + chunks * 16,
                             valid ? from + chunks * 8 : static_cast<const Element *>(a.q), valid);
  }

  // K as B by columns = rows of K: n8 tile 0, head columns 0-7 | 8-15, then n8 tile 1.
  template <class Layout>
  static FLASHSPARK_DEVICE uint32_t key_lane_offset(uint32_t lane) {
    return Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  // B of k16 step d for 16 keys: registers 0 and 1 of n8 tile 0, 2 and 3 of n8 tile 1.
  template <class Layout>
  static FLASHSPARK_DEVICE void load_k(uint32_t (&b)[4], ptx::SharedAddress keys, uint32_t lane_offset, int32_t d) {
    ptx::ldmatrix_x4(b, keys + Layout::step(lane_offset, 2 * d));
  }

  // V as B transposed: keys 0-7 | 8-15 of head columns 0-7, then of columns 8-15.
  template <class Layout>
  static FLASHSPARK_DEVICE uint32_t value_lane_offset(uint32_t lane) {
    return Layout::offset(lane % 16, lane / 16);
  }
  // B of 16 keys for two n8 tiles, columns [16 n, 16 n + 16).
  template <class Layout>
  static FLASHSPARK_DEVICE void load_v(uint32_t (&b)[4], ptx::SharedAddress values, uint32_t lane_offset, int32_t n) {
    ptx::ldmatrix_x4_trans(b, values + Layout::step(lane_offset, 2 * n));
  }

  // Of each 16 columns of the output a lane holds two pairs: the first begins at first_column(), the other
  // kPairDistance further. Row n of the lane, pair c (two of each 16 columns), element x of the pair:
  static constexpr int32_t kPairDistance = 8;
  static FLASHSPARK_DEVICE int32_t first_column(int32_t lane) { return lane % 4 * 2; }
  template <class Output>
  static FLASHSPARK_DEVICE float output_column(const Output &o, int32_t n, int32_t c, int32_t x) {
    return o.at[n / 2][c][n % 2 * 2 + x];
  }
  static FLASHSPARK_DEVICE uint32_t pack_out(const AttentionArguments &, float low, float high) {
    return ptx::pack<Element>(low, high);
  }
  // Stores a row of pairs, as the lane holds them, so that the row lies in Layout.
  template <class Layout, int32_t pairs>
  static FLASHSPARK_DEVICE void store_row(ptx::SharedAddress memory, int32_t row, const uint32_t (&words)[pairs]) {
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < pairs; ++c)
      ptx::store_shared_4(memory + Layout::step(Layout::offset(row, 0), c) + ptx::lane() % 4 * 4, words[c]);
  }
};

}  // namespace flashspark
