// What rounding the factors of the gradients' products can move: the sums of the products' terms without their signs.
#include <cmath>
#include <utility>
#include <vector>

#include "cases/backward.hpp"
#include "cpu/reference_scores.hpp"
#include "cpu/thread_pool.hpp"
#include "dropout.hpp"

namespace flashspark::cases {
namespace {

class Magnitudes {
 public:
  explicit Magnitudes(const BackwardProblem &problem)
      : p_(problem.params),
        f_(p_.forward),
        dropout_(dropout_of(f_)),
        group_(f_.num_heads_q / f_.num_heads_kv),
        kept_(1 / (1 - double{f_.dropout_p})) {
    for (int64_t b = 0; b < f_.num_seqs; ++b) {
      const Sequence s = sequence(f_, b);
      if (s.seqlen_q == 0) continue;
      rows_ += s.seqlen_q, keys_ += s.seqlen_k;
    }
    sums_.dq.resize(static_cast<size_t>(rows_ * f_.num_heads_q * f_.head_dim));
    sums_.dk.resize(static_cast<size_t>(keys_ * f_.num_heads_kv * f_.head_dim));
    sums_.dv.resize(static_cast<size_t>(keys_ * f_.num_heads_kv * f_.head_dim_v));
  }

  Gradients run() {
    cpu::parallel_for(0, f_.num_heads_kv, [&](int64_t h_kv) { add_head(h_kv); });
    return std::move(sums_);
  }

 private:
  void add_head(int64_t h_kv) {
    int64_t row = 0, first_key = 0;
    for (int64_t b = 0; b < f_.num_seqs; ++b) {
      const Sequence s = sequence(f_, b);
      if (s.seqlen_q == 0) continue;
      for (int64_t h = h_kv * group_; h < (h_kv + 1) * group_; ++h) {
        for (int64_t i = 0; i < s.seqlen_q; ++i) add_row(s, i, h, row + i, first_key);
      }
      row += s.seqlen_q, first_key += s.seqlen_k;
    }
  }

  void add_row(const Sequence &s, int64_t i, int64_t h, int64_t row, int64_t first_key) {
    const double lse = f_.lse[lse_offset(f_, s, i, h)];
    if (std::isinf(lse)) return;
    const int64_t at_dout = q_offset(f_, p_.dout, s, i, h), at_q = q_offset(f_, f_.q, s, i, h), h_kv = h / group_;
    double common = -cpu::dot(f_.out, q_offset(f_, f_.out, s, i, h), p_.dout, at_dout, f_.head_dim_v);
    if (p_.dlse != nullptr) common += p_.dlse[lse_offset(f_, s, i, h)];
    for (int64_t j = 0; j < s.seqlen_k; ++j) {
      if (!cpu::keep(f_, s, i, j)) continue;
      const double cap = cpu::capped(f_, f_.softmax_scale * cpu::query_key(f_, s, i, j, h));
      const double p = std::exp(cap + cpu::bias(f_, s, i, j, h) - lse);
      const double z = dropout_.any() && dropout_.drops(s.index, h, i, j) ? 0 : kept_;
      const int64_t at_v = kv_offset(f_, f_.v, s, j, h_kv), at_k = kv_offset(f_, f_.k, s, j, h_kv);
      double ds = std::fabs(p * (z * cpu::dot(p_.dout, at_dout, f_.v, at_v, f_.head_dim_v) + common));
      if (f_.softcap > 0) ds *= 1 - std::pow(cap / f_.softcap, 2);
      ds *= f_.softmax_scale;
      const int64_t key = (first_key + j) * f_.num_heads_kv + h_kv;
      add(sums_.dq, row * f_.num_heads_q + h, ds, f_.k, at_k, f_.head_dim);
      add(sums_.dk, key, ds, f_.q, at_q, f_.head_dim);
      add(sums_.dv, key, p * z, p_.dout, at_dout, f_.head_dim_v);
    }
  }

  static void add(std::vector<float> &sums, int64_t row, double factor, const flashspark_tensor &t, int64_t at,
                  int64_t width) {
    float *const to = sums.data() + row * width;
    with_elements(t.data, t.dtype, [&](auto element) {
      for (int64_t d = 0; d < width; ++d) to[d] += static_cast<float>(factor) * std::fabs(element(at + d));
    });
  }

  const BackwardParams &p_;
  const Params &f_;
  const Dropout dropout_;
  const int64_t group_;
  const double kept_;
  int64_t rows_ = 0, keys_ = 0;
  Gradients sums_;
};

}  // namespace

Gradients magnitudes(const BackwardProblem &problem) {
  return Magnitudes(problem).run();
}

}  // namespace flashspark::cases
