// Runs the backward pass: a job is a KV head of a sequence with its query heads, or a share of that head's tiles of
// keys. It owns dk and dv of its keys, and sums dq of all rows in memory of its own (docs/design/backward.md).
#include "cpu/backward.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/backward_plan.hpp"
#include "cpu/function_gradients.hpp"
#include "cpu/scratch_memory.hpp"
#include "cpu/thread_pool.hpp"
#include "cpu/tile_mask.hpp"
#include "dtype.hpp"

namespace flashspark::cpu {
namespace {

// Rows whose dot products of out and dout are one job, and whose share of dsinks is one sum.
constexpr int64_t kPreparedRows = 256;

using Head = BackwardHead;

class Backward {
 public:
  explicit Backward(const BackwardParams &p)
      : p_(p),
        f_(p.forward),
        kernels_(backward_kernels()),
        functions_(f_),
        dropout_(dropout_of(f_)),
        group_(f_.num_heads_q / f_.num_heads_kv),
        plan_(p) {}

  void run() {
    if (plan_.partial_floats > 0) partial_dq_ = allocate_floats(static_cast<size_t>(plan_.partial_floats));
    slopes_.assign(plan_.jobs.size() * static_cast<size_t>(group_), 0.0);
    clear_unused();
    prepare();
    run_jobs();
    store_split_queries();
    store_slopes();
    functions_.errors().throw_first();
  }

 private:
  struct Extent {
    int64_t batch, row, rows;  // rows [row, row + rows) of a batch row
  };

  bool per_sequence_slopes() const { return f_.alibi_batch_stride != 0; }

  void clear_unused() const;
  void clear_rows(const flashspark_tensor &t, const Extent &e, int64_t heads, int64_t width) const;
  void clear_rel() const;
  void prepare();
  void prepare_rows(const Head &head, int64_t first, int64_t last, double *sinks);
  void run_jobs();
  void run_job(const BackwardJob &job, FunctionGradients *function_gradients);
  void run_key_tile(const Head &head, BackwardTile &t, TileFunctions &tile_functions) const;
  void clear_keys(const Head &head, int64_t begin, int64_t end) const;
  void store_queries(const Head &head, int64_t row, const float *dq) const;
  void store_split_queries();
  void store_slopes() const;

  const BackwardParams &p_;
  const Params &f_;
  const BackwardKernels &kernels_;
  const Functions functions_;
  const Dropout dropout_;
  const int64_t group_;
  const BackwardPlan plan_;
  std::vector<float> common_;
  std::vector<double> slopes_;  // (jobs, group)
  Floats partial_dq_;
};

void Backward::clear_rows(const flashspark_tensor &t, const Extent &e, int64_t heads, int64_t width) const {
  if (t.data == nullptr) return;
  const size_t size = dtype_size(t.dtype);
  for (int64_t row = e.row; row < e.row + e.rows; ++row) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = e.batch * t.batch_stride + row * t.token_stride + h * t.head_stride;
      std::fill_n(static_cast<char *>(t.data) + at * static_cast<int64_t>(size), static_cast<size_t>(width) * size,
                  '\0');
    }
  }
}

// Zeros for rows that no job writes: outside all sequences, and those of sequences that are not in use.
void Backward::clear_unused() const {
  const Extents e = extents_of(f_);
  const auto clear_queries = [&](const Extent &at) { clear_rows(p_.dq, at, f_.num_heads_q, f_.head_dim); };
  const auto clear_keys = [&](const Extent &at) {
    clear_rows(p_.dk, at, f_.num_heads_kv, f_.head_dim);
    clear_rows(p_.dv, at, f_.num_heads_kv, f_.head_dim_v);
  };
  int64_t q_end = 0, k_end = 0;  // of varlen rows so far
  for (int64_t b = 0; b < f_.num_seqs; ++b) {
    const Sequence s = sequence(f_, b);
    const int64_t keys = s.seqlen_q == 0 ? 0 : s.seqlen_k;  // nobody looks at the keys of a sequence without queries
    if (is_varlen_q(f_)) {
      clear_queries({0, q_end, s.q_row - q_end});
      q_end = s.q_row + s.seqlen_q;
    } else {
      clear_queries({b, s.seqlen_q, e.q_tokens - s.seqlen_q});
    }
    if (is_varlen_k(f_)) {
      clear_keys({0, k_end, s.k_row - k_end});
      k_end = s.k_row + keys;
    } else {
      clear_keys({b, keys, e.kv_tokens - keys});
    }
  }
  if (is_varlen_q(f_)) clear_queries({0, q_end, e.q_tokens - q_end});
  if (is_varlen_k(f_)) clear_keys({0, k_end, e.kv_tokens - k_end});
  if (p_.drel_logits != nullptr) clear_rel();
}

// Jobs write each distance that they meet.
void Backward::clear_rel() const {
  const flashspark_tensor drel = as_rel_tensor(f_, p_.drel_logits, FLASHSPARK_FLOAT32);
  parallel_for(plan_.threads, rel_tokens(f_),
               [&](int64_t t) { clear_rows(drel, {0, t, 1}, f_.num_heads_q, f_.rel_extent); });
}

// common and the sums of sinks, of packed rows [first, last).
void Backward::prepare_rows(const Head &head, int64_t first, int64_t last, double *sinks) {
  const auto size = static_cast<int64_t>(dtype_size(f_.out.dtype));
  float *const common = common_.data() + head.first_common;
  const auto address = [&](const flashspark_tensor &t, int64_t row) {
    const int64_t h = head.h_kv * group_ + row % group_;
    return static_cast<const char *>(t.data) + q_offset(f_, t, head.s, row / group_, h) * size;
  };
  for (int64_t row = first; row < last; row += kRowGroup) {
    const void *out[kRowGroup], *dout[kRowGroup];
    float dots[kRowGroup];
    for (int64_t n = 0; n < kRowGroup; ++n) {
      const int64_t real = std::min(row + n, last - 1);  // what fills the group is not used
      out[n] = address(f_.out, real), dout[n] = address(p_.dout, real);
    }
    kernels_.dots(out, dout, f_.head_dim_v, f_.out.dtype, dots);
    for (int64_t n = 0; n < std::min<int64_t>(kRowGroup, last - row); ++n) common[row + n] = -dots[n];
  }
  for (int64_t row = first; row < last; ++row) {
    const int64_t h = head.h_kv * group_ + row % group_, at = lse_offset(f_, head.s, row / group_, h);
    if (p_.dlse != nullptr) common[row] += p_.dlse[at];
    if (p_.dsinks == nullptr) continue;
    constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
    const double sink = load_as_float(f_.sinks, h, f_.sinks_dtype), lse = f_.lse[at];
    if (sink != kMinusInfinity && lse != kMinusInfinity) sinks[row % group_] += std::exp(sink - lse) * common[row];
  }
}

void Backward::prepare() {
  common_.resize(static_cast<size_t>(plan_.common_rows));
  struct Chunk {
    size_t head;
    int64_t first;
  };
  std::vector<Chunk> chunks;
  for (size_t n = 0; n < plan_.heads.size(); ++n) {
    for (int64_t row = 0; row < plan_.heads[n].rows; row += kPreparedRows) chunks.push_back({n, row});
  }
  std::vector<double> sinks(chunks.size() * static_cast<size_t>(group_));
  parallel_for(plan_.threads, static_cast<int64_t>(chunks.size()), [&](int64_t n) {
    const auto [number, first] = chunks[static_cast<size_t>(n)];
    const Head &head = plan_.heads[number];
    prepare_rows(head, first, std::min(first + kPreparedRows, head.rows), sinks.data() + n * group_);
  });
  if (p_.dsinks == nullptr) return;
  std::vector<double> sums(static_cast<size_t>(f_.num_heads_q));
  for (size_t n = 0; n < chunks.size(); ++n) {
    const int64_t first = plan_.heads[chunks[n].head].h_kv * group_;
    for (int64_t h = 0; h < group_; ++h)
      sums[static_cast<size_t>(first + h)] += sinks[n * static_cast<size_t>(group_) + static_cast<size_t>(h)];
  }
  for (size_t h = 0; h < sums.size(); ++h) p_.dsinks[h] = static_cast<float>(sums[h]);
}

void Backward::run_jobs() {
  if (f_.score_mod.mod != nullptr) {
    // A part's jobs follow each other and share its sums of captured tensors.
    const int64_t parts = plan_.parts;
    std::vector<FunctionGradients> gradients(static_cast<size_t>(parts), FunctionGradients(p_));
    parallel_for(plan_.threads, parts, [&](int64_t part) {
      for (size_t n = static_cast<size_t>(part); n < plan_.jobs.size(); n += static_cast<size_t>(parts))
        run_job(plan_.jobs[n], &gradients[static_cast<size_t>(part)]);
    });
    FunctionGradients::store(p_, gradients);
    return;
  }
  // Longest first, so that the last jobs to end are short.
  std::vector<size_t> order(plan_.jobs.size());
  for (size_t n = 0; n < order.size(); ++n) order[n] = n;
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return std::tuple(plan_.jobs[b].cost, a) < std::tuple(plan_.jobs[a].cost, b); });
  parallel_for(plan_.threads, static_cast<int64_t>(order.size()),
               [&](int64_t n) { run_job(plan_.jobs[order[static_cast<size_t>(n)]], nullptr); });
}

void Backward::run_job(const BackwardJob &job, FunctionGradients *function_gradients) {
  const Head &head = plan_.heads[job.head];
  BackwardTile t{};
  t.p = &p_;
  t.function_gradients = function_gradients;
  t.rows.p = &f_;
  t.rows.s = head.s;
  t.rows.h_kv = head.h_kv;
  t.rows.num_heads = 1;
  t.rows.group = group_;
  t.rows.dropout = dropout_;
  t.common = common_.data() + head.first_common;
  const int64_t number = head.first_job + job.share;
  if (p_.dalibi_slopes != nullptr) t.slopes = slopes_.data() + number * group_;
  t.scratch = thread_scratch(backward_scratch_floats(f_.head_dim, f_.head_dim_v));
  Floats own;  // dq of a head's only job
  if (p_.dq.data != nullptr) {
    const auto floats = static_cast<size_t>(plan_.dq_floats(head));
    if (head.first_partial < 0) own = allocate_floats(floats);
    t.dq = own ? own.get() : partial_dq_.get() + head.first_partial + job.share * static_cast<int64_t>(floats);
    std::fill_n(t.dq, floats, 0.0f);
  }
  thread_local TileFunctions tile_functions;  // keeps its memory from tile to tile
  for (int64_t n = job.share; n < head.key_tiles(); n += head.shares) {
    t.key = head.keys.begin + n * kBackwardKeys;
    t.count = std::min<int64_t>(kBackwardKeys, head.keys.end - t.key);
    run_key_tile(head, t, tile_functions);
  }
  if (job.share == 0) {
    clear_keys(head, 0, head.keys.begin);
    clear_keys(head, head.keys.end, head.s.seqlen_k);
  }
  for (int64_t row = 0; own && row < head.rows; ++row)
    store_queries(head, row, t.dq + row * backward_width(f_.head_dim));
}

void Backward::run_key_tile(const Head &head, BackwardTile &t, TileFunctions &tile_functions) const {
  TileMask &mask = thread_mask();
  bool begun = false;
  for (const BackwardRowTile &tile : plan_.row_tiles[head.row_tiles]) {
    if (!tile.sees(t.key, t.key + t.count)) continue;
    if (!begun) kernels_.begin(t);
    begun = true;
    mask.set_masks(f_, head.s, tile.row0 / group_, (tile.row0 + tile.rows - 1) / group_);
    t.rows.row0 = tile.row0;
    t.rows.rows = tile.rows;
    t.rows.masks = mask.masks.data();
    if (functions_.any()) {
      tile_functions.start(functions_, t.rows);
      t.rows.functions = &tile_functions;
    }
    kernels_.add_rows(t);
  }
  if (begun) return kernels_.end(t);
  clear_keys(head, t.key, t.key + t.count);
}

void Backward::clear_keys(const Head &head, int64_t begin, int64_t end) const {
  const float zeros[kMaxHeadDim] = {};
  const auto clear = [&](const flashspark_tensor &to, int64_t j, int64_t width) {
    if (to.data != nullptr)
      kernels_.store(zeros, width, 1.0f, to.data, kv_offset(f_, to, head.s, j, head.h_kv), to.dtype);
  };
  for (int64_t j = begin; j < end; ++j) {
    clear(p_.dk, j, f_.head_dim);
    clear(p_.dv, j, f_.head_dim_v);
  }
}

void Backward::store_queries(const Head &head, int64_t row, const float *dq) const {
  const int64_t i = row / group_, h = head.h_kv * group_ + row % group_;
  kernels_.store(dq, f_.head_dim, f_.softmax_scale, p_.dq.data, q_offset(f_, p_.dq, head.s, i, h), p_.dq.dtype);
}

// dq of heads whose keys several jobs have: the sum of their sums, in their order.
void Backward::store_split_queries() {
  if (!partial_dq_) return;
  parallel_for(plan_.threads, static_cast<int64_t>(plan_.heads.size()), [&](int64_t n) {
    const Head &head = plan_.heads[static_cast<size_t>(n)];
    if (head.first_partial < 0) return;
    const int64_t width = backward_width(f_.head_dim);
    for (int64_t row = 0; row < head.rows; ++row) {
      float *sum = partial_dq_.get() + head.first_partial + row * width;
      for (int64_t share = 1; share < head.shares; ++share) {
        const float *more = sum + share * plan_.dq_floats(head);
        for (int64_t d = 0; d < f_.head_dim; ++d) sum[d] += more[d];
      }
      store_queries(head, row, sum);
    }
  });
}

void Backward::store_slopes() const {
  if (p_.dalibi_slopes == nullptr) return;
  std::vector<double> sums(static_cast<size_t>(f_.num_heads_q * (per_sequence_slopes() ? f_.num_seqs : 1)));
  for (size_t n = 0; n < plan_.jobs.size(); ++n) {
    const Head &head = plan_.heads[plan_.jobs[n].head];
    const int64_t first = (per_sequence_slopes() ? head.s.index * f_.num_heads_q : 0) + head.h_kv * group_;
    for (int64_t h = 0; h < group_; ++h)
      sums[static_cast<size_t>(first + h)] += slopes_[n * static_cast<size_t>(group_) + static_cast<size_t>(h)];
  }
  for (size_t n = 0; n < sums.size(); ++n) p_.dalibi_slopes[n] = static_cast<float>(sums[n]);
}

}  // namespace

size_t backward_scratch_floats(int64_t head_dim, int64_t head_dim_v) {
  const int64_t rows = backward_rows(head_dim, head_dim_v);
  const int64_t pitch = backward_pitch(head_dim), pitch_v = backward_pitch(head_dim_v);
  const int64_t sums = kBackwardKeys * (pitch + pitch_v) + 4 * rows * kScorePitch + kRowGroup * kBackwardKeys;
  const int64_t of_floats = kBackwardKeys * (2 * pitch + pitch_v) + rows * (pitch + pitch_v);
  // Words of two elements, of the rows once across and once along.
  const int64_t half_pitches = backward_pitch(head_dim / 2) + backward_pitch(head_dim_v / 2);
  const int64_t of_pairs = kBackwardKeys / 2 * (2 * pitch + pitch_v) + rows * half_pitches +
                           rows / 2 * (pitch + pitch_v) + rows * backward_pitch(kBackwardKeys / 2);
  return static_cast<size_t>(sums + std::max(of_floats, of_pairs) + 16 * kPitchPad);
}

void apply_function_gradients(const BackwardTile &t, int64_t first, int64_t rows, int64_t key, int64_t count,
                              const float *scores, float *ds) {
  t.function_gradients->apply(*t.rows.functions, first, rows, key, count, scores, ds, kScorePitch);
}

void engine_backward(const BackwardParams &p) {
  Backward(p).run();
}

}  // namespace flashspark::cpu
