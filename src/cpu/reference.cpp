// The oracle. It reads like the formula in flashspark.h and has no arithmetic in common with the engine or the kernels,
// so that an error cannot hide in both. Rows run in parallel; one thread computes a row, in a fixed order.
#include "cpu/reference.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/functions.hpp"
#include "cpu/reference_scores.hpp"
#include "cpu/thread_pool.hpp"
#include "dropout.hpp"
#include "dtype.hpp"

namespace flashspark::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void attend_row(const Params &p, const Functions &functions, const Dropout &dropout, const Sequence &s, int64_t i,
                int64_t h) {
  const int64_t h_kv = h / (p.num_heads_q / p.num_heads_kv);
  const double scale = double{p.softmax_scale} * scale_at(p.q_descale, s.index, h_kv, p.q.dtype) *
                       scale_at(p.k_descale, s.index, h_kv, p.k.dtype);
  const double sink = p.sinks != nullptr ? load_as_float(p.sinks, h, p.sinks_dtype) : -kInfinity;

  std::vector<int64_t> kept;
  std::vector<double> scores;
  double largest = sink;
  for (int64_t j = 0; j < s.seqlen_k; ++j) {
    if (!keep(p, s, i, j)) continue;
    double modified = capped(p, scale * query_key(p, s, i, j, h)) + bias(p, s, i, j, h);
    if (functions.any() && !functions.apply(s, i, h, j, modified)) continue;
    kept.push_back(j);
    scores.push_back(modified);
    largest = std::fmax(largest, scores.back());
  }

  const int64_t leftpad = p.leftpad_k != nullptr ? p.leftpad_k[s.index] : 0;
  double denominator = sink == -kInfinity ? 0 : std::exp(sink - largest);
  std::vector<double> sum(static_cast<size_t>(p.head_dim_v));
  for (size_t n = 0; n < kept.size(); ++n) {
    // A row of nothing but -inf scores (infinite biases) is a fully masked row, not NaN.
    const double weight = scores[n] == -kInfinity ? 0 : std::exp(scores[n] - largest);
    denominator += weight;
    const bool dropped = dropout.any() && dropout.drops(s.index, h, i, leftpad + kept[n]);
    if (weight == 0 || dropped) continue;
    add_row(sum.data(), weight, p.v, kv_offset(p, p.v, s, kept[n], h_kv), p.head_dim_v);
  }

  double factor = denominator == 0 ? 0 : scale_at(p.v_descale, s.index, h_kv, p.v.dtype) / denominator;
  factor /= 1 - double{p.dropout_p};
  if (p.output_scale != nullptr && p.out.dtype == FLASHSPARK_FLOAT8_E4M3) factor /= *p.output_scale;
  const int64_t o0 = q_offset(p, p.out, s, i, h);
  for (int64_t d = 0; d < p.head_dim_v; ++d) {
    store_from_float(p.out.data, o0 + d, p.out.dtype, static_cast<float>(sum[d] * factor));
  }
  if (p.lse != nullptr) {
    const double lse = denominator == 0 ? -kInfinity : largest + std::log(denominator);
    p.lse[lse_offset(p, s, i, h)] = static_cast<float>(lse);
  }
}

}  // namespace

void reference_forward(const Params &p) {
  const Functions functions(p);
  const Dropout dropout = dropout_of(p);
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    const Sequence s = sequence(p, b);
    parallel_for(p.num_threads, s.seqlen_q * p.num_heads_q,
                 [&](int64_t row) { attend_row(p, functions, dropout, s, row / p.num_heads_q, row % p.num_heads_q); });
  }
  functions.errors().throw_first();
}

}  // namespace flashspark::cpu
