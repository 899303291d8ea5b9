// Behind the main kernel: gradients from their float32 sums, scaled, in their own type and order. One CTA a block of
// rows and query head for dq; then, where several CTAs have summed a tile of keys, one a tile for dk and dv.
#pragma once

#include "attention/mask.cuh"
#include "backward/blocks.cuh"
#include "forward/output.cuh"

namespace flashspark {

constexpr int32_t kPostprocessThreads = 128;

// Rows of a gradient and their sums, which lie as mma_m16n8k16 leaves them: for each 16 rows and each 8 columns the
// four numbers of every lane.
struct SummedRows {
  const float *sums;
  int32_t sum_columns;
  void *to;  // the first row
  int64_t token_stride;
  int32_t rows, columns, end;  // of the sums; rows from `end` on do not exist
  int32_t in_use;              // rows from here on are 0
  float scale;
};

// Eight columns of two rows, 8 apart, which four lanes of the main kernel have summed.
struct SummedPair {
  ptx::Vector16 lane[4];
};
template <class Element>
FLASHSPARK_DEVICE void store_pair(const SummedRows &r, const SummedPair &pair, int32_t first_row, int32_t chunk) {
  FLASHSPARK_UNROLL
  for (int32_t half = 0; half < 2; ++half) {
    const int32_t at = first_row + half * 8;
    if (at >= r.end) continue;
    ptx::Vector16 out;
    FLASHSPARK_UNROLL
    for (int32_t lane = 0; lane < 4; ++lane) {
      const uint32_t packed = ptx::pack<Element>(ptx::as_float(pair.lane[lane].word[2 * half]) * r.scale,
                                                 ptx::as_float(pair.lane[lane].word[2 * half + 1]) * r.scale);
      out.word[lane] = at < r.in_use ? packed : 0;
    }
    store_8(static_cast<Element *>(r.to) + at * r.token_stride + chunk * 8, out);
  }
}

FLASHSPARK_DEVICE void add_pair(SummedPair &sum, const ptx::Vector16 *from) {
  FLASHSPARK_UNROLL
  for (int32_t lane = 0; lane < 4; ++lane) {
    const ptx::Vector16 other = from[lane];
    FLASHSPARK_UNROLL
    for (int32_t e = 0; e < 4; ++e)
      sum.lane[lane].word[e] = ptx::as_word(ptx::as_float(sum.lane[lane].word[e]) + ptx::as_float(other.word[e]));
  }
}

// Every `parts`th 16 rows, from number `part` on. A thread takes kPairsAtOnce pairs of rows, and loads all of them
// before it stores one. With two sums the other one lies `second` numbers behind, and is added to the first.
template <class Element, bool two_sums = false>
FLASHSPARK_DEVICE void store_rows(const SummedRows &r, int32_t part, int32_t parts, int64_t second = 0) {
  constexpr int32_t kPairsAtOnce = two_sums ? 1 : 2;
  // A pair of rows is of as many threads as it has chunks, up to a power of two.
  const int32_t chunks = r.columns / 8, all_chunks = r.sum_columns / 8;
  const int32_t log2_lanes = chunks <= 8 ? 3 : chunks <= 16 ? 4 : 5, pass_pairs = kPostprocessThreads >> log2_lanes;
  const auto thread = static_cast<int32_t>(ptx::thread_index());
  const int32_t chunk = thread & ((1 << log2_lanes) - 1), atoms = r.rows / 16;
  if (chunk >= chunks) return;
  FLASHSPARK_NO_UNROLL
  for (int32_t first = thread >> log2_lanes; part + first / 8 * parts < atoms; first += kPairsAtOnce * pass_pairs) {
    SummedPair pairs[kPairsAtOnce];
    int32_t rows[kPairsAtOnce];
    FLASHSPARK_UNROLL
    for (int32_t i = 0; i < kPairsAtOnce; ++i) {
      const int32_t pair = first + i * pass_pairs, atom = part + pair / 8 * parts;
      rows[i] = atom * 16 + pair % 8;
      if (atom >= atoms) break;
      const auto *from =
          reinterpret_cast<const ptx::Vector16 *>(r.sums) + ((atom * all_chunks + chunk) * 32 + pair % 8 * 4);
      FLASHSPARK_UNROLL
      for (int32_t lane = 0; lane < 4; ++lane) pairs[i].lane[lane] = from[lane];
      if constexpr (two_sums) add_pair(pairs[i], from + second / 4);
    }
    FLASHSPARK_UNROLL
    for (int32_t i = 0; i < kPairsAtOnce; ++i) {
      if (rows[i] < r.rows) store_pair<Element>(r, pairs[i], rows[i], chunk);
    }
  }
}

// The sums of all heads are complete when the kernel before has ended, which is later than those of one.
FLASHSPARK_DEVICE void wait_for_sums(const BackwardArguments &a, const RowBlock &block, int32_t head) {
  if (a.added_blocks == nullptr) {
    ptx::grid_dependency_wait();  // in every CTA, see wait_for_previous_kernel()
    ptx::grid_dependency_launch();
    return;
  }
  const int32_t heads = a.num_heads_kv * static_cast<int32_t>(a.group.value);
  if (block.valid && ptx::thread_index() == 0)
    ptx::wait_until_at_least(a.added_blocks + block.seq * heads + head, a.head_blocks);
  ptx::cta_barrier();
}

template <class Element>
FLASHSPARK_DEVICE void store_dq(const BackwardArguments &a, int32_t cta) {
  const Quotient at = split(cta, a.num_row_blocks);
  const int32_t head = at.quotient;
  // Lengths are not of the kernel before, which has waited itself for those that wrote them.
  const RowBlock block = find_row_block(a, at.remainder);
  const int64_t batch = a.cu_seqlens_q != nullptr ? 0 : block.seq * a.dq_strides.batch;
  auto *dq =
      static_cast<Element *>(a.dq) + batch + head * a.dq_strides.head + (block.row + block.first) * a.dq_strides.token;
  const int64_t padded = static_cast<int64_t>(head) * a.padded_rows + at.remainder * a.row_block;
  wait_for_sums(a, block, head);
  if (!block.valid) return;
  const SummedRows rows{a.dq_sum + padded * a.sum_columns,
                        a.sum_columns,
                        dq,
                        a.dq_strides.token,
                        a.row_block,
                        a.head_dim,
                        block.end - block.first,
                        block.tokens - block.first,
                        a.softmax_scale};
  if (a.dq_sum_rows != 0 && has_second_sum(a, quotient(block.first, a.row_block * kWalkTurnBlocks))) {
    store_rows<Element, true>(rows, 0, 1, a.dq_sum_rows * a.sum_columns);
  } else {
    store_rows<Element>(rows, 0, 1);
  }
}

template <class Element>
FLASHSPARK_DEVICE void store_dk_and_dv(const BackwardArguments &a, int32_t cta) {
  const KeyTile tile = find_key_tile(a, cta);
  if (!tile.valid) return;
  // The CTAs that have summed the tile share it again.
  const int32_t first_head = tile.head_kv * static_cast<int32_t>(a.group.value);
  const int32_t part = quotient(tile.head_q - first_head, tile.num_heads_q);
  const int32_t held = tile.held - tile.first;
  const auto store = [&](const float *sums, int32_t sum_columns, void *data, const Strides &strides, int32_t columns,
                         float scale) {
    if (sums == nullptr) return;
    auto *to = static_cast<Element *>(data) + tile.batch * strides.batch + tile.head_kv * strides.head +
               (tile.row + tile.first) * strides.token;
    store_rows<Element>({sums + int64_t{tile.number} * a.key_tile * sum_columns, sum_columns, to, strides.token,
                         a.key_tile, columns, held, held, scale},
                        part, a.head_parts);
  };
  store(a.dk_sum, a.sum_columns, a.dk, a.dk_strides, a.head_dim, a.softmax_scale);
  store(a.dv_sum, a.sum_columns_v, a.dv, a.dv_strides, a.head_dim_v, a.dropout.scale);
}

template <class Element>
FLASHSPARK_DEVICE void postprocess(const BackwardArguments &a) {
  ptx::warm_constant_cache(a);
  const auto cta = static_cast<int32_t>(ptx::cta_x());
  const int32_t of_dq =
      a.dq_sum != nullptr ? a.num_row_blocks * a.num_heads_kv * static_cast<int32_t>(a.group.value) : 0;
  if (cta < of_dq) {
    store_dq<Element>(a, cta);
  } else {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    store_dk_and_dv<Element>(a, cta - of_dq);
  }
  if (a.added_blocks != nullptr) {  // the next kernel relies on it that this one has waited
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
  }
}

}  // namespace flashspark
