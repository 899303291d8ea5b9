// The oracle's backward pass: the formula in flashspark.h, one probability at a time, from out and lse as they are
// given. A thread computes a KV head with its query heads, row by row, so that every sum has one order.
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/functions.hpp"
#include "cpu/reference.hpp"
#include "cpu/reference_scores.hpp"
#include "cpu/thread_pool.hpp"
#include "dropout.hpp"
#include "dtype.hpp"

namespace flashspark::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A gradient of rows that tokens own; 0 everywhere at first.
class RowGradient {
 public:
  RowGradient(const flashspark_tensor &to, int64_t batch, int64_t tokens, int64_t heads, int64_t width)
      : to_(to), width_(width) {
    if (to.data == nullptr) return;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t at = b * to.batch_stride + t * to.token_stride + h * to.head_stride;
          for (int64_t d = 0; d < width; ++d) store_from_float(to.data, at + d, to.dtype, 0.0f);
        }
      }
    }
  }
  // offset(tensor): where the row begins; not asked where the gradient is not wanted, whose strides may be anything.
  template <class Offset>
  void set(Offset &&offset, const double *row) const {
    if (to_.data == nullptr) return;
    const int64_t at = offset(to_);
    for (int64_t d = 0; d < width_; ++d) store_from_float(to_.data, at + d, to_.dtype, static_cast<float>(row[d]));
  }

 private:
  const flashspark_tensor &to_;
  int64_t width_;
};

// Gradients of captured tensors as doubles, in row-major order.
class CapturedGradients {
 public:
  explicit CapturedGradients(const BackwardParams &p) : p_(p) {
    for (int32_t n = 0; p.dtensors != nullptr && n < p.forward.score_mod.num_tensors; ++n) {
      const flashspark_captured_tensor &t = p.forward.score_mod.tensors[n];
      size_t size = p.dtensors[n].data != nullptr ? 1 : 0;
      for (int32_t d = 0; d < t.rank; ++d) size *= static_cast<size_t>(t.shape[d]);
      sums_.emplace_back(size);
    }
  }
  bool any() const {
    for (const std::vector<double> &sum : sums_) {
      if (!sum.empty()) return true;
    }
    return false;
  }

  // Adds what score_mod's loads for this score get; ds: the gradient of the modified score, `score`: what it was
  // before.
  void add(const graph::Bindings &bindings, const graph::Row &row, int32_t key, double score, double ds) {
    const ScoreDerivative &derivative = p_.forward.score_mod.mod->derivative();
    for (size_t n = 0; n < derivative.function.loads.size(); ++n) {
      const auto tensor = static_cast<size_t>(derivative.function.loads[n].tensor);
      if (tensor >= sums_.size() || sums_[tensor].empty()) continue;
      const graph::Graph &place = derivative.places[n];
      const flashspark_captured_tensor &t = p_.forward.score_mod.tensors[tensor];
      int64_t at = 0;
      for (int32_t d = 0; d < t.rank; ++d) {
        int64_t index = graph::evaluate(place, bindings, row, key, score, d).integer;
        if (index < 0) index += t.shape[d];
        at = at * t.shape[d] + std::clamp<int64_t>(index, 0, t.shape[d] - 1);
      }
      const double slope =
          graph::evaluate(derivative.function.graph, bindings, row, key, score, 1 + static_cast<int32_t>(n)).value;
      sums_[tensor][static_cast<size_t>(at)] += ds * slope;
    }
  }

  void store() const {
    for (size_t n = 0; n < sums_.size(); ++n) {
      const flashspark_captured_tensor &t = p_.forward.score_mod.tensors[n];
      for (size_t flat = 0; flat < sums_[n].size(); ++flat) {
        auto left = static_cast<int64_t>(flat);
        int64_t at = 0;
        for (int32_t d = t.rank - 1; d >= 0; --d) {
          at += left % t.shape[d] * p_.dtensors[n].strides[d];
          left /= t.shape[d];
        }
        p_.dtensors[n].data[at] = static_cast<float>(sums_[n][flat]);
      }
    }
  }

 private:
  const BackwardParams &p_;
  std::vector<std::vector<double>> sums_;
};

class ReferenceBackward {
 public:
  explicit ReferenceBackward(const BackwardParams &p)
      : p_(p),
        f_(p.forward),
        functions_(f_),
        dropout_(dropout_of(f_)),
        captured_(p),
        dq_(p.dq, extents_of(f_).q_batch, extents_of(f_).q_tokens, f_.num_heads_q, f_.head_dim),
        dk_(p.dk, extents_of(f_).kv_batch, extents_of(f_).kv_tokens, f_.num_heads_kv, f_.head_dim),
        dv_(p.dv, extents_of(f_).kv_batch, extents_of(f_).kv_tokens, f_.num_heads_kv, f_.head_dim_v),
        group_(f_.num_heads_q / f_.num_heads_kv) {}

  void run() {
    clear_rel();
    sinks_.resize(static_cast<size_t>(f_.num_heads_q));
    slopes_.resize(static_cast<size_t>(f_.num_heads_q * (per_sequence_slopes() ? f_.num_seqs : 1)));
    // All heads add to captured tensors.
    parallel_for(captured_.any() ? 1 : f_.num_threads, f_.num_heads_kv, [&](int64_t h_kv) {
      for (int64_t b = 0; b < f_.num_seqs; ++b) run_head(sequence(f_, b), h_kv);
    });
    functions_.errors().throw_first();
    store(sinks_, p_.dsinks);
    store(slopes_, p_.dalibi_slopes);
    captured_.store();
  }

 private:
  struct Sums {
    std::vector<double> dq, dk, dv;
  };

  bool per_sequence_slopes() const { return f_.alibi_slopes != nullptr && f_.alibi_batch_stride != 0; }
  int64_t rel_at(const Sequence &s, int64_t i, int64_t h, int64_t distance) const {
    return token_row(f_, s, i) * f_.rel_token_stride + h * f_.rel_head_stride + distance;
  }

  static void store(const std::vector<double> &sums, float *to) {
    for (size_t n = 0; to != nullptr && n < sums.size(); ++n) to[n] = static_cast<float>(sums[n]);
  }

  void clear_rel() const {
    if (p_.drel_logits == nullptr) return;
    for (int64_t t = 0; t < rel_tokens(f_); ++t) {
      for (int64_t h = 0; h < f_.num_heads_q; ++h) {
        for (int64_t n = 0; n < f_.rel_extent; ++n)
          p_.drel_logits[t * f_.rel_token_stride + h * f_.rel_head_stride + n] = 0;
      }
    }
  }

  // KV head h_kv of a sequence.
  void run_head(const Sequence &s, int64_t h_kv) {
    if (s.seqlen_q == 0) return;
    Sums sums;
    sums.dk.resize(static_cast<size_t>(s.seqlen_k * f_.head_dim));
    sums.dv.resize(static_cast<size_t>(s.seqlen_k * f_.head_dim_v));
    for (int64_t h = h_kv * group_; h < (h_kv + 1) * group_; ++h) {
      for (int64_t i = 0; i < s.seqlen_q; ++i) run_row(s, i, h, sums);
    }
    for (int64_t j = 0; j < s.seqlen_k; ++j) {
      const auto offset = [&](const flashspark_tensor &t) { return kv_offset(f_, t, s, j, h_kv); };
      dk_.set(offset, sums.dk.data() + j * f_.head_dim);
      dv_.set(offset, sums.dv.data() + j * f_.head_dim_v);
    }
  }

  void run_row(const Sequence &s, int64_t i, int64_t h, Sums &sums) {
    const int64_t at_out = q_offset(f_, f_.out, s, i, h), at_dout = q_offset(f_, p_.dout, s, i, h);
    const double lse = f_.lse[lse_offset(f_, s, i, h)];
    // The part of ds that is the same for all keys.
    double common = -dot(f_.out, at_out, p_.dout, at_dout, f_.head_dim_v);
    if (p_.dlse != nullptr) common += p_.dlse[lse_offset(f_, s, i, h)];
    sums.dq.assign(static_cast<size_t>(f_.head_dim), 0.0);
    if (lse != -kInfinity) {
      for (int64_t j = 0; j < s.seqlen_k; ++j) {
        if (keep(f_, s, i, j)) run_score(s, i, h, j, lse, common, sums);
      }
      const double sink = f_.sinks != nullptr ? load_as_float(f_.sinks, h, f_.sinks_dtype) : -kInfinity;
      if (sink != -kInfinity) sinks_[static_cast<size_t>(h)] += std::exp(sink - lse) * common;
    }
    dq_.set([&](const flashspark_tensor &t) { return q_offset(f_, t, s, i, h); }, sums.dq.data());
  }

  void run_score(const Sequence &s, int64_t i, int64_t h, int64_t j, double lse, double common, Sums &sums) {
    const int64_t h_kv = h / group_;
    const double scale = f_.softmax_scale, scaled = scale * query_key(f_, s, i, j, h), cap = capped(f_, scaled);
    const double score = cap + bias(f_, s, i, j, h);
    double modified = score;
    if (functions_.any() && !functions_.apply(s, i, h, j, modified)) return;
    const double probability = std::exp(modified - lse);
    if (probability == 0) return;
    const bool dropped = dropout_.any() && dropout_.drops(s.index, h, i, j);
    const double z = dropped ? 0 : 1 / (1 - double{f_.dropout_p});
    const int64_t at_dout = q_offset(f_, p_.dout, s, i, h), v0 = kv_offset(f_, f_.v, s, j, h_kv);
    double ds = probability * ((dropped ? 0 : z * dot(p_.dout, at_dout, f_.v, v0, f_.head_dim_v)) + common);
    if (!dropped) add_row(sums.dv.data() + j * f_.head_dim_v, probability * z, p_.dout, at_dout, f_.head_dim_v);

    if (functions_.has_score()) {
      const graph::Row row = function_row(f_, s, i, h);
      const auto key = static_cast<int32_t>(j);
      const graph::Bindings bindings = functions_.score_bindings();
      captured_.add(bindings, row, key, score, ds);
      ds *= graph::evaluate(f_.score_mod.mod->derivative().function.graph, bindings, row, key, score).value;
    }
    const int64_t distance = s.pos(i) - j;
    if (p_.drel_logits != nullptr && distance >= 0 && distance < f_.rel_extent)
      p_.drel_logits[rel_at(s, i, h, distance)] = static_cast<float>(ds);
    if (f_.alibi_slopes != nullptr)
      slopes_[static_cast<size_t>((per_sequence_slopes() ? s.index * f_.num_heads_q : 0) + h)] -=
          ds * std::fabs(double(distance));
    if (f_.softcap > 0) ds *= 1 - cap / f_.softcap * (cap / f_.softcap);
    const int64_t q0 = q_offset(f_, f_.q, s, i, h), k0 = kv_offset(f_, f_.k, s, j, h_kv);
    add_row(sums.dq.data(), ds * scale, f_.k, k0, f_.head_dim);
    add_row(sums.dk.data() + j * f_.head_dim, ds * scale, f_.q, q0, f_.head_dim);
  }

  const BackwardParams &p_;
  const Params &f_;
  const Functions functions_;
  const Dropout dropout_;
  CapturedGradients captured_;
  RowGradient dq_, dk_, dv_;
  int64_t group_;
  std::vector<double> sinks_, slopes_;
};

}  // namespace

void reference_backward(const BackwardParams &p) {
  ReferenceBackward(p).run();
}

}  // namespace flashspark::cpu
