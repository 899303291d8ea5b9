// What a kernel does to scores between Q K^T and the softmax, as a type: a score modification has
//
//   kNative           softcap, biases and the masks of NativeScoreMod, which has these members:
//     RowContext        what a lane keeps of each of its rows
//     context(...)      makes it
//     scaled(...) ..    one score each
//     RowContext::keys  the keys that the row keeps
//   kFunction         the user's functions (attention/function_mod.cuh), FlexAttention's score_mod and mask_mod
//   kScoreFunction    whether a score_mod is among them
//   kBlockSparse      key tiles come from lists
//   kBlockStatus      of tiles that the user's blocks do not fit: what these say is asked for each score
//   kLarge            whether the user's functions have many operations
//   kContiguous       whether there is no page table: the code for pages is left out
//   kScoreBias        whether the user's score function adds to the score what does not depend on it: then the products
//                     begin with it, which costs less than adding it behind them (docs/experiments.md E84)
//   kScoreOffset      whether the user's score function has a part that is the same for all scores of a row in a
//   subtile kDropout          whether probabilities are dropped (attention/dropout.cuh) kRowWords         words of
//   shared memory that the functions and dropout keep of each row
#pragma once

#include "attention/mask.cuh"
#include "common/element.cuh"

namespace flashspark {

constexpr float kLog2E = 1.4426950408889634f;

// The plain softmax. Masks are found anew for the few tiles that need one, instead of being kept in registers.
struct NoScoreMod {
  static constexpr bool kNative = false, kFunction = false, kScoreFunction = false, kBlockSparse = false,
                        kBlockStatus = false, kDropout = false, kScoreBias = false, kScoreOffset = false,
                        kContiguous = false, kLarge = false;
  static constexpr int32_t kRowWords = 0;
  struct RowContext {};
};

// What models need of the C interface: softcap, ALiBi, a bias by distance; beside them PrefixLM ranges, R-SWA and
// attention chunks, which are masks (row_mask).
struct NativeScoreMod {
  static constexpr bool kNative = true, kFunction = false, kScoreFunction = false, kBlockSparse = false,
                        kBlockStatus = false, kDropout = false, kScoreBias = false, kScoreOffset = false,
                        kContiguous = false, kLarge = false;
  static constexpr int32_t kRowWords = 0;

  struct RowContext {
    RowMask keys;  // empty for rows past the sequence
    int32_t pos;
    float slope;      // ALiBi, units of log2
    const void *rel;  // bias by distance; NULL: none
  };

  static FLASHSPARK_DEVICE RowContext context(const AttentionArguments &a, const RowTile &row_tile,
                                              const SequenceMask &mask, int32_t row) {
    RowContext r{};
    if (row >= row_tile.end_row) return r;
    const Quotient at = divide(row, a.group);
    const int64_t head = row_tile.head_kv * static_cast<int64_t>(a.group.value) + at.remainder;
    r.keys = row_mask<true>(a, mask, at.quotient);
    r.pos = at.quotient + mask.shift;
    if (a.alibi_slopes != nullptr) r.slope = a.alibi_slopes[row_tile.seq * a.alibi_batch_stride + head] * kLog2E;
    if (a.rel_logits != nullptr) {
      const int64_t offset = (mask.token_row + at.quotient) * a.rel_token_stride + head * a.rel_head_stride;
      r.rel = static_cast<const char *>(a.rel_logits) + offset * (a.rel_dtype == DType::float32 ? 4 : 2);
    }
    return r;
  }

  // A lane's scores in a tile are changed by one modification after the other, each in a loop of its own: the branch
  // that asks for it is then outside, and not in every score. Natural units in, but for `scale`; units of log2 out.
  static FLASHSPARK_DEVICE float scaled(float score, float scale_log2) { return score * scale_log2; }
  // tanh y = 1 - 2 / (e^2y + 1)
  static FLASHSPARK_DEVICE float capped(float score, float cap_log2, float two_scale_log2_over_cap) {
    return cap_log2 - 2 * cap_log2 * ptx::reciprocal_approx(ptx::exp2_approx(score * two_scale_log2_over_cap) + 1);
  }
  static FLASHSPARK_DEVICE float bias(const AttentionArguments &a, const RowContext &row, int32_t key) {
    const int32_t distance = row.pos - key;
    const bool has_bias = row.rel != nullptr && distance >= 0 && distance < a.rel_extent;
    return has_bias ? load_as_float(row.rel, distance, a.rel_dtype) * kLog2E : 0.0f;
  }
  // `distance` as a float of which a constant was subtracted: the rounding of a distance above 2^24 is as good as the
  // product's.
  static FLASHSPARK_DEVICE float alibi(const RowContext &row, float distance) {
    return row.slope * (distance < 0 ? -distance : distance);
  }
};

}  // namespace flashspark
