// Operand policy: K and V in e4m3, converted to fp16 between ldmatrix and mma (docs/design/fp8-kv.md).
//
// ldmatrix moves pairs of e4m3 numbers as if they were 16-bit ones, so that lanes receive other columns than the
// products expect. Nothing is permuted in the loop: queries are stored in K's order once a tile, and the columns of the
// output leave in V's order. See f16.cuh for what the members mean.
#pragma once

#include "attention/mma/f16.cuh"

namespace flashspark {

// Eight queries of any type as fp16. A bf16 number beyond fp16's range becomes fp16's largest: the softmax of such
// scores is as sharp either way.
FLASHSPARK_DEVICE ptx::Vector16 load_queries_as_f16(const void *q, int64_t offset, DType dtype) {
  ptx::Vector16 y;
  if (dtype == DType::e4m3) {
    const auto *words = reinterpret_cast<const uint32_t *>(static_cast<const ptx::E4m3 *>(q) + offset);
    FLASHSPARK_UNROLL
    for (int32_t i = 0; i < 2; ++i) ptx::convert_e4m3x4_to_f16x4(y.word[2 * i], y.word[2 * i + 1], words[i]);
    return y;
  }
  y = *reinterpret_cast<const ptx::Vector16 *>(static_cast<const ptx::Float16 *>(q) + offset);
  if (dtype == DType::float16) return y;
  const auto bf16 = [](uint32_t bits) { return ptx::to_float(ptx::Bfloat16{static_cast<uint16_t>(bits)}); };
  FLASHSPARK_UNROLL
  for (int32_t i = 0; i < 4; ++i) y.word[i] = ptx::pack_finite(bf16(y.word[i]), bf16(y.word[i] >> 16));
  return y;
}

struct MmaE4m3Dequant {
  using Element = ptx::Float16;
  using ElementKV = ptx::E4m3;

  // Queries pass through registers, on their way to fp16.
  static constexpr bool kAsyncQueries = false;

  struct Scales {
    float qk_scale, v_scale;
    FLASHSPARK_DEVICE float qk(const AttentionArguments &) const { return qk_scale; }
    FLASHSPARK_DEVICE float v() const { return v_scale; }
  };
  // Masked scores are -inf, and 0 * -inf would be NaN; with 1e-30 every other score still is 0 to the last bit of the
  // result.
  static FLASHSPARK_DEVICE Scales scales(const AttentionArguments &a, const RowTile &row_tile) {
    const float qk = a.softmax_scale * scale_of(a.q_descale, row_tile) * scale_of(a.k_descale, row_tile);
    return {__builtin_fmaxf(qk, 1e-30f), scale_of(a.v_descale, row_tile)};
  }

  // In the order in which load_k() delivers K: of 16 columns those at 4 j and 4 j + 1 go to 2 j and 2 j + 1, those at
  // 4 j + 2 and 4 j + 3 eight further.
  template <class T>
  static FLASHSPARK_DEVICE void copy_query_chunk(const AttentionArguments &a, ptx::SharedAddress to, int32_t row,
                                                 int32_t chunk, int32_t chunks, const Element *from, bool valid) {
    ptx::Vector16 octet{};
    if (valid) octet = load_queries_as_f16(a.q, from - static_cast<const Element *>(a.q) + chunks * 8, a.q_dtype);
    const ptx::SharedAddress half = to + chunks * 16 + chunk % 2 * 8;
    ptx::store_shared_8(half + T::QueryLayout::offset(row, chunk / 2 * 2), octet.word[0], octet.word[2]);
    ptx::store_shared_8(half + T::QueryLayout::offset(row, chunk / 2 * 2 + 1), octet.word[1], octet.word[3]);
  }

  // A chunk of K holds 16 columns, and a lane receives four neighbours: two for each half of a k16 step.
  template <class Layout>
  static FLASHSPARK_DEVICE uint32_t key_lane_offset(uint32_t lane) {
    return Layout::offset(lane % 16, 0);
  }
  template <class Layout>
  static FLASHSPARK_DEVICE void load_k(uint32_t (&b)[4], ptx::SharedAddress keys, uint32_t lane_offset, int32_t d) {
    uint32_t four[2];
    ptx::ldmatrix_x2(four, keys + Layout::step(lane_offset, d));
    ptx::convert_e4m3x4_to_f16x4(b[0], b[1], four[0]);
    ptx::convert_e4m3x4_to_f16x4(b[2], b[3], four[1]);
  }

  // A lane receives two neighbouring columns of each of two keys: the even ones of 16 columns make one n8 tile, the odd
  // ones the next.
  template <class Layout>
  static FLASHSPARK_DEVICE uint32_t value_lane_offset(uint32_t lane) {
    return Layout::offset(lane % 16, 0);
  }
  template <class Layout>
  static FLASHSPARK_DEVICE void load_v(uint32_t (&b)[4], ptx::SharedAddress values, uint32_t lane_offset, int32_t n) {
    uint32_t four[2];
    ptx::ldmatrix_x2_trans(four, values + Layout::step(lane_offset, n));
    // The bytes of two keys in the even column, then those in the odd column behind it.
    ptx::convert_e4m3x4_to_f16x4(b[0], b[2], ptx::permute_bytes(four[0], 0x3120));
    ptx::convert_e4m3x4_to_f16x4(b[1], b[3], ptx::permute_bytes(four[1], 0x3120));
  }

  // Four neighbouring columns from 4 (lane % 4) on.
  static constexpr int32_t kPairDistance = 2;
  static FLASHSPARK_DEVICE int32_t first_column(int32_t lane) { return lane % 4 * 4; }
  template <class Output>
  static FLASHSPARK_DEVICE float output_column(const Output &o, int32_t n, int32_t c, int32_t x) {
    return o.at[n / 2][c / 2 * 2 + x][n % 2 * 2 + c % 2];
  }
  static FLASHSPARK_DEVICE uint32_t pack_out(const AttentionArguments &a, float low, float high) {
    return a.out_dtype == DType::bfloat16 ? ptx::pack<ptx::Bfloat16>(low, high) : ptx::pack<Element>(low, high);
  }
  // Eight bytes a lane. Rows that would meet in the banks of pair c store another pair of chunks first.
  template <class Layout, int32_t pairs>
  static FLASHSPARK_DEVICE void store_row(ptx::SharedAddress memory, int32_t row, const uint32_t (&words)[pairs]) {
    constexpr int32_t kOther = Layout::kGroup == 8 ? 4 : 2;
    const bool other = (Layout::kGroup == 8 ? row : row / 2) % 2 != 0;
    const int32_t lane = ptx::lane();
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < pairs; c += 2) {
      ptx::store_shared_8(
          memory + Layout::step(Layout::offset(row, lane % 4 / 2), other ? c ^ kOther : c) + lane % 2 * 8,
          other ? words[c ^ kOther] : words[c], other ? words[(c ^ kOther) + 1] : words[c + 1]);
    }
  }
};

}  // namespace flashspark
