// Attention problems as plain numbers, independent of memory layout: one Problem can be laid out in many ways, run by
// any implementation, and compared with a formula that shares no code with the library.
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
  std::vector<std::array<int32_t, 2>> ranges;    // prefix ranges of the sequence, inclusive, in key positions
  int32_t rswa_prefix = 0;                       // keys that R-SWA always keeps
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
  float dropout = 0;  // dropout_p
  uint64_t dropout_seed = 0xfedcba9876543210, dropout_offset = 1;
  std::vector<Sequence> seqs;
};

enum class Kind { kDense, kVarlen, kPaged };

// Memory layout and call options. Every byte that holds no element is NaN (integers: garbage).
struct Layout {
  Kind q = Kind::kVarlen, kv = Kind::kVarlen;
  int64_t page_size = 16;
  bool head_major = false;      // the head stride exceeds the token stride
  bool packed_kv = false;       // V follows K within the same row
  bool backwards = false;       // K and V have a negative token stride
  int64_t row_pad = 0;          // elements between rows
  int64_t slack = 0;            // unused rows after every sequence (seqused_q, seqused_k) and unused page-table slots
  int64_t leftpad = 0;          // dense, paged: keys to skip
  bool kv_batch_index = false;  // dense, paged: cache or page-table rows permuted, with unused rows in between
  bool causal_per_seq = false;
  bool prefix_per_token = false;  // pass the prefix ranges as one range per query token
  bool dropout_state = false;     // pass dropout's seed and offset in memory
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
  std::string trespass;  // empty, or a description of writes outside the rows in use
  int64_t leftpad = 0;   // of the layout, where k and v can have it: dropout counts it as keys
  std::vector<Rows> seqs;
};

// The formula of flashspark.h in long double, for one sequence: number b of its batch, which dropout asks for. `reach`
// and `strain` bound the rounding error of a row: the largest |v| it sees (with the output's scale), and the largest
// sum over d of |q[d] k[d]| (with the score's scale).
struct Truth {
  std::vector<long double> out, lse;  // (tq, hq, dv), (tq, hq)
  std::vector<double> reach, strain;  // (tq, hq)
};

Truth truth(const Problem &problem, const Sequence &s, int64_t b = 0, int64_t leftpad = 0);
Result run(const Problem &problem, const Layout &layout);

// The value nearest to x that `dtype` can hold.
float rounded(float x, int32_t dtype);
std::vector<float> normal(std::mt19937_64 &rng, int64_t count, int32_t dtype, float spread = 1);
// A sequence of normal random values with the problem's heads, head sizes and dtypes.
Sequence random_sequence(std::mt19937_64 &rng, const Problem &problem, int64_t tq, int64_t tk);

// Empty if `result` matches the formula within rounding error, else what differs and where. `exact` selects the bound
// of the oracle, which rounds the true value once; otherwise the bound allows for single-precision arithmetic.
std::string difference(const Problem &problem, const Result &result, bool exact);
// Empty if two results agree within the rounding error of two single-precision computations.
std::string difference(const Problem &problem, const Result &a, const Result &b);

}  // namespace flashspark::test
