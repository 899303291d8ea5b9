// How far gradients may be from the oracle's.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "cases/backward.hpp"
#include "problem.hpp"

namespace flashspark::cases {
namespace {

// The bound. Both take the same out and lse, and each rounds to the gradient's dtype once:
//
//   2 (unit_roundoff * |ref| + half the smallest positive number).
//
// Before that an implementation works in float32. An error e in a score changes its probability by the factor 1 + e;
// error_bound() says how large e is (`relative`), and it covers sums, too. Then, with z at most 1 / (1 - dropout_p),
//
//   |dout_i| z |v_j| + |dout_i| |out_i| + |dlse_i|  =: M_i      bounds what p_ij is multiplied with to make ds_ij,
//   sum_i p_ij                                      =: mass_j   bounds what a key gets of all rows' errors:
//
//   dq_i: e scale M_i max|k|     dk_j: e scale mass_j max M max|q|     dv_j: e z mass_j max|dout|
//   drel: e M_i                  sinks: the sum over rows of e p_sink M, dalibi: the same times the largest distance;
//                                both as a random walk, since rows' errors do not know of each other
//
// A probability below 2^-126 is 0 in float32: for every row a key may lose as much mass, absolutely.
//
// Tensor cores take P and dS in 16 bits, so that a term of the three products is off by a roundoff of q's dtype, or by
// two where warps hand P to each other before dS is made of it. magnitudes() says what that moves. They also cut sums
// off instead of rounding them. CPUs that multiply bfloat16 in pairs take P and dS in 16 bits, too, and round sums.
//
// mass_j comes of the oracle, as dv for dout = 1. A key too many in a row of n changes dv by |dout| / n, and the others
// in proportion: outside the bound for n < 10^4.
constexpr double kTensorCores = 4, kRoundings = 2;

struct RowFacts {
  double relative, product;  // e and M_i
  double sink = 0;           // p of the sink
};

class Comparer {
 public:
  Comparer(BackwardProblem &problem, const Gradients &expected, const Gradients *magnitudes, bool cut_sums)
      : problem_(problem),
        f_(problem.params.forward),
        spec_(problem.forward.spec()),
        expected_(expected),
        magnitudes_(magnitudes),
        cut_sums_(magnitudes != nullptr && cut_sums) {
    roundoff_ = f_.q.dtype == FLASHSPARK_FLOAT16 ? 0x1p-11 : f_.q.dtype == FLASHSPARK_BFLOAT16 ? 0x1p-8 : 0x1p-24;
    smallest_ = f_.q.dtype == FLASHSPARK_FLOAT16 ? 0x1p-25 : f_.q.dtype == FLASHSPARK_BFLOAT16 ? 0x1p-134 : 0x1p-150;
    kept_ = 1 / (1 - double{f_.dropout_p});
    find_rows();
    mass_ = problem.key_mass();
  }

  GradientComparison run(const Gradients &got) {
    compare_queries(got);
    compare_keys(got);
    compare_heads(got);
    if (elements_ > 0) result_.rms_error = std::sqrt(squares_ / static_cast<double>(elements_));
    return result_;
  }

 private:
  double largest(Role role, int64_t b, int64_t rows, int64_t h, int64_t width) const {
    double most = 0;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < width; ++d)
        most = std::max(most, std::fabs(double{problem_.forward.get(role, b, i, h, d)}));
    }
    return most;
  }

  void find_rows() {
    const int64_t group = spec_.heads_q / spec_.heads_kv;
    for (int64_t b = 0; b < f_.num_seqs; ++b) {
      std::vector<double> norms(static_cast<size_t>(spec_.heads_kv));  // of the longest v
      for (int64_t j = 0; j < problem_.forward.seqlen_k(b); ++j) {
        for (int64_t h = 0; h < spec_.heads_kv; ++h) {
          double squares = 0;
          for (int64_t d = 0; d < spec_.head_dim_v; ++d) {
            const double x = problem_.forward.get(Role::kV, b, j, h, d);
            squares += x * x;
          }
          norms[static_cast<size_t>(h)] = std::max(norms[static_cast<size_t>(h)], std::sqrt(squares));
        }
      }
      for (int64_t i = 0; i < problem_.forward.seqlen_q(b); ++i) {
        for (int64_t h = 0; h < spec_.heads_q; ++h) {
          RowFacts row{};
          row.relative = error_bound(problem_.forward, b, i, h).relative * (cut_sums_ ? kTensorCores : 1);
          // |out| <= kept * the longest v.
          row.product =
              2 * kept_ * problem_.norm_dout(b, i, h) * norms[static_cast<size_t>(h / group)] + problem_.dlse(b, i, h);
          if (f_.sinks != nullptr) {
            const double lse = f_.lse[lse_offset(f_, sequence(f_, b), i, h)];
            row.sink = std::exp(load(f_.sinks_dtype, f_.sinks, h) - lse);
          }
          rows_.push_back(row);
        }
      }
    }
  }

  // Element number n of a gradient of rows, whose rounding error before the last one is at most `before`, and more
  // where the factors of its products are rounded.
  void check_row(const char *name, std::vector<float> Gradients::*field, const Gradients &got, size_t n,
                 double before) {
    if (magnitudes_ != nullptr) before += kRoundings * roundoff_ * double{(magnitudes_->*field)[n]};
    check(name, got.*field, expected_.*field, n, before, roundoff_, smallest_);
  }

  // Element number n of a gradient whose rounding error before the last one is at most `before`.
  void check(const char *name, const std::vector<float> &got, const std::vector<float> &expected, size_t n,
             double before, double roundoff, double smallest) {
    const double ref = expected[n], x = got[n];
    const double limit = 2 * (roundoff * (std::fabs(ref) + before) + smallest) + before;
    // The oracle gives neither NaN nor infinity here: if it does, it has read padding.
    const bool finite = std::isfinite(ref) && std::isfinite(x);
    const double error = finite ? std::fabs(x - ref) : kInfinity, ratio = error / limit;
    result_.max_error = std::max(result_.max_error, error);
    squares_ += error * error, ++elements_;
    if (ratio <= result_.ratio) return;
    result_.ratio = ratio;
    result_.bound = limit;
    char text[160];
    std::snprintf(text, sizeof text, "%s[%zu]: %g is not %g within %g", name, n, x, ref, limit);
    result_.worst = text;
  }
  bool sizes_agree(const char *name, const std::vector<float> &got, const std::vector<float> &expected) {
    if (got.size() == expected.size()) return true;
    result_ = {kInfinity, std::string(name) + " has another size"};
    return false;
  }

  void compare_queries(const Gradients &got) {
    if (!sizes_agree("dq", got.dq, expected_.dq) || !sizes_agree("drel", got.drel, expected_.drel)) return;
    const int64_t group = spec_.heads_q / spec_.heads_kv, d = spec_.head_dim;
    size_t row = 0;
    for (int64_t b = 0; b < f_.num_seqs; ++b) {
      std::vector<double> keys(static_cast<size_t>(spec_.heads_kv));
      for (int64_t h = 0; h < spec_.heads_kv; ++h)
        keys[static_cast<size_t>(h)] = largest(Role::kK, b, problem_.forward.seqlen_k(b), h, d);
      for (int64_t r = 0; r < problem_.forward.seqlen_q(b) * spec_.heads_q; ++r, ++row) {
        const double of_score = rows_[row].relative * rows_[row].product;
        const double before = of_score * f_.softmax_scale * keys[static_cast<size_t>(r % spec_.heads_q / group)];
        for (int64_t x = 0; x < d && !got.dq.empty(); ++x)
          check_row("dq", &Gradients::dq, got, row * static_cast<size_t>(d) + static_cast<size_t>(x), before);
        for (int64_t x = 0; x < f_.rel_extent && !got.drel.empty(); ++x)
          check("drel", got.drel, expected_.drel, row * static_cast<size_t>(f_.rel_extent) + static_cast<size_t>(x),
                of_score, 0x1p-24, 0x1p-150);
      }
    }
  }

  void compare_keys(const Gradients &got) {
    if (!sizes_agree("dk", got.dk, expected_.dk) || !sizes_agree("dv", got.dv, expected_.dv)) return;
    const int64_t group = spec_.heads_q / spec_.heads_kv, d = spec_.head_dim, dv = spec_.head_dim_v;
    size_t row = 0;
    for (int64_t b = 0; b < f_.num_seqs; ++b) {
      const int64_t tq = problem_.forward.seqlen_q(b);
      std::vector<double> of_k, of_v, lost_k, lost_v;  // errors for a mass of 1, and of what is lost
      for (int64_t h_kv = 0; h_kv < spec_.heads_kv; ++h_kv) {
        double relative = 0, product = 0, q = 0, dout = 0;
        for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
          q = std::max(q, largest(Role::kQ, b, tq, h, d));
          for (int64_t i = 0; i < tq; ++i) {
            const RowFacts &facts = rows_[static_cast<size_t>((problem_.forward.row_begin(b) + i) * spec_.heads_q + h)];
            relative = std::max(relative, facts.relative);
            product = std::max(product, facts.product);
            dout = std::max(dout, problem_.largest_dout(b, i, h));
          }
        }
        const double lost = 0x1p-126 * static_cast<double>(tq * group);
        lost_k.push_back(lost * f_.softmax_scale * product * q);
        lost_v.push_back(lost * kept_ * dout);
        of_k.push_back(relative * f_.softmax_scale * product * q);
        of_v.push_back(relative * kept_ * dout);
      }
      for (int64_t r = 0; tq > 0 && r < problem_.forward.seqlen_k(b) * spec_.heads_kv; ++r, ++row) {
        const auto h = static_cast<size_t>(r % spec_.heads_kv);
        const double mass = mass_[row];
        for (int64_t x = 0; x < d && !got.dk.empty(); ++x)
          check_row("dk", &Gradients::dk, got, row * static_cast<size_t>(d) + static_cast<size_t>(x),
                    mass * of_k[h] + lost_k[h]);
        for (int64_t x = 0; x < dv && !got.dv.empty(); ++x)
          check_row("dv", &Gradients::dv, got, row * static_cast<size_t>(dv) + static_cast<size_t>(x),
                    mass * of_v[h] + lost_v[h]);
      }
    }
  }

  // Sums over rows.
  void compare_heads(const Gradients &got) {
    if (!sizes_agree("dsinks", got.dsinks, expected_.dsinks) || !sizes_agree("dalibi", got.dalibi, expected_.dalibi))
      return;
    std::vector<double> sinks(got.dsinks.size()), slopes(got.dalibi.size());  // squares
    size_t row = 0;
    for (int64_t b = 0; b < f_.num_seqs; ++b) {
      const int64_t distance = std::max(problem_.forward.seqlen_k(b), problem_.forward.seqlen_q(b));
      for (int64_t r = 0; r < problem_.forward.seqlen_q(b) * spec_.heads_q; ++r, ++row) {
        const double error = rows_[row].relative * rows_[row].product;
        const auto h = static_cast<size_t>(r % spec_.heads_q);
        const size_t slope = h + static_cast<size_t>(f_.alibi_batch_stride != 0 ? b * spec_.heads_q : 0);
        if (!sinks.empty()) sinks[h] += std::pow(error * rows_[row].sink, 2);
        if (!slopes.empty()) slopes[slope] += std::pow(error * static_cast<double>(distance), 2);
      }
    }
    for (size_t n = 0; n < sinks.size(); ++n)
      check("dsinks", got.dsinks, expected_.dsinks, n, std::sqrt(sinks[n]), 0x1p-24, 0x1p-150);
    for (size_t n = 0; n < slopes.size(); ++n)
      check("dalibi", got.dalibi, expected_.dalibi, n, std::sqrt(slopes[n]), 0x1p-24, 0x1p-150);
  }

  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  BackwardProblem &problem_;
  const flashspark_attention_params &f_;
  const Case &spec_;
  const Gradients &expected_;
  const Gradients *magnitudes_;
  const bool cut_sums_;
  double squares_ = 0;  // of errors
  size_t elements_ = 0;
  double roundoff_, smallest_, kept_;
  std::vector<RowFacts> rows_;
  std::vector<float> mass_;  // (keys, Hkv)
  GradientComparison result_;
};

}  // namespace

GradientComparison compare(BackwardProblem &problem, const Gradients &got, const Gradients &expected,
                           const Gradients *magnitudes, bool cut_sums) {
  for (const Gradients *each : {&got, &expected}) {
    if (each->status != FLASHSPARK_OK) return {std::numeric_limits<double>::infinity(), each->error};
    if (!each->trespass.empty()) return {std::numeric_limits<double>::infinity(), each->trespass};
  }
  return Comparer(problem, expected, magnitudes, cut_sums).run(got);
}

GradientComparison compare_of(const std::string &implementation, BackwardProblem &problem, const Gradients &got,
                              const Gradients &expected) {
  const bool tensor_cores = implementation == "cuda";
  const bool in_pairs = implementation == "cpu-engine" && problem.params.forward.q.dtype == FLASHSPARK_BFLOAT16 &&
                        std::string(flashspark_cpu_target()) == "AVX-512-BF16";
  if (!tensor_cores && !in_pairs) return compare(problem, got, expected);
  const Gradients most = magnitudes(problem);
  return compare(problem, got, expected, &most, tensor_cores);
}

}  // namespace flashspark::cases
