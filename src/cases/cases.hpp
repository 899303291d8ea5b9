// Attention problems as data: what the command line, the unit tests and the GPU tests run against the oracle.
//
// A Case is a plain description. A Problem holds the memory of one Case and the params that point into it. The values
// of q, k, v depend only on (seed, sequence, token, head), never on the layout, so two Cases that differ only in
// layout, page size or strides describe the same attention and must give the same result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "flashspark/flashspark.h"

namespace flashspark::cases {

class Random;

// Rows of one sequence that take part. `k` counts the left padding too, as seqused_k does.
struct SeqLen {
  int64_t q = 0;
  int64_t k = 0;
};

enum class Layout { kDense, kVarlen, kPaged };             // kPaged: only for k and v
enum class CacheOrder { kPageTokenHead, kPageHeadToken };  // physical order of a paged or dense cache
enum class Input {
  kNormal,  // standard normal q, k, v
  kPeaked,  // as in real layers: a few keys lift the row maximum by about 30, one jump after the other
};
enum class Descale {
  kNone,       // NULL
  kPerTensor,  // strides (0, 0)
  kPerHead,    // strides (0, 1)
  kFull,       // (B, Hkv), contiguous
};

struct Case {
  std::string name;       // unique in its list
  std::string group;      // what --filter and the summary group by: "guide", "mask", "dtype", ...
  bool backward = false;  // its gradients are asked for, which BackwardProblem gives

  std::vector<SeqLen> lens;  // one per sequence; empty: a problem without sequences
  int64_t heads_q = 4;
  int64_t heads_kv = 4;
  int64_t head_dim = 64;
  int64_t head_dim_v = 0;  // 0: head_dim
  int32_t q_dtype = FLASHSPARK_BFLOAT16;
  int32_t kv_dtype = FLASHSPARK_BFLOAT16;
  int32_t out_dtype = FLASHSPARK_BFLOAT16;

  Layout q_layout = Layout::kVarlen;   // of q and out
  Layout kv_layout = Layout::kVarlen;  // dense with unequal lengths: seqused_q / seqused_k are given by themselves
  int64_t page_size = 16;              // paged
  CacheOrder cache_order = CacheOrder::kPageTokenHead;
  bool packed_kv = false;       // v lies behind k in the same rows: [..., D + Dv]
  bool strided = false;         // gaps between tokens and between heads of q, k, v, out, lse
  bool seqused_q = false;       // rows beyond Tq exist in q and out and must stay untouched
  bool seqused_k = false;       // rows beyond Tk exist in k and v and hold NaN (paged: given unless whole_table)
  bool whole_table = false;     // paged, equal lengths: max_seqlen_k says them, seqused_k is NULL
  bool kv_batch_index = false;  // dense, paged: k, v or page_table have more rows than sequences, permuted
  int64_t leftpad = 0;          // sequence b skips min(leftpad + b, k) keys

  double softmax_scale = -1;  // negative: head_dim^-0.5
  float softcap = 0;
  bool causal = false;
  bool causal_per_seq = false;  // causal, not, causal, ...
  int64_t window_left = -1;
  int64_t window_right = -1;
  int64_t attention_chunk = 0;
  bool sinks = false;
  int32_t sinks_dtype = FLASHSPARK_FLOAT32;
  int32_t prefix_mode = FLASHSPARK_PREFIX_NONE;  // two ranges a sequence and unused slots
  bool prefix_clamp = false;
  int32_t rswa_window = 0;
  int64_t rel_extent = 0;
  int32_t rel_dtype = FLASHSPARK_BFLOAT16;
  bool alibi = false;
  bool alibi_per_batch = false;
  Descale q_descale = Descale::kNone;  // given for other types than e4m3 they hold 3 and must not be read
  Descale k_descale = Descale::kNone;
  Descale v_descale = Descale::kNone;
  float output_scale = 0;  // 0: NULL
  float dropout = 0;       // dropout_p
  uint64_t dropout_seed = 0x123456789abcdef0, dropout_offset = 5;
  bool dropout_state = false;  // seed and offset lie in memory; those in params are others
  int32_t num_splits = 0;
  bool lse = true;

  uint64_t seed = 1;
  Input input = Input::kNormal;
};

// Rows in use of all sequences, one after the other: out (rows, Hq, Dv) and lse (rows, Hq), as float.
struct Result {
  flashspark_status status = FLASHSPARK_OK;
  std::string error;  // flashspark_last_error() when status != FLASHSPARK_OK
  std::vector<float> out;
  std::vector<float> lse;  // empty when not wanted
};

struct Comparison {
  double max_error = 0;  // of out
  double rms_error = 0;
  double bound = 0;  // at the element of out that is nearest to (or farthest beyond) its own bound
  double ratio = 0;  // largest |error| / bound over out and lse: > 1 fails
  double lse_max_error = 0;
  double lse_rms_error = 0;
  double lse_bound = 0;
  bool nonfinite_match = true;  // NaN and infinity exactly where the reference has them
  bool untouched = true;        // every byte outside the rows in use is as it was
  bool passed() const { return ratio <= 1.0 && nonfinite_match && untouched; }
};

// Memory of exactly `size` bytes, 64-byte aligned, so that a sanitizer sees any read beyond it.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t size);
  std::byte *data() const { return data_.get(); }
  size_t size() const { return size_; }
  template <class T>
  T *as() const {
    return reinterpret_cast<T *>(data_.get());
  }

 private:
  struct Free {
    void operator()(std::byte *p) const;
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t size_ = 0;
};

enum class Role { kQ, kK, kV, kOut };

class Problem {
 public:
  explicit Problem(const Case &spec);
  Problem(Problem &&) = default;
  Problem &operator=(Problem &&) = default;

  const Case &spec() const { return spec_; }
  // Ready to run. A test may change any field; pointers stay valid as long as the Problem lives.
  flashspark_attention_params params;

  // Poisons out and lse, runs, and reads the rows in use back. implementation == nullptr: what dispatch chooses.
  Result run(const char *implementation = nullptr, int num_threads = 0);
  // Runs without poisoning or reading back, for timing.
  flashspark_status launch(const char *implementation, int num_threads);
  void poison();
  Result result() const;  // reads out and lse back
  // Every block of memory that params point into, and the two that are written: a copy on a GPU is made of these.
  std::vector<std::span<std::byte>> memory();
  std::vector<std::span<std::byte>> written_memory();

  // Element (row i of sequence b, head h, column d). Row 0 of k and v is the first key that is not left padding.
  float get(Role role, int64_t b, int64_t i, int64_t h, int64_t d) const;
  void set(Role role, int64_t b, int64_t i, int64_t h, int64_t d, float value);

  int64_t seqlen_q(int64_t b) const { return spec_.lens[b].q; }
  int64_t seqlen_k(int64_t b) const { return spec_.lens[b].k - leftpad(b); }  // Tk: without left padding
  int64_t leftpad(int64_t b) const;
  int64_t row_begin(int64_t b) const { return rows_before_[b]; }  // first row of sequence b in Result
  int64_t num_rows() const { return rows_before_.back(); }
  // Whether query row i of sequence b sees key j: the mask of flashspark.h, written once more and apart from the
  // library.
  bool keeps(int64_t b, int64_t i, int64_t j) const;
  int64_t num_pairs() const;  // (query row, key) pairs kept by the mask, summed over sequences, one head

  double flops() const;  // 2 Hq (D + Dv) for every kept pair
  double bytes() const;  // q, out and every key and value in use, read or written once

  bool untouched() const;  // out and lse: gaps, guards and rows out of use still hold the poison
  double value_scale(int64_t b, int64_t h_kv) const;          // max |v * v_descale| / output_scale
  double score_scale(int64_t b, int64_t i, int64_t h) const;  // upper bound of |s| in this row

 private:
  std::byte *address(Role role, int64_t b, int64_t i, int64_t h) const;
  int64_t lse_index(int64_t b, int64_t i, int64_t h) const;
  int64_t token_row(int64_t b, int64_t i) const;  // row of the per-token tables
  double factor(const flashspark_scale &scale, int32_t type, int64_t b, int64_t h_kv) const;
  int32_t dtype(Role role) const;
  void allocate_queries();
  void allocate_cache();
  int64_t index_cache_rows(Random &random);
  void set_scores();  // scale, mask, bias, descale
  void set_sinks(Random &random);
  void set_prefix_ranges();
  void set_rel_logits();
  void set_alibi();
  void set_factors(Random &random);
  void set_dropout();
  int64_t num_tokens() const;  // rows of the per-token tables
  void fill_page_table(Random &random, int64_t pages);
  int64_t shape_cache(flashspark_tensor &t, int64_t blocks, int64_t tokens, int64_t width) const;  // gives its bytes
  void fill();                                                                                     // q, k, v
  friend Result reference(Problem &problem);

  Case spec_;
  std::vector<int64_t> rows_before_;  // (B + 1)
  std::vector<int32_t> cu_q_, cu_k_, seqused_q_, seqused_k_, leftpad_, batch_index_, page_table_;
  std::vector<int32_t> causal_, prefix_, rswa_prefix_;
  std::vector<uint64_t> dropout_state_;
  Buffer q_, k_, v_, out_, lse_, sinks_, rel_, workspace_;
  std::vector<float> alibi_, q_descale_, k_descale_, v_descale_, output_scale_;
  double largest_rel_ = 0;                           // largest |rel_logits|
  std::vector<double> value_max_, q_norm_, k_norm_;  // (B, Hkv), (rows, Hq), (B, Hkv)
};

// Runs "cpu-reference" with float32 out and with lse; leaves the problem's own out and lse alone.
Result reference(Problem &problem);

// How far an implementation may be from the oracle. Stated in compare.cpp, with the reasons.
struct Bound {
  double out(double ref, double magnitude = 0) const;  // for one element of out
  double lse(double ref) const;
  double unit_roundoff = 0;  // of the out dtype
  double smallest_half = 0;  // half the smallest positive number of the out dtype
  double relative = 0;       // error of one probability and of their sum
  double probability = 0;    // roundoff of probabilities, where they are rounded
  double value_scale = 0;
};
Bound error_bound(const Problem &problem, int64_t b, int64_t i, int64_t h);

// sum_j p[i,j] |v[j]| of every element of out, by the oracle: what rounding the probabilities can move, in parts.
std::vector<float> magnitudes(const Problem &problem);

// `got` of problem.run() against `expected` of reference(problem). Also looks at problem.untouched(). With `magnitudes`
// the implementation may round probabilities to v's dtype, as tensor cores ask for.
Comparison compare(const Problem &problem, const Result &got, const Result &expected,
                   const std::vector<float> *magnitudes = nullptr);

// B = 1, S = 1024, 16 heads, D = 128, causal, bf16; varlen GQA 16/8; a shuffled cache of 16-token pages.
std::vector<Case> three_guide_checks();
// Every feature at least once; masks crossed with paged, GQA and split. About 5 GFLOP in all.
std::vector<Case> feature_matrix();
// Prefill and decode at the sizes the README quotes.
std::vector<Case> bench_cases();
// Decode and verification over a paged cache: heads, batch, context, rows, page size, lengths and type of the cache.
enum class DecodeGrid { kCpu, kShort, kFull };
std::vector<Case> decode_cases(DecodeGrid grid);

// The feature matrix and training at common sizes, as far as a Case has gradients.
std::vector<Case> backward_matrix();
std::vector<Case> backward_bench_cases();

// "causal", "paged", "gqa", "e4m3 kv", ...: what a Case uses, for the coverage table. "backward, causal", ... of
// gradients.
std::vector<std::string> features(const Case &spec);

// One dtype element to and from float. Encoding rounds to nearest even and saturates e4m3 at 448.
float load(int32_t dtype, const void *base, int64_t index);
void store(int32_t dtype, void *base, int64_t index, float value);
const char *dtype_name(int32_t dtype);  // "bf16"

}  // namespace flashspark::cases
