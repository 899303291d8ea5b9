#include "backward/problem.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <tuple>

#include "backward/postprocess.cuh"
#include "backward/preprocess.cuh"
#include "dropout.hpp"
#include "dtype.hpp"

namespace flashspark::emulator {
namespace {

std::vector<BackwardKernel> &registered() {
  static std::vector<BackwardKernel> kernels;
  return kernels;
}

double element(const flashspark_tensor &t, int64_t batch, int64_t token, int64_t head, int64_t column) {
  return load_as_float(t.data, batch * t.batch_stride + token * t.token_stride + head * t.head_stride + column,
                       t.dtype);
}

}  // namespace

BackwardRegistration::BackwardRegistration(const BackwardKernel &kernel) {
  registered().push_back(kernel);
}
std::span<const BackwardKernel> backward_kernels() {
  std::sort(registered().begin(), registered().end(), [](const BackwardKernel &a, const BackwardKernel &b) {
    return std::tuple(a.instance, a.dtype, a.tiles) < std::tuple(b.instance, b.dtype, b.tiles);
  });
  return registered();
}
std::string name_of(const BackwardKernel &kernel) {
  return std::string(kernel.instance->name) + (kernel.dtype == FLASHSPARK_BFLOAT16 ? "_bf16" : "_fp16") +
         (kernel.tiles == Architecture::sm_120f ? "_sm_120f" : "_sm_90") +
         (kernel.functions != nullptr ? std::string("_") + kernel.functions : "") +
         (kernel.block_sparse ? "_lists" : "");
}

std::string to_string(const BackwardSpec &s) {
  std::string text = "D " + std::to_string(s.head_dim) + "/" + std::to_string(s.head_dim_v) + " heads " +
                     std::to_string(s.heads_q) + "/" + std::to_string(s.heads_kv) + " tokens/keys";
  for (size_t n = 0; n < s.tokens.size(); ++n)
    text += " " + std::to_string(s.tokens[n]) + "/" + std::to_string(s.keys[n]);
  const auto flag = [&](bool value, const char *name) { text += value ? std::string(" ") + name : ""; };
  flag(s.varlen_q, "varlen_q"), flag(s.varlen_k, "varlen_k"), flag(s.unused_rows, "unused_rows");
  flag(s.causal, "causal"), flag(s.causal_per_seq, "causal_per_seq"), flag(s.sinks, "sinks"), flag(s.dlse, "dlse");
  flag(s.heads_first, "heads_first");
  text += " window " + std::to_string(s.window_left) + "," + std::to_string(s.window_right) + " softcap " +
          std::to_string(s.softcap) + " dropout " + std::to_string(s.dropout_p) + " spread " + std::to_string(s.spread);
  if (s.functions) text += to_string(*s.functions);
  return text;
}

flashspark_tensor BackwardProblem::tensor(Guarded<uint16_t> &memory, int64_t batch, int64_t tokens, int64_t heads,
                                          int64_t width) {
  memory = Guarded<uint16_t>(static_cast<size_t>(batch * tokens * heads * width));
  std::fill(memory.begin(), memory.end(), uint16_t{0x7fff});  // NaN
  if (spec_.heads_first) return {memory.data(), tokens * heads * width, width, tokens * width, spec_.dtype, 0};
  return {memory.data(), tokens * heads * width, heads * width, width, spec_.dtype, 0};
}

BackwardProblem::BackwardProblem(const BackwardSpec &spec, uint64_t seed) : spec_(spec) {
  make_memory(seed);
  compute_truth();
}

void BackwardProblem::make_memory(uint64_t seed) {
  flashspark_attention_params &p = params.forward;
  const BackwardSpec &s = spec_;
  p.device = FLASHSPARK_CUDA;
  p.num_seqs = static_cast<int64_t>(s.tokens.size());
  p.num_heads_q = s.heads_q, p.num_heads_kv = s.heads_kv;
  p.head_dim = s.head_dim, p.head_dim_v = s.head_dim_v;
  p.window_left = s.window_left, p.window_right = s.window_right;
  p.causal = s.causal, p.softcap = s.softcap, p.dropout_p = s.dropout_p;
  p.dropout_seed = seed * 77, p.dropout_offset = seed;
  p.softmax_scale = s.spread / std::sqrt(static_cast<float>(s.head_dim));
  const auto lengths = [&](const std::vector<int32_t> &used, bool varlen, Guarded<int32_t> &cu,
                           Guarded<int32_t> &seqused, int64_t &longest, int64_t &total, const int32_t *&offsets,
                           const int32_t *&in_use) {
    const size_t count = used.size();
    const int32_t extra = s.unused_rows ? 5 : 0;
    longest = *std::max_element(used.begin(), used.end()) + extra;
    total = 0;
    bool differ = extra > 0;
    for (const int32_t n : used) differ |= n != used[0];
    if (varlen) {
      // Rows before the first sequence and behind the last one belong to none.
      cu = Guarded<int32_t>(count + 1);
      cu[0] = s.unused_rows ? 3 : 0;
      for (size_t n = 0; n < count; ++n) cu[n + 1] = cu[n] + used[n] + extra;
      total = cu[count] + (s.unused_rows ? 2 : 0);
      offsets = cu.data();
    }
    if (varlen ? extra > 0 : differ) {
      seqused = Guarded<int32_t>(count);
      std::copy(used.begin(), used.end(), seqused.begin());
      in_use = seqused.data();
    }
  };
  lengths(s.tokens, s.varlen_q, cu_q_, used_q_, max_q_, p.total_q, p.cu_seqlens_q, p.seqused_q);
  lengths(s.keys, s.varlen_k, cu_k_, used_k_, max_k_, p.total_k, p.cu_seqlens_k, p.seqused_k);
  p.max_seqlen_q = max_q_, p.max_seqlen_k = max_k_;
  if (s.causal_per_seq) {
    causal_ = Guarded<int32_t>(s.tokens.size());
    for (size_t n = 0; n < s.tokens.size(); ++n) causal_[n] = n % 2 == 0;
    p.causal_per_seq = causal_.data();
  }
  const int64_t batch_q = s.varlen_q ? 1 : p.num_seqs, rows_q = s.varlen_q ? p.total_q : max_q_;
  const int64_t batch_k = s.varlen_k ? 1 : p.num_seqs, rows_k = s.varlen_k ? p.total_k : max_k_;
  p.q = tensor(q_, batch_q, rows_q, s.heads_q, s.head_dim);
  p.out = tensor(out_, batch_q, rows_q, s.heads_q, s.head_dim_v);
  params.dout = tensor(dout_, batch_q, rows_q, s.heads_q, s.head_dim_v);
  p.k = tensor(k_, batch_k, rows_k, s.heads_kv, s.head_dim);
  p.v = tensor(v_, batch_k, rows_k, s.heads_kv, s.head_dim_v);
  if (s.wanted_q) params.dq = tensor(dq_, batch_q, rows_q, s.heads_q, s.head_dim);
  if (s.wanted_k) params.dk = tensor(dk_, batch_k, rows_k, s.heads_kv, s.head_dim);
  if (s.wanted_v) params.dv = tensor(dv_, batch_k, rows_k, s.heads_kv, s.head_dim_v);
  lse_ = Guarded<float>(static_cast<size_t>(batch_q * rows_q * s.heads_q));
  std::fill(lse_.begin(), lse_.end(), NAN);
  p.lse = lse_.data();
  p.lse_batch_stride = rows_q * s.heads_q, p.lse_head_stride = rows_q, p.lse_token_stride = 1;
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal;
  if (s.dlse) {
    dlse_ = Guarded<float>(lse_.size());
    for (float &x : dlse_) x = normal(rng);
    params.dlse = dlse_.data();
  }
  if (s.sinks) {
    sinks_ = Guarded<float>(static_cast<size_t>(s.heads_q));
    dsinks_ = Guarded<float>(static_cast<size_t>(s.heads_q));
    for (float &x : sinks_) x = normal(rng);
    p.sinks = sinks_.data(), p.sinks_dtype = FLASHSPARK_FLOAT32;
    params.dsinks = dsinks_.data();
  }
  // Only what is in use has numbers.
  const auto fill = [&](const flashspark_tensor &t, const std::vector<int32_t> &used, const Guarded<int32_t> &cu,
                        bool varlen, int64_t heads, int64_t width) {
    for (size_t b = 0; b < used.size(); ++b) {
      const int64_t batch = varlen ? 0 : static_cast<int64_t>(b), first = varlen ? cu[b] : 0;
      for (int64_t n = 0; n < used[b]; ++n) {
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t d = 0; d < width; ++d)
            store_from_float(t.data, batch * t.batch_stride + (first + n) * t.token_stride + h * t.head_stride + d,
                             t.dtype, normal(rng));
        }
      }
    }
  };
  fill(p.q, s.tokens, cu_q_, s.varlen_q, s.heads_q, s.head_dim);
  fill(params.dout, s.tokens, cu_q_, s.varlen_q, s.heads_q, s.head_dim_v);
  fill(p.k, s.keys, cu_k_, s.varlen_k, s.heads_kv, s.head_dim);
  fill(p.v, s.keys, cu_k_, s.varlen_k, s.heads_kv, s.head_dim_v);
  if (s.functions) functions_ = std::make_unique<ProblemFunctions>(*s.functions, params, seed);
}

void BackwardProblem::compute_truth() {
  const flashspark_attention_params &p = params.forward;
  const BackwardSpec &s = spec_;
  const int64_t batch_q = s.varlen_q ? 1 : p.num_seqs, rows_q = s.varlen_q ? p.total_q : max_q_;
  const int64_t batch_k = s.varlen_k ? 1 : p.num_seqs, rows_k = s.varlen_k ? p.total_k : max_k_;
  const auto sized = [](Truth &t, int64_t n) {
    t.value.assign(static_cast<size_t>(n), 0.0), t.allowed.assign(static_cast<size_t>(n), 0.0);
  };
  sized(truth_q_, batch_q * rows_q * s.heads_q * s.head_dim);
  sized(truth_k_, batch_k * rows_k * s.heads_kv * s.head_dim);
  sized(truth_v_, batch_k * rows_k * s.heads_kv * s.head_dim_v);
  sized(truth_sinks_, s.heads_q);
  const double step = s.dtype == FLASHSPARK_BFLOAT16 ? 1.0 / 256 : 1.0 / 2048;
  const auto add = [step](Truth &t, int64_t row, int64_t heads, int64_t h, int64_t width, int64_t d, double x,
                          double noise = 0) {
    const auto at = static_cast<size_t>((row * heads + h) * width + d);
    t.value[at] += x, t.allowed[at] += step * std::fabs(x) + noise;
  };
  const Dropout dropout = dropout_of(p);
  const int64_t group = s.heads_q / s.heads_kv;
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    const int64_t tq = s.tokens[static_cast<size_t>(b)], tk = s.keys[static_cast<size_t>(b)];
    const int64_t bq = s.varlen_q ? 0 : b, q0 = s.varlen_q ? cu_q_[static_cast<size_t>(b)] : 0;
    const int64_t bk = s.varlen_k ? 0 : b, k0 = s.varlen_k ? cu_k_[static_cast<size_t>(b)] : 0;
    const bool causal = s.causal_per_seq ? b % 2 == 0 : s.causal;
    for (int64_t h = 0; h < s.heads_q; ++h) {
      for (int64_t i = 0; i < tq; ++i) {
        const int64_t pos = i + tk - tq;
        std::vector<double> score(static_cast<size_t>(tk), -INFINITY), slope(static_cast<size_t>(tk), 1.0);
        std::vector<double> given(static_cast<size_t>(tk));  // to the user's function
        const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
        const graph::Row row{narrow(b), narrow(h), narrow(i), narrow(tq), narrow(tk), narrow(q0), narrow(k0)};
        double largest = s.sinks ? double{sinks_[static_cast<size_t>(h)]} : -INFINITY;
        for (int64_t j = 0; j < tk; ++j) {
          if ((causal && j > pos) || (s.window_left >= 0 && j < pos - s.window_left) ||
              (s.window_right >= 0 && j > pos + s.window_right))
            continue;
          if (functions_ != nullptr && !functions_->keeps(row, narrow(j))) continue;
          double x = 0;
          for (int64_t d = 0; d < s.head_dim; ++d)
            x += element(p.q, bq, q0 + i, h, d) * element(p.k, bk, k0 + j, h / group, d);
          x *= double{p.softmax_scale};
          if (s.softcap > 0) {
            const double t = std::tanh(x / double{s.softcap});
            slope[static_cast<size_t>(j)] = 1 - t * t;
            x = double{s.softcap} * t;
          }
          given[static_cast<size_t>(j)] = x;
          if (functions_ != nullptr) {
            double by_score = 1;
            x = functions_->modified(row, narrow(j), x, by_score);
            slope[static_cast<size_t>(j)] *= by_score;
          }
          score[static_cast<size_t>(j)] = x;
          largest = std::max(largest, x);
        }
        double sum = s.sinks ? std::exp(double{sinks_[static_cast<size_t>(h)]} - largest) : 0;
        for (const double x : score) sum += largest == -INFINITY ? 0 : std::exp(x - largest);
        const float lse = largest == -INFINITY ? -INFINITY : static_cast<float>(largest + std::log(sum));
        const auto lse_at =
            static_cast<size_t>(bq * p.lse_batch_stride + h * p.lse_head_stride + (q0 + i) * p.lse_token_stride);
        lse_[lse_at] = lse;
        std::vector<double> out(static_cast<size_t>(s.head_dim_v), 0.0), keep(static_cast<size_t>(tk), 1.0);
        for (int64_t j = 0; j < tk; ++j) {
          double &prob = score[static_cast<size_t>(j)];
          prob = lse == -INFINITY ? 0 : std::exp(prob - double{lse});
          if (s.dropout_p > 0) keep[static_cast<size_t>(j)] = dropout.drops(b, h, i, j) ? 0 : double{dropout.scale};
          for (int64_t d = 0; d < s.head_dim_v; ++d)
            out[static_cast<size_t>(d)] += prob * keep[static_cast<size_t>(j)] * element(p.v, bk, k0 + j, h / group, d);
        }
        double delta = 0;
        for (int64_t d = 0; d < s.head_dim_v; ++d) {
          store_from_float(p.out.data,
                           bq * p.out.batch_stride + (q0 + i) * p.out.token_stride + h * p.out.head_stride + d,
                           p.out.dtype, static_cast<float>(out[static_cast<size_t>(d)]));
          delta += element(p.out, bq, q0 + i, h, d) * element(params.dout, bq, q0 + i, h, d);
        }
        if (s.dlse) delta -= double{dlse_[lse_at]};
        if (s.sinks && lse != -INFINITY) {
          const double x = -std::exp(double{sinks_[static_cast<size_t>(h)]} - double{lse}) * delta;
          add(truth_sinks_, 0, s.heads_q, h, 1, 0, x);
        }
        for (int64_t j = 0; j < tk; ++j) {
          const double prob = score[static_cast<size_t>(j)], kept = keep[static_cast<size_t>(j)];
          // What cancels in the difference of dp and delta leaves the rounding errors of float sums.
          double dp = 0, cancels = std::fabs(delta);
          for (int64_t d = 0; d < s.head_dim_v; ++d) {
            const double x = element(params.dout, bq, q0 + i, h, d) * element(p.v, bk, k0 + j, h / group, d);
            dp += x, cancels += kept * std::fabs(x);
          }
          const double modified = prob * (kept * dp - delta);  // the gradient of the modified score
          if (functions_ != nullptr && prob > 0)
            functions_->add(row, narrow(j), given[static_cast<size_t>(j)], modified, prob * 0x1p-18 * cancels);
          const double steep = std::max(1.0, std::fabs(slope[static_cast<size_t>(j)]));
          const double noise = (prob * 0x1p-18 + 0x1p-25) * cancels * steep * double{p.softmax_scale};
          const double ds = prob == 0 ? 0 : modified * slope[static_cast<size_t>(j)] * double{p.softmax_scale};
          const int64_t row_k = bk * rows_k + k0 + j, row_q = bq * rows_q + q0 + i;
          for (int64_t d = 0; d < s.head_dim_v; ++d)
            add(truth_v_, row_k, s.heads_kv, h / group, s.head_dim_v, d,
                prob * kept * element(params.dout, bq, q0 + i, h, d));
          for (int64_t d = 0; d < s.head_dim; ++d) {
            const double q = element(p.q, bq, q0 + i, h, d), k = element(p.k, bk, k0 + j, h / group, d);
            add(truth_k_, row_k, s.heads_kv, h / group, s.head_dim, d, ds * q, noise * std::fabs(q));
            add(truth_q_, row_q, s.heads_q, h, s.head_dim, d, ds * k, noise * std::fabs(k));
          }
        }
      }
    }
  }
}

Counters BackwardProblem::run(const BackwardKernel &kernel, uint64_t seed) {
  const cuda::Machine machine{kernel.tiles, 2, 1 << 20, 100 << 10};
  cuda::BackwardPlan plan = cuda::make_backward_plan(params, machine, kernel.instance);
  Guarded<float> scratch(plan.workspace() / sizeof(float));
  std::fill(scratch.begin(), scratch.end(), NAN);
  plan.bind(scratch.data());
  if (params.dsinks != nullptr) std::fill(dsinks_.begin(), dsinks_.end(), 0.0f);  // the host's memset
  const auto options = [&](const cuda::Launch &shape) {
    LaunchOptions o;
    std::copy_n(shape.grid, 3, o.grid);
    o.threads = shape.threads;
    o.shared_bytes = shape.shared_bytes;
    o.seed = seed;
    return o;
  };
  const bool bfloat16 = kernel.dtype == FLASHSPARK_BFLOAT16;
  const auto a = std::make_unique<BackwardArguments>(plan.arguments);
  if (plan.functions) ProblemFunctions::prepare(*plan.functions, seed);
  launch(options(plan.preprocess), [&] { bfloat16 ? preprocess<ptx::Bfloat16>(*a) : preprocess<ptx::Float16>(*a); });
  Counters counters;
  if (plan.main.grid[0] > 0 && plan.functions) {
    const auto with_functions = std::make_unique<FunctionBackwardArguments>(plan.function_arguments());
    counters = launch(options(plan.main), [&] { kernel.run_functions(*with_functions); });
  } else if (plan.main.grid[0] > 0) {
    counters = launch(options(plan.main), [&] { kernel.run(*a); });
  }
  if (plan.postprocess.grid[0] > 0)
    launch(options(plan.postprocess),
           [&] { bfloat16 ? postprocess<ptx::Bfloat16>(*a) : postprocess<ptx::Float16>(*a); });
  return counters;
}

std::string BackwardProblem::compare(const char *name, const flashspark_tensor &got, const Truth &truth, int64_t heads,
                                     int64_t width, bool of_keys, int roundings) const {
  if (got.data == nullptr) return {};
  const BackwardSpec &s = spec_;
  const bool varlen = of_keys ? s.varlen_k : s.varlen_q;
  const int64_t batch = varlen ? 1 : params.forward.num_seqs;
  const int64_t rows = static_cast<int64_t>(truth.value.size()) / (batch * heads * width);
  // Of the result; that of the terms, whose factors are rounded to 8 or 11 bits, is in `allowed`.
  const double step = s.dtype == FLASHSPARK_BFLOAT16 ? 1.0 / 256 : 1.0 / 2048;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t d = 0; d < width; ++d) {
          const auto at = static_cast<size_t>(((b * rows + n) * heads + h) * width + d);
          const double x = element(got, b, n, h, d), y = truth.value[at];
          const double allowed =
              step * std::fabs(y) + roundings * truth.allowed[at] + (truth.allowed[at] > 0 ? 1e-6 : 0);
          if (!(std::fabs(x - y) <= allowed))
            return std::string(name) + " batch " + std::to_string(b) + " row " + std::to_string(n) + " head " +
                   std::to_string(h) + " column " + std::to_string(d) + ": " + std::to_string(x) + ", should be " +
                   std::to_string(y) + " within " + std::to_string(allowed);
        }
      }
    }
  }
  return {};
}

std::string BackwardProblem::compare(const BackwardKernel &kernel) const {
  const BackwardSpec &s = spec_;
  // Of a term's factors: pairs of warps hand P to each other in 16 bits, and round dS as all do.
  const bool hands_over =
      kernel.functions == nullptr && kernel.instance->tile(kernel.tiles).sharing == KeySharing::gradients;
  const int roundings = hands_over ? 2 : 1;
  std::string text = compare("dv", params.dv, truth_v_, s.heads_kv, s.head_dim_v, true, 1);
  if (text.empty()) text = compare("dk", params.dk, truth_k_, s.heads_kv, s.head_dim, true, roundings);
  if (text.empty()) text = compare("dq", params.dq, truth_q_, s.heads_q, s.head_dim, false, roundings);
  if (text.empty() && functions_ != nullptr) text = functions_->compare();
  for (size_t h = 0; text.empty() && s.sinks && h < dsinks_.size(); ++h) {
    const double x = double{dsinks_[h]}, y = truth_sinks_.value[h];
    if (!(std::fabs(x - y) <= 0.02 * truth_sinks_.allowed[h] + 1e-5))
      text = "dsinks head " + std::to_string(h) + ": " + std::to_string(x) + ", should be " + std::to_string(y);
  }
  return text;
}

std::string check_backward(const BackwardSpec &spec, const BackwardKernel &kernel, uint64_t seed, Counters *counters) {
  BackwardSpec typed = spec;
  typed.dtype = kernel.dtype;
  const auto named = [&](const std::string &what) {
    return name_of(kernel) + ", " + to_string(typed) + ", seed " + std::to_string(seed) + ": " + what;
  };
  try {
    BackwardProblem problem(typed, seed);
    const Counters counted = problem.run(kernel, seed);
    if (counters != nullptr) *counters = counted;
    const std::string wrong = problem.compare(kernel);
    return wrong.empty() ? "" : named(wrong);
  } catch (const Fault &fault) {
    return named(fault.what());
  }
}

}  // namespace flashspark::emulator
