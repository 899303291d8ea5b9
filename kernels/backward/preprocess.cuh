// Before the main kernel: what each row contributes beside its scores. delta = sum of dout * out, minus the gradient of
// lse, and lse in units of log2, both in scratch memory's order of rows; parts of dsinks; 0 into the sums of dq and of
// dalibi_slopes, into drel_logits, and into rows of dq, dk and dv that belong to no sequence. One CTA a block of rows
// and query head.
#pragma once

#include "attention/softmax.cuh"
#include "backward/blocks.cuh"
#include "common/element.cuh"

namespace flashspark {

constexpr int32_t kPreprocessThreads = 128;
constexpr int32_t kRowsAtOnce = 4;  // of a thread

template <class Element>
FLASHSPARK_DEVICE float dot_8(const ptx::Vector16 &a, const ptx::Vector16 &b) {
  float sum = 0;
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 8; ++n) {
    const auto element = [n](const ptx::Vector16 &v) {
      return ptx::to_float(Element{static_cast<uint16_t>(v.word[n / 2] >> n % 2 * 16)});
    };
    sum += element(a) * element(b);
  }
  return sum;
}

// Rows of a tensor that lie before the first sequence or behind the last one become 0; CTAs take them in turn.
template <class Element>
FLASHSPARK_DEVICE void zero_unowned_rows(void *data, const Strides &strides, const int32_t *offsets, int32_t num_seqs,
                                         int32_t rows, int32_t heads, int32_t columns, int32_t num_ctas) {
  if (data == nullptr || offsets == nullptr) return;
  const int32_t begin = clamp(offsets[0], 0, rows), end = clamp(offsets[num_seqs], begin, rows);
  for (auto n = static_cast<int32_t>(ptx::cta_x()); n < begin + rows - end; n += num_ctas) {
    const int64_t row = n < begin ? n : n - begin + end;
    for (auto at = static_cast<int32_t>(ptx::thread_index()); at < heads * columns; at += kPreprocessThreads) {
      const int32_t head = quotient(at, columns);
      auto *to = static_cast<Element *>(data) + row * strides.token + head * strides.head;
      to[at - head * columns].bits = 0;
    }
  }
}

FLASHSPARK_DEVICE void zero_sums(float *sums, int64_t count, int32_t cta, int32_t num_ctas) {
  ptx::Vector16 zero;
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 4; ++n) zero.word[n] = 0;
  const int64_t step = int64_t{num_ctas} * kPreprocessThreads;
  FLASHSPARK_NO_UNROLL
  for (int64_t n = int64_t{cta} * kPreprocessThreads + ptx::thread_index(); n < count / 4; n += step)
    reinterpret_cast<ptx::Vector16 *>(sums)[n] = zero;
}

// What the main kernel writes some elements of. A CTA takes rows of its own head.
FLASHSPARK_DEVICE void zero_sparse(const BackwardArguments &a, int32_t heads, int32_t num_ctas) {
  const auto cta = static_cast<int32_t>(ptx::cta_x()), thread = static_cast<int32_t>(ptx::thread_index());
  if (a.drel_logits != nullptr) {
    const int32_t head = quotient(cta, a.num_row_blocks);
    const int64_t rows = a.cu_seqlens_q != nullptr ? a.total_q : static_cast<int64_t>(a.num_seqs) * a.max_seqlen_q;
    float *const of_head = a.drel_logits + head * a.rel_head_stride;
    FLASHSPARK_NO_UNROLL
    for (int64_t row = cta - head * a.num_row_blocks; row < rows; row += a.num_row_blocks) {
      float *const to = of_head + row * a.rel_token_stride;
      FLASHSPARK_NO_UNROLL
      for (int32_t n = thread; n < a.rel_extent; n += kPreprocessThreads) to[n] = 0;
    }
  }
  if (a.slope_sums != nullptr)
    zero_sums(a.slope_sums, static_cast<int64_t>(heads) * a.key_slots * a.slot_warps, cta, num_ctas);
}

template <class Element>
FLASHSPARK_DEVICE void zero_outputs(const BackwardArguments &a, int32_t ctas) {
  const int32_t heads = a.num_heads_kv * static_cast<int32_t>(a.group.value);
  zero_sparse(a, heads, ctas);
  const int32_t *q = a.cu_seqlens_q, *k = a.cu_seqlens_k;
  zero_unowned_rows<Element>(a.dq, a.dq_strides, q, a.num_seqs, a.total_q, heads, a.head_dim, ctas);
  zero_unowned_rows<Element>(a.dk, a.dk_strides, k, a.num_seqs, a.key_rows, a.num_heads_kv, a.head_dim, ctas);
  zero_unowned_rows<Element>(a.dv, a.dv_strides, k, a.num_seqs, a.key_rows, a.num_heads_kv, a.head_dim_v, ctas);
}

// The sums of a block of rows, its turns, and a CTA's part of what CTAs with pieces count and of the sums of keys.
FLASHSPARK_DEVICE void zero_all_sums(const BackwardArguments &a, int64_t first_row, int32_t num_ctas) {
  const auto cta = static_cast<int32_t>(ptx::cta_x()), thread = static_cast<int32_t>(ptx::thread_index());
  const int64_t of_block = int64_t{a.row_block} * a.sum_columns;
  const bool zeroed = a.num_walks == 0;  // the first CTA of a turn of a walk stores
  if (a.dq_sum != nullptr && zeroed) zero_sums(a.dq_sum + first_row * a.sum_columns, of_block, 0, 1);
  if (a.dq_sum_rows != 0 && zeroed) zero_sums(a.dq_sum + (a.dq_sum_rows + first_row) * a.sum_columns, of_block, 0, 1);
  if (a.dq_turns != nullptr && thread == 0) a.dq_turns[cta] = 0;
  if (a.dq_sum_rows != 0 && thread == 0) a.dq_turns[num_ctas + cta] = 0;
  if (a.added_blocks != nullptr && thread == 0) {
    const int32_t all = a.num_seqs * a.num_heads_kv * static_cast<int32_t>(a.group.value);
    for (int32_t n = cta; n < all; n += num_ctas) a.added_blocks[n] = 0;
  }
  if (a.piece_flags != nullptr && thread < a.slot_warps) {
    for (int32_t n = cta; n < a.num_slots; n += num_ctas) a.piece_flags[n * a.slot_warps + thread] = 0;
  }
  const int64_t keys =
      int64_t{a.num_key_tiles} * a.key_tile * a.num_heads_kv * (a.cu_seqlens_k == nullptr ? a.num_seqs : 1);
  if (a.dk_sum != nullptr) zero_sums(a.dk_sum, keys * a.sum_columns, cta, num_ctas);
  if (a.dv_sum != nullptr) zero_sums(a.dv_sum, keys * a.sum_columns_v, cta, num_ctas);
}

// What a thread loads of kRowsAtOnce rows, before it uses any of it.
template <class Element>
struct LoadedRows {
  ptx::Vector16 out[kRowsAtOnce], dout[kRowsAtOnce];
  float lse[kRowsAtOnce], dlse[kRowsAtOnce];
};

template <class Element>
FLASHSPARK_DEVICE void preprocess(const BackwardArguments &a) {
  const auto cta = static_cast<int32_t>(ptx::cta_x()), thread = static_cast<int32_t>(ptx::thread_index());
  const int32_t head = quotient(cta, a.num_row_blocks), index = cta - head * a.num_row_blocks;
  const int64_t padded = static_cast<int64_t>(head) * a.padded_rows + index * a.row_block;
  // What is not in memory is found while the kernel before ends.
  ptx::warm_constant_cache(a);
  const bool reads_lengths = a.cu_seqlens_q != nullptr || a.seqused_q != nullptr;
  RowBlock block{};
  if (!reads_lengths) block = find_row_block(a, index);
  ptx::grid_dependency_wait();  // in every CTA, see wait_for_previous_kernel()
  ptx::grid_dependency_launch();
  if (reads_lengths) block = find_row_block(a, index);
  const bool has_sink = a.sink_sums != nullptr;
  const float sink = has_sink ? load_as_float(a.sinks, head, a.sinks_dtype) * kLog2E : 0.0f;
  const int64_t batch_out = a.cu_seqlens_q != nullptr ? 0 : block.seq * a.out_strides.batch,
                batch_dout = a.cu_seqlens_q != nullptr ? 0 : block.seq * a.dout_strides.batch,
                batch_lse = a.cu_seqlens_q != nullptr ? 0 : block.seq * a.lse_strides.batch;
  // A row is of as many threads as it has chunks of 16 bytes, up to a power of two.
  const int32_t chunks = a.head_dim_v / 8, log2_lanes = chunks <= 8 ? 3 : chunks <= 16 ? 4 : 5, lanes = 1 << log2_lanes;
  const int32_t row_of_pass = thread >> log2_lanes, chunk = thread & (lanes - 1);
  const int32_t pass_rows = kPreprocessThreads >> log2_lanes;
  const int32_t ctas = a.num_row_blocks * a.num_heads_kv * static_cast<int32_t>(a.group.value);
  const auto *out = static_cast<const Element *>(a.out) + batch_out + head * a.out_strides.head + chunk * 8;
  const auto *dout = static_cast<const Element *>(a.dout) + batch_dout + head * a.dout_strides.head + chunk * 8;
  const int64_t lse_at = batch_lse + head * a.lse_strides.head;
  float dsink = 0;
  FLASHSPARK_NO_UNROLL
  for (int32_t base = 0; base < a.row_block; base += kRowsAtOnce * pass_rows) {
    LoadedRows<Element> loaded{};
    FLASHSPARK_UNROLL
    for (int32_t i = 0; i < kRowsAtOnce; ++i) {
      const int32_t n = base + i * pass_rows + row_of_pass, token = block.first + n;
      loaded.lse[i] = minus_infinity();
      if (!block.valid || n >= a.row_block || token >= block.tokens) continue;
      const int64_t row = block.row + token;
      if (chunk < chunks) {
        loaded.out[i] = *reinterpret_cast<const ptx::Vector16 *>(out + row * a.out_strides.token);
        loaded.dout[i] = *reinterpret_cast<const ptx::Vector16 *>(dout + row * a.dout_strides.token);
      }
      loaded.lse[i] = a.lse[lse_at + row * a.lse_strides.token];
      if (a.dlse != nullptr) loaded.dlse[i] = a.dlse[lse_at + row * a.lse_strides.token];
    }
    if (base == 0) zero_all_sums(a, padded, ctas);  // while the loads are under way
    float sum[kRowsAtOnce];
    FLASHSPARK_UNROLL
    for (int32_t i = 0; i < kRowsAtOnce; ++i) sum[i] = dot_8<Element>(loaded.out[i], loaded.dout[i]);
    FLASHSPARK_UNROLL
    for (int32_t step = 16; step > 0; step /= 2) {
      if (step >= lanes) continue;
      FLASHSPARK_UNROLL
      for (float &x : sum) x += ptx::shuffle_xor(x, static_cast<uint32_t>(step));
    }
    FLASHSPARK_UNROLL
    for (int32_t i = 0; i < kRowsAtOnce; ++i) {
      const int32_t n = base + i * pass_rows + row_of_pass;
      if (chunk != 0 || n >= a.row_block) continue;
      float lse = -minus_infinity(), delta = 0;
      if (loaded.lse[i] != minus_infinity()) {  // else the row kept no key, or does not exist
        lse = loaded.lse[i] * kLog2E;
        delta = sum[i] - loaded.dlse[i];
        if (has_sink) dsink -= ptx::exp2_approx(sink - lse) * delta;
      }
      a.row_lse[padded + n] = lse + a.lse_shift;
      a.row_delta[padded + n] = delta * a.delta_scale;
    }
  }
  // Nobody waits for what follows.
  zero_outputs<Element>(a, ctas);
  if (!has_sink) return;
  ptx::warp_barrier();
  FLASHSPARK_UNROLL
  for (uint32_t lanes_left = 16; lanes_left > 0; lanes_left /= 2) dsink += ptx::shuffle_xor(dsink, lanes_left);
  if (ptx::lane() == 0) a.sink_sums[cta * (kPreprocessThreads / 32) + ptx::warp()] = dsink;
}

}  // namespace flashspark
