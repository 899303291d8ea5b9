#include "cases/backward.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cases/random.hpp"
#include "problem.hpp"

namespace flashspark::cases {
namespace {

constexpr int kPoison = 0xff;  // NaN in every floating-point type here

Case prepared(const Case &spec) {
  Case c = spec;
  c.out_dtype = c.q_dtype;
  c.lse = true;
  return c;
}

size_t lse_floats(const flashspark_attention_params &p) {
  const Extents e = extents_of(p);
  if (e.q_batch == 0 || e.q_tokens == 0) return 0;
  return static_cast<size_t>((e.q_batch - 1) * p.lse_batch_stride + (p.num_heads_q - 1) * p.lse_head_stride +
                             (e.q_tokens - 1) * p.lse_token_stride + 1);
}

// Bytes from the first to past the last element of a tensor with positive strides.
size_t bytes_of(const flashspark_tensor &t, int64_t batch, int64_t tokens, int64_t heads, int64_t width) {
  if (batch == 0 || tokens == 0) return 0;
  const int64_t elements =
      (batch - 1) * t.batch_stride + (tokens - 1) * t.token_stride + (heads - 1) * t.head_stride + width;
  return static_cast<size_t>(elements) * flashspark_dtype_size(t.dtype);
}

}  // namespace

BackwardProblem::BackwardProblem(const Case &spec, const char *forward_by) : forward(prepared(spec)) {
  forward.params.output_scale = nullptr;
  forward.poison();
  forward.launch(forward_by, 0);
  forward.params.implementation = nullptr;
  flashspark_attention_backward_params_init(&params);
  const flashspark_attention_params &f = params.forward = forward.params;
  const Extents e = extents_of(f);
  dout_ = Buffer(bytes_of(f.out, e.q_batch, e.q_tokens, f.num_heads_q, f.head_dim_v));
  params.dout = f.out, params.dout.data = dout_.data();
  dlse_ = Buffer(lse_floats(f) * sizeof(float));
  params.dlse = dlse_.as<float>();
  dq_ = Buffer(bytes_of(f.q, e.q_batch, e.q_tokens, f.num_heads_q, f.head_dim));
  params.dq = f.q, params.dq.data = dq_.data();
  const bool packed = forward.spec().packed_kv;
  dk_ = Buffer(bytes_of(f.k, e.kv_batch, e.kv_tokens, f.num_heads_kv, f.head_dim + (packed ? f.head_dim_v : 0)));
  params.dk = f.k, params.dk.data = dk_.data();
  if (!packed) dv_ = Buffer(bytes_of(f.v, e.kv_batch, e.kv_tokens, f.num_heads_kv, f.head_dim_v));
  params.dv = f.v;
  params.dv.data =
      packed ? dk_.data() + f.head_dim * static_cast<int64_t>(flashspark_dtype_size(f.k.dtype)) : dv_.data();
  if (f.sinks != nullptr) {
    dsinks_ = Buffer(static_cast<size_t>(f.num_heads_q) * sizeof(float));
    params.dsinks = dsinks_.as<float>();
  }
  if (f.rel_logits != nullptr) {
    drel_ =
        Buffer(bytes_of(as_rel_tensor(f, nullptr, FLASHSPARK_FLOAT32), 1, rel_tokens(f), f.num_heads_q, f.rel_extent));
    params.drel_logits = drel_.as<float>();
  }
  if (f.alibi_slopes != nullptr) {
    const int64_t sets = f.alibi_batch_stride != 0 ? f.num_seqs : 1;
    dalibi_ = Buffer(static_cast<size_t>(sets * f.num_heads_q) * sizeof(float));
    params.dalibi_slopes = dalibi_.as<float>();
  }
  fill();
}

int64_t BackwardProblem::q_at(const flashspark_tensor &t, int64_t b, int64_t i, int64_t h) const {
  return q_offset(params.forward, t, sequence(params.forward, b), i, h);
}

int64_t BackwardProblem::k_at(const flashspark_tensor &t, int64_t b, int64_t j, int64_t h) const {
  return kv_offset(params.forward, t, sequence(params.forward, b), j, h);
}

// Rows out of use keep the poison.
void BackwardProblem::fill() {
  const Case &spec = forward.spec();
  for (int64_t b = 0; b < params.forward.num_seqs; ++b) {
    for (int64_t i = 0; i < forward.seqlen_q(b); ++i) {
      for (int64_t h = 0; h < spec.heads_q; ++h) {
        Random random(spec.seed, 'g', b, i, h);
        for (int64_t d = 0; d < spec.head_dim_v; ++d) {
          store(params.dout.dtype, params.dout.data, q_at(params.dout, b, i, h) + d,
                static_cast<float>(random.normal()));
        }
        dlse_.as<float>()[lse_offset(params.forward, sequence(params.forward, b), i, h)] =
            static_cast<float>(random.normal());
      }
    }
  }
}

double BackwardProblem::largest_dout(int64_t b, int64_t i, int64_t h) const {
  double largest = 0;
  for (int64_t d = 0; d < forward.spec().head_dim_v; ++d) {
    const double x = load(params.dout.dtype, params.dout.data, q_at(params.dout, b, i, h) + d);
    largest = std::max(largest, std::fabs(x));
  }
  return largest;
}

double BackwardProblem::norm_dout(int64_t b, int64_t i, int64_t h) const {
  double squares = 0;
  for (int64_t d = 0; d < forward.spec().head_dim_v; ++d) {
    const double x = load(params.dout.dtype, params.dout.data, q_at(params.dout, b, i, h) + d);
    squares += x * x;
  }
  return std::sqrt(squares);
}

double BackwardProblem::dlse(int64_t b, int64_t i, int64_t h) const {
  if (params.dlse == nullptr) return 0;
  return std::fabs(params.dlse[lse_offset(params.forward, sequence(params.forward, b), i, h)]);
}

// dv for dout = 1, without dropout.
std::vector<float> BackwardProblem::key_mass() {
  const flashspark_attention_backward_params saved = params;
  const Case &spec = forward.spec();
  Buffer ones(dout_.size());
  params.dout.data = ones.data();
  for (int64_t b = 0; b < params.forward.num_seqs; ++b) {
    for (int64_t i = 0; i < forward.seqlen_q(b); ++i) {
      for (int64_t h = 0; h < spec.heads_q; ++h) {
        for (int64_t d = 0; d < spec.head_dim_v; ++d)
          store(params.dout.dtype, ones.data(), q_at(params.dout, b, i, h) + d, 1.0f);
      }
    }
  }
  params.dq.data = params.dk.data = nullptr;
  params.dlse = params.dsinks = params.drel_logits = params.dalibi_slopes = nullptr;
  params.dtensors = nullptr;
  params.forward.dropout_p = 0;
  if (params.dv.data == nullptr) params.dv.data = dv_.data();
  const Gradients g = run("cpu-reference");
  params = saved;
  std::vector<float> mass;
  for (size_t n = 0; n < g.dv.size(); n += static_cast<size_t>(spec.head_dim_v)) mass.push_back(g.dv[n]);
  return mass;
}

flashspark_status BackwardProblem::launch(const char *implementation, int num_threads) {
  params.forward.implementation = implementation;
  params.forward.num_threads = num_threads;
  size_t needed = 0;
  if (const auto status = flashspark_attention_backward_workspace_size(&params, &needed)) return status;
  if (needed > workspace_.size()) workspace_ = Buffer(needed);
  params.workspace = needed > 0 ? workspace_.data() : nullptr;
  params.workspace_size = needed;
  return flashspark_attention_backward(&params);
}

void BackwardProblem::check_gaps(const Buffer &buffer, const std::vector<bool> &written, const char *name,
                                 Gradients &to) const {
  const size_t size = written.empty() ? 1 : buffer.size() / written.size();
  for (size_t n = 0; n < buffer.size() && to.trespass.empty(); ++n) {
    if (!written[n / size] && buffer.data()[n] != std::byte{kPoison})
      to.trespass = std::string(name) + ": a gap at byte " + std::to_string(n) + " was written";
  }
}

// The rows in use of a gradient like q or k; those out of use must be 0.
void BackwardProblem::read(const Buffer &buffer, const flashspark_tensor &t, bool of_queries, int64_t width,
                           Gradients &to, std::vector<float> &values) const {
  const flashspark_attention_params &f = params.forward;
  const Extents e = extents_of(f);
  const int64_t heads = of_queries ? f.num_heads_q : f.num_heads_kv;
  const int64_t blocks = of_queries ? e.q_batch : e.kv_batch, tokens = of_queries ? e.q_tokens : e.kv_tokens;
  std::vector<bool> used(static_cast<size_t>(blocks * tokens));
  for (int64_t b = 0; b < f.num_seqs; ++b) {
    const Sequence s = sequence(f, b);
    const int64_t rows = of_queries ? s.seqlen_q : s.seqlen_q == 0 ? 0 : s.seqlen_k;
    for (int64_t i = 0; i < rows; ++i) {
      const bool varlen = of_queries ? is_varlen_q(f) : is_varlen_k(f);
      used[static_cast<size_t>((varlen ? 0 : b * tokens) + (of_queries ? s.q_row : s.k_row) + i)] = true;
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = of_queries ? q_at(t, b, i, h) : k_at(t, b, i, h);
        for (int64_t d = 0; d < width; ++d) values.push_back(load(t.dtype, t.data, at + d));
      }
    }
  }
  const auto first =
      (static_cast<std::byte *>(t.data) - buffer.data()) / static_cast<int64_t>(flashspark_dtype_size(t.dtype));
  std::vector<bool> written(buffer.size() / flashspark_dtype_size(t.dtype));
  for (int64_t row = 0; row < blocks * tokens; ++row) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = row / tokens * t.batch_stride + row % tokens * t.token_stride + h * t.head_stride;
      for (int64_t d = 0; d < width; ++d) {
        written[static_cast<size_t>(first + at + d)] = true;
        if (!used[static_cast<size_t>(row)] && load(t.dtype, t.data, at + d) != 0)
          to.trespass = "row " + std::to_string(row) + " is not in use, and not 0";
      }
    }
  }
  if (!forward.spec().packed_kv || of_queries) check_gaps(buffer, written, of_queries ? "dq" : "dk or dv", to);
}

void BackwardProblem::poison() {
  for (const std::span<std::byte> block : written_memory()) {
    if (!block.empty()) std::memset(block.data(), kPoison, block.size());
  }
}

std::vector<std::span<std::byte>> BackwardProblem::written_memory() {
  std::vector<std::span<std::byte>> blocks;
  for (const Buffer *buffer : {&dq_, &dk_, &dv_, &dsinks_, &drel_, &dalibi_})
    blocks.emplace_back(buffer->data(), buffer->size());
  return blocks;
}

std::vector<std::span<std::byte>> BackwardProblem::memory() {
  std::vector<std::span<std::byte>> blocks = forward.memory();
  for (const std::span<std::byte> block : written_memory()) blocks.push_back(block);
  for (const Buffer *buffer : {&dout_, &dlse_}) blocks.emplace_back(buffer->data(), buffer->size());
  return blocks;
}

Gradients BackwardProblem::run(const char *implementation, int num_threads) {
  poison();
  const flashspark_status status = launch(implementation, num_threads);
  if (status == FLASHSPARK_OK) return result();
  Gradients g;
  g.status = status;
  g.error = flashspark_last_error();
  return g;
}

Gradients BackwardProblem::result() const {
  Gradients g;
  const flashspark_attention_params &f = params.forward;
  if (params.dq.data != nullptr) read(dq_, params.dq, true, f.head_dim, g, g.dq);
  if (params.dk.data != nullptr) read(dk_, params.dk, false, f.head_dim, g, g.dk);
  if (params.dv.data != nullptr) read(forward.spec().packed_kv ? dk_ : dv_, params.dv, false, f.head_dim_v, g, g.dv);
  const auto all = [](const Buffer &buffer, const float *wanted) {
    const float *x = buffer.as<float>();
    return wanted != nullptr ? std::vector<float>(x, x + buffer.size() / sizeof(float)) : std::vector<float>();
  };
  g.dsinks = all(dsinks_, params.dsinks);
  g.dalibi = all(dalibi_, params.dalibi_slopes);
  for (int64_t b = 0; params.drel_logits != nullptr && b < f.num_seqs; ++b) {
    for (int64_t i = 0; i < forward.seqlen_q(b); ++i) {
      for (int64_t h = 0; h < f.num_heads_q; ++h) {
        const int64_t row = token_row(f, sequence(f, b), i);
        const float *from = params.drel_logits + row * f.rel_token_stride + h * f.rel_head_stride;
        g.drel.insert(g.drel.end(), from, from + f.rel_extent);
      }
    }
  }
  return g;
}

}  // namespace flashspark::cases
