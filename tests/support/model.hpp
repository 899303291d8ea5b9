// Attention problems as plain numbers, apart from any memory layout: the same Problem can be laid out in many ways, run
// by any implementation, and compared with a formula that shares nothing with the library.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "flashspark/flashspark.h"

namespace flashspark::test {

struct Sequence {
  int64_t tq = 0, tk = 0;
  std::vector<float> q, k, v;  // (tq, hq, d), (tk, hkv, d), (tk, hkv, dv), each value exact in its dtype
  bool causal = false;
  std::vector<std::array<int32_t, 2>> ranges;    // prefix ranges of the sequence, inclusive, on the key axis
  int32_t rswa_prefix = 0;                       // keys that R-SWA always sees
  std::vector<float> rel;                        // (tq, hq, rel_extent) or empty
  std::vector<float> alibi;                      // (hq) or empty
  std::vector<float> q_scale, k_scale, v_scale;  // (hkv) descales or empty

  int64_t pos(int64_t i) const { return i + tk - tq; }
};

struct Problem {
  int64_t hq = 1, hkv = 1, d = 8, dv = 8;
  int32_t q_dtype = FLASHSPARK_FLOAT32, kv_dtype = FLASHSPARK_FLOAT32, out_dtype = FLASHSPARK_FLOAT32;
  float scale = 1, softcap = 0;
  int64_t window_left = -1, window_right = -1, attention_chunk = 0;
  int32_t prefix_mode = FLASHSPARK_PREFIX_NONE;
  bool prefix_clamp = false;
  int32_t rswa_window = 0;
  int64_t rel_extent = 0;
  int32_t rel_dtype = FLASHSPARK_FLOAT32;
  std::vector<float> sinks;  // (hq) or empty
  int32_t sinks_dtype = FLASHSPARK_FLOAT32;
  std::optional<float> output_scale;
  std::vector<Sequence> seqs;
};

enum class Kind { kDense, kVarlen, kPaged };

// Where the numbers lie and how the call is made. Every byte that belongs to no number is NaN (integers: garbage).
struct Layout {
  Kind q = Kind::kVarlen, kv = Kind::kVarlen;
  int64_t page_size = 16;
  bool head_major = false;      // the head stride exceeds the token stride
  bool packed_kv = false;       // V lies behind K in the same row
  bool backwards = false;       // K and V have a negative token stride
  int64_t row_pad = 0;          // elements between rows
  int64_t slack = 0;            // unused rows behind every sequence (seqused_q, seqused_k) and unused page-table slots
  int64_t leftpad = 0;          // dense, paged: keys to skip
  bool kv_batch_index = false;  // dense, paged: rows of the cache, or of the page table, in another order, with
                                // strangers between them
  bool causal_per_seq = false;
  bool prefix_per_token = false;  // hand the ranges over as one range a query token
  bool want_lse = true;
  uint64_t seed = 1;            // page order and garbage
  unsigned char poison = 0xff;  // byte of unused memory; 0xff is NaN in every format

  const char *implementation = nullptr;
  int32_t num_threads = 0, num_splits = 0, deterministic = 0;
};

struct Rows {              // of one sequence
  std::vector<float> out;  // (tq, hq, dv)
  std::vector<float> lse;  // (tq, hq)
};

struct Result {
  flashspark_status status = FLASHSPARK_OK;
  std::string error;
  std::string trespass;  // empty, or what was written outside the rows in use
  std::vector<Rows> seqs;
};

// The formula of flashspark.h in long double, one sequence. `reach` and `strain` of a row bound what rounding can do:
// the largest |v| it sees (scaled as the output is), and the largest sum of |q[d] k[d]| over d, scaled as the score is.
struct Truth {
  std::vector<long double> out, lse;  // (tq, hq, dv), (tq, hq)
  std::vector<double> reach, strain;  // (tq, hq)
};

Truth truth(const Problem &problem, const Sequence &s);
Result run(const Problem &problem, const Layout &layout);

// The value nearest to x that `dtype` can hold.
float rounded(float x, int32_t dtype);
std::vector<float> normal(std::mt19937_64 &rng, int64_t count, int32_t dtype, float spread = 1);
// A sequence of normal random numbers for the problem's heads, widths and dtypes.
Sequence random_sequence(std::mt19937_64 &rng, const Problem &problem, int64_t tq, int64_t tk);

// Empty when `result` is the truth within rounding; else what is wrong where. `exact` is the bound of the oracle (the
// truth rounded once); otherwise single-precision arithmetic is allowed for.
std::string difference(const Problem &problem, const Result &result, bool exact);
// Empty when the two agree within the rounding of two single-precision computations.
std::string difference(const Problem &problem, const Result &a, const Result &b);

}  // namespace flashspark::test
