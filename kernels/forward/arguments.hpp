// What the host hands to the forward kernel and its combine. Plain data, one copy in the constant bank; every pointer
// lies on the device. Fields mean what the fields of the same name in flashspark.h mean; strides count elements.
#pragma once

#include <cstdint>

namespace flashspark {

struct Strides {
  int64_t batch, token, head;
};

// n / d for 0 <= n < 2^31 and 1 <= d < 2^31 as a multiplication: (n * multiplier) >> 32 >> shift; multiplier 0 stands
// for a power of two. Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
struct Divisor {
  uint32_t value, multiplier, shift;
};

// Strides of a paged cache in units of so many bytes, a power of two that divides both: the place of a page's rows is
// then a product of 32 bits and one of 64, where strides in elements take five.
struct PageSteps {
  int32_t page, slot, unit;
};

enum class PrefixMode : int32_t { none, per_seq, per_token };
enum class DType : int32_t { float32, float16, bfloat16, e4m3 };

// A factor for each sequence and KV head; strides may be 0. NULL: 1.
struct Scale {
  const float *data;
  int64_t seq_stride, head_stride;
};

// The combine kernel's blocks: warps, columns of a block, shared memory of a warp, and pieces of a row that it reads at
// once.
constexpr int32_t kCombineWarps = 8, kCombineColumns = 128, kCombineWarpBytes = kCombineColumns * 4 + 16,
                  kCombinePartials = 8;

// How the device may cut all work into shares: so many, of which each is to have 2^min_tiles_shift tiles of keys at
// least; only small_problem_ctas for fewer than small_problem_tiles tiles; the start of a row tile counts as so many
// tiles.
struct StreamKLimits {
  int32_t ctas, min_tiles_shift, small_problem_ctas, small_problem_tiles, tile_start_cost;
};

constexpr int32_t kRecordWords = 32;  // of a block: a line of the L2

struct ForwardArguments {
  const void *q, *k, *v;
  void *out;
  float *lse;  // NULL: not wanted
  Strides q_strides, k_strides, v_strides, out_strides, lse_strides;

  // Shape. A "row" is one (query token, query head of the group): row = token * group + head.
  int32_t num_seqs, num_heads_kv, head_dim, head_dim_v;
  int32_t max_seqlen_q, max_seqlen_k;
  Divisor group;      // query heads a KV head
  Divisor page_size;  // value 0: not paged

  // What there is, to which kernels cut whatever they read on the device (sequence.cuh).
  int32_t total_q;                // varlen: rows of q
  int32_t key_rows;               // varlen: rows of k; else rows that a sequence of k, or its pages, has
  int32_t last_batch, last_page;  // the largest that kv_batch_index and page_table may name

  const int32_t *cu_seqlens_q, *cu_seqlens_k, *seqused_q, *seqused_k, *leftpad_k, *kv_batch_index, *page_table;
  int64_t page_table_stride;
  PageSteps k_pages, v_pages;

  // Of kernels that convert K and V from e4m3 alone: the others have one type for all.
  DType q_dtype, out_dtype;
  Scale q_descale, k_descale, v_descale;  // q's is NULL unless q is e4m3

  // Scores.
  float softmax_scale;           // scores leave the product in natural units times this
  float softcap;                 // 0: off
  const void *sinks;             // (Hq)
  DType sinks_dtype, rel_dtype;  // no e4m3
  const void *rel_logits;
  int64_t rel_token_stride, rel_head_stride;
  int32_t rel_extent;
  const float *alibi_slopes;
  int64_t alibi_batch_stride;

  // Mask. Windows are clamped to 2^30, open ones are 2^30.
  int32_t causal;
  int32_t window_left, window_right;
  int32_t attention_chunk;  // 0: off
  const int32_t *causal_per_seq;
  PrefixMode prefix_mode;
  int32_t prefix_clamp_window;
  int32_t num_prefix_ranges;
  const int32_t *prefix_ranges;
  int32_t rswa_window;  // 0: off
  const int32_t *rswa_prefix_lens;

  // Work. Block x is (section, tile, unit): `units` (sequence x KV head, or KV head alone with cu_seqlens_q) of a
  // section share the cache; tiles go from the last rows of a sequence to the first, since those see most keys.
  int32_t num_m_blocks;           // row tiles a unit (bound)
  int32_t num_heads_times_batch;  // all units
  int32_t l2_section_heads;       // units a section
  int32_t num_splits;             // y: pieces of the keys of every tile
  // shares > 0: block x takes the x-th of so many even shares of all work instead, found from the lengths
  // (stream_k.cuh).
  StreamKLimits stream_k;
  // What the schedule kernel has found of them (scheduler_metadata.cuh): (blocks of x, kRecordWords); NULL: nothing.
  int32_t *scheduler_metadata;
  int32_t metadata_fingerprint;  // of these arguments
  // Contributors of split row tiles, which the combine kernel joins: (places, tile_rows, partial_columns), as
  // partial_row() says, and (places, tile_rows) float.
  float *partial_out, *partial_lse;
  int32_t partial_columns;        // head_dim_v up to a multiple of 16
  int32_t partial_pair_distance;  // of a lane's two pairs of columns in a piece: 8, or 2 where V is e4m3
  int32_t tile_rows, tile_keys;   // of the forward kernel
  int32_t key_groups;             // of tiles that let the host choose (Tile::runtime_key_groups): 1 or 2
  // The combine kernel's grid: blocks of y, at least one for kCombineWarps rows, and row tiles of a sequence and KV
  // head where block x is for row tile x; 0: for share x.
  int32_t combine_ctas_per_tile, combine_tiles;
};

}  // namespace flashspark
