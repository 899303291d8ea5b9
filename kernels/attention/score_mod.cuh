// What a kernel does to scores between Q K^T and the softmax, as a type: a score modification has
//
//   kActive           false: scores are only scaled, in units of log2, and the members below do not exist
//   RowContext        what a lane keeps of each of its rows
//   context(...)      makes it
//   apply(...)        one score: natural units in, units of log2 out
//   RowContext::keys  the keys that the row keeps
//
// FlexAttention calls the last two score_mod and mask_mod. A generated modification is one more such type.
#pragma once

#include "attention/mask.cuh"
#include "common/element.cuh"

namespace flashspark {

constexpr float kLog2E = 1.4426950408889634f;

// The plain softmax. Masks are found anew for the few tiles that need one, instead of being kept in registers.
struct NoScoreMod {
  static constexpr bool kActive = false;
  struct RowContext {};
};

// What models need of the C interface: softcap, ALiBi, a bias by distance; beside them PrefixLM ranges, R-SWA and
// attention chunks, which are masks (row_mask).
struct NativeScoreMod {
  static constexpr bool kActive = true;

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

  // Constants of the loop over a tile's scores.
  struct Caps {
    float cap, inverse_cap;  // softcap in units of log2; 2 log2(e) / softcap
  };
  static FLASHSPARK_DEVICE Caps caps(const AttentionArguments &a) {
    return {a.softcap * kLog2E, a.softcap > 0 ? 2 * kLog2E / a.softcap : 0};
  }
  static FLASHSPARK_DEVICE float apply(const AttentionArguments &a, const Caps &caps, float score,
                                       const RowContext &row, int32_t key) {
    // tanh y = 1 - 2 / (e^2y + 1)
    float x =
        a.softcap > 0 ? caps.cap - 2 * caps.cap / (ptx::exp2_approx(score * caps.inverse_cap) + 1) : score * kLog2E;
    const int32_t distance = row.pos - key;
    if (row.rel != nullptr && distance >= 0 && distance < a.rel_extent)
      x += load_as_float(row.rel, distance, a.rel_dtype) * kLog2E;
    if (a.alibi_slopes != nullptr) x -= row.slope * static_cast<float>(distance < 0 ? -distance : distance);
    return x;
  }
};

}  // namespace flashspark
