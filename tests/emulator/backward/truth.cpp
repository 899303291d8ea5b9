// What the gradients of a problem are: the formula of flashspark.h in double precision, with the oracle's masks and
// biases.
#include <algorithm>
#include <cmath>

#include "backward/functions.hpp"
#include "backward/problem.hpp"
#include "cpu/reference_scores.hpp"
#include "dropout.hpp"
#include "dtype.hpp"

namespace flashspark::emulator {
namespace {

// One row, key by key.
struct Row {
  std::vector<double> score, probability, slope, kept;  // slope: of softcap; kept: what dropout multiplies with
  std::vector<double> given, by_score;                  // scores as the user's function gets them, and its derivative
  std::vector<bool> visible;                            // whether the row keeps the key
  double lse = -INFINITY;
};

graph::Row graph_row(const Sequence &s, int64_t i, int64_t h) {
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
  return {narrow(s.index),    narrow(h),       narrow(i),      narrow(s.seqlen_q),
          narrow(s.seqlen_k), narrow(s.q_row), narrow(s.k_row)};
}

Row row_of(const Params &p, const Sequence &s, int64_t i, int64_t h, const ProblemFunctions *functions) {
  const auto keys = static_cast<size_t>(s.seqlen_k);
  Row row{std::vector<double>(keys, -INFINITY), std::vector<double>(keys, 0.0), std::vector<double>(keys, 1.0),
          std::vector<double>(keys, 1.0),       std::vector<double>(keys, 0.0), std::vector<double>(keys, 1.0),
          std::vector<bool>(keys, false)};
  const Dropout dropout = dropout_of(p);
  const double sink = p.sinks != nullptr ? double{load_as_float(p.sinks, h, p.sinks_dtype)} : -INFINITY;
  double largest = sink;
  for (int64_t j = 0; j < s.seqlen_k; ++j) {
    const auto key = static_cast<int32_t>(j);
    if (!cpu::keep(p, s, i, j) || (functions != nullptr && !functions->keeps(graph_row(s, i, h), key))) continue;
    const auto at = static_cast<size_t>(j);
    row.visible[at] = true;
    const double x = cpu::capped(p, double{p.softmax_scale} * cpu::query_key(p, s, i, j, h));
    if (p.softcap > 0) row.slope[at] = 1 - std::pow(x / double{p.softcap}, 2);
    if (p.dropout_p > 0) row.kept[at] = dropout.drops(s.index, h, i, j) ? 0 : double{dropout.scale};
    row.given[at] = row.score[at] = x + cpu::bias(p, s, i, j, h);
    if (functions != nullptr)
      row.score[at] = functions->modified(graph_row(s, i, h), key, row.given[at], row.by_score[at]);
    largest = std::max(largest, row.score[at]);
  }
  if (largest == -INFINITY) return row;
  double sum = std::exp(sink - largest);
  for (const double x : row.score) sum += std::exp(x - largest);
  row.lse = double{static_cast<float>(largest + std::log(sum))};
  for (size_t j = 0; j < keys; ++j) row.probability[j] = std::exp(row.score[j] - row.lse);
  return row;
}

}  // namespace

void BackwardProblem::Truth::resize(int64_t count) {
  for (std::vector<double> *each : {&value, &allowed, &noise}) each->assign(static_cast<size_t>(count), 0.0);
}
void BackwardProblem::Truth::add(int64_t at, double x, double step, double error) {
  const auto n = static_cast<size_t>(at);
  value[n] += x, allowed[n] += step * std::fabs(x), noise[n] += error;
}

void BackwardProblem::compute_truth() {
  const Params &p = params.forward;
  const BackwardSpec &s = spec_;
  const Extents e = extents_of(p);
  truth_q_.resize(e.q_batch * e.q_tokens * s.heads_q * s.head_dim);
  truth_k_.resize(e.kv_batch * e.kv_tokens * s.heads_kv * s.head_dim);
  truth_v_.resize(e.kv_batch * e.kv_tokens * s.heads_kv * s.head_dim_v);
  truth_sinks_.resize(s.heads_q);
  truth_slopes_.resize(static_cast<int64_t>(dslopes_.size()));
  truth_rel_.resize(static_cast<int64_t>(drel_.size()));
  for (size_t n = 0; n < drel_.size(); ++n) {
    if (static_cast<int64_t>(n) % p.rel_head_stride >= p.rel_extent) truth_rel_.value[n] = NAN;
  }
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    const Sequence sequence = flashspark::sequence(p, b);
    for (int64_t h = 0; h < s.heads_q; ++h) {
      for (int64_t i = 0; i < sequence.seqlen_q; ++i) add_row(sequence, i, h);
    }
  }
}

void BackwardProblem::add_row(const Sequence &s, int64_t i, int64_t h) {
  const Params &p = params.forward;
  const int64_t head_kv = h / (p.num_heads_q / p.num_heads_kv), tokens_q = extents_of(p).q_tokens;
  const int64_t at_out = q_offset(p, p.out, s, i, h), at_dout = q_offset(p, params.dout, s, i, h);
  const int64_t at_q = q_offset(p, p.q, s, i, h), at_lse = lse_offset(p, s, i, h);
  Row row = row_of(p, s, i, h, functions_.get());
  if (spec_.without_keys && i % 3 == 1) {
    row.lse = -INFINITY;
    std::fill(row.probability.begin(), row.probability.end(), 0.0);
  }
  const auto number = [](const flashspark_tensor &t, int64_t at) { return double{load_as_float(t.data, at, t.dtype)}; };
  lse_[static_cast<size_t>(at_lse)] = static_cast<float>(row.lse);
  for (int64_t d = 0; d < p.head_dim_v; ++d) {
    double sum = 0;
    for (int64_t j = 0; j < s.seqlen_k; ++j) {
      const double weight = row.probability[static_cast<size_t>(j)] * row.kept[static_cast<size_t>(j)];
      if (weight != 0) sum += weight * number(p.v, kv_offset(p, p.v, s, j, head_kv) + d);
    }
    store_from_float(p.out.data, at_out + d, p.out.dtype, static_cast<float>(sum));
  }
  if (row.lse == -INFINITY) return;
  double delta = cpu::dot(p.out, at_out, params.dout, at_dout, p.head_dim_v);
  double delta_terms = 0;  // whose sum in float32 it is
  for (int64_t d = 0; d < p.head_dim_v; ++d)
    delta_terms += std::fabs(number(p.out, at_out + d) * number(params.dout, at_dout + d));
  if (params.dlse != nullptr) {
    delta -= double{params.dlse[at_lse]};
    delta_terms += std::fabs(double{params.dlse[at_lse]});
  }
  if (params.dsinks != nullptr) {
    const double x = -std::exp(double{sinks_[static_cast<size_t>(h)]} - row.lse) * delta;
    truth_sinks_.add(h, x, 0, 1e-4 * std::fabs(x) + 1e-7);
  }
  const auto batch_q = is_varlen_q(p) ? 0 : s.index, batch_k = is_varlen_k(p) ? 0 : s.index;
  const int64_t row_q = ((batch_q * tokens_q + s.q_row + i) * p.num_heads_q + h) * p.head_dim;
  for (int64_t j = 0; j < s.seqlen_k; ++j) {
    const auto at = static_cast<size_t>(j);
    if (!row.visible[at]) continue;
    const int64_t distance = s.pos(i) - j;
    const bool has_rel = p.rel_logits != nullptr && distance >= 0 && distance < p.rel_extent;
    const int64_t at_rel = token_row(p, s, i) * p.rel_token_stride + h * p.rel_head_stride + distance;
    if (has_rel) truth_rel_.add(at_rel, 0, 0, 1e-12);  // it is read: spare_unread_biases()
    if (row.score[at] == -INFINITY) continue;
    const double prob = row.probability[at];
    const int64_t at_v = kv_offset(p, p.v, s, j, head_kv), at_k = kv_offset(p, p.k, s, j, head_kv);
    // What cancels in the difference of dp and delta leaves the rounding errors of float sums.
    double dp = 0, cancels = delta_terms;
    for (int64_t d = 0; d < p.head_dim_v; ++d) {
      const double x = number(params.dout, at_dout + d) * number(p.v, at_v + d);
      dp += x, cancels += row.kept[at] * std::fabs(x);
    }
    const double noise = (prob * 0x1p-18 + 0x1p-25) * cancels, modified = prob * (row.kept[at] * dp - delta);
    // What biases get of it, and how wrong that may be.
    const double biased = prob == 0 ? 0 : modified * row.by_score[at];
    double biased_noise = noise * std::max(1.0, std::fabs(row.by_score[at]));
    // A function may add hundreds to a score, whose roundings are then P's, as ProblemFunctions::add() has it.
    if (functions_ != nullptr) biased_noise += std::fabs(biased) * 0x1p-14;
    if (has_rel) truth_rel_.add(at_rel, biased, step(), biased_noise);
    if (p.alibi_slopes != nullptr) {
      const auto far = static_cast<double>(std::abs(distance));
      truth_slopes_.add((spec_.alibi_per_seq ? s.index * p.num_heads_q : 0) + h, -biased * far, step(),
                        biased_noise * far);
    }
    if (functions_ != nullptr && prob > 0)
      functions_->add(graph_row(s, i, h), static_cast<int32_t>(j), row.given[at], modified, prob * 0x1p-18 * cancels);
    const double slope = row.slope[at] * row.by_score[at];
    const double scale = slope * double{p.softmax_scale}, ds = prob == 0 ? 0 : modified * scale;
    const double error = noise * std::max(1.0, std::fabs(slope)) * double{p.softmax_scale};
    const int64_t row_k = (batch_k * extents_of(p).kv_tokens + s.k_row + j) * p.num_heads_kv + head_kv;
    for (int64_t d = 0; d < p.head_dim_v; ++d)
      truth_v_.add(row_k * p.head_dim_v + d, prob * row.kept[at] * number(params.dout, at_dout + d), step());
    for (int64_t d = 0; d < p.head_dim; ++d) {
      const double q = number(p.q, at_q + d), k = number(p.k, at_k + d);
      truth_k_.add(row_k * p.head_dim + d, ds * q, step(), error * std::fabs(q));
      truth_q_.add(row_q + d, ds * k, step(), error * std::fabs(k));
    }
  }
}

}  // namespace flashspark::emulator
