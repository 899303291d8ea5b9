#include "backward/problem.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <tuple>

#include "backward/postprocess.cuh"
#include "backward/preprocess.cuh"
#include "backward/sums.cuh"
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

// Elements of a row of rel_logits that belong to no distance.
constexpr int64_t kRelGap = 3;

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
         (kernel.block_sparse ? "_lists" : "") + (kernel.in_turns ? "_turns" : "") + (kernel.native ? "_native" : "") +
         (kernel.exact_sums ? "_exact" : "");
}

std::string to_string(const BackwardSpec &s) {
  std::string text = "D " + std::to_string(s.head_dim) + "/" + std::to_string(s.head_dim_v) + " heads " +
                     std::to_string(s.heads_q) + "/" + std::to_string(s.heads_kv) + " tokens/keys";
  for (size_t n = 0; n < s.tokens.size(); ++n)
    text += " " + std::to_string(s.tokens[n]) + "/" + std::to_string(s.keys[n]);
  const auto flag = [&](bool value, const char *name) { text += value ? std::string(" ") + name : ""; };
  flag(s.varlen_q, "varlen_q"), flag(s.varlen_k, "varlen_k"), flag(s.unused_rows, "unused_rows");
  flag(s.causal, "causal"), flag(s.deterministic, "deterministic"), flag(s.causal_per_seq, "causal_per_seq"),
      flag(s.sinks, "sinks"), flag(s.dlse, "dlse");
  flag(s.heads_first, "heads_first"), flag(s.without_keys, "without_keys"), flag(s.alibi, "alibi"),
      flag(s.alibi_per_seq, "by sequence");
  flag(s.prefix_clamp_window, "prefix_clamp_window");
  const auto number = [&](int64_t value, const char *name) {
    if (value != 0) text += std::string(" ") + name + " " + std::to_string(value);
  };
  number(s.rel_extent, "rel_extent"), number(s.prefix_mode, "prefix_mode"), number(s.rswa_window, "rswa_window");
  number(s.attention_chunk, "attention_chunk");
  text += " window " + std::to_string(s.window_left) + "," + std::to_string(s.window_right) + " softcap " +
          std::to_string(s.softcap) + " dropout " + std::to_string(s.dropout_p) + " spread " + std::to_string(s.spread);
  if (s.functions) text += to_string(*s.functions);
  return text;
}

bool can_run(const BackwardKernel &kernel, const BackwardSpec &s) {
  Params p{};
  static const int32_t kAnything = 0;
  p.head_dim = s.head_dim, p.head_dim_v = s.head_dim_v;
  p.num_heads_q = p.num_heads_kv = 1;
  p.softcap = s.softcap, p.dropout_p = s.dropout_p, p.deterministic = s.deterministic;
  p.causal = s.causal, p.window_left = s.window_left, p.window_right = s.window_right;
  const auto differ = [&](const std::vector<int32_t> &used) {
    return s.unused_rows || std::ranges::any_of(used, [&](int32_t n) { return n != used[0]; });
  };
  p.num_seqs = static_cast<int64_t>(s.tokens.size());
  p.max_seqlen_q = std::ranges::max(s.tokens), p.max_seqlen_k = std::ranges::max(s.keys);
  p.cu_seqlens_q = s.varlen_q ? &kAnything : nullptr, p.cu_seqlens_k = s.varlen_k ? &kAnything : nullptr;
  p.seqused_q = differ(s.tokens) ? &kAnything : nullptr, p.seqused_k = differ(s.keys) ? &kAnything : nullptr;
  p.causal_per_seq = s.causal_per_seq ? &kAnything : nullptr;
  p.alibi_slopes = s.alibi ? reinterpret_cast<const float *>(&kAnything) : nullptr;
  p.rel_logits = s.rel_extent > 0 ? &kAnything : nullptr;
  p.prefix_mode = s.prefix_mode, p.rswa_window = s.rswa_window, p.attention_chunk = s.attention_chunk;
  return cuda::fits(*kernel.instance, p);
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
  make_biases(seed);
  make_masks(seed);
  compute_truth();
  spare_unread_biases();
}

void BackwardProblem::make_memory(uint64_t seed) {
  flashspark_attention_params &p = params.forward;
  const BackwardSpec &s = spec_;
  p.device = FLASHSPARK_CUDA;
  p.num_seqs = static_cast<int64_t>(s.tokens.size());
  p.num_heads_q = s.heads_q, p.num_heads_kv = s.heads_kv;
  p.head_dim = s.head_dim, p.head_dim_v = s.head_dim_v;
  p.window_left = s.window_left, p.window_right = s.window_right;
  p.causal = s.causal, p.softcap = s.softcap, p.dropout_p = s.dropout_p, p.deterministic = s.deterministic;
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
    std::fill(dsinks_.begin(), dsinks_.end(), NAN);
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

void BackwardProblem::make_biases(uint64_t seed) {
  flashspark_attention_params &p = params.forward;
  const BackwardSpec &s = spec_;
  std::mt19937_64 rng(seed + 1);
  std::normal_distribution<float> normal;
  if (s.alibi) {
    const int64_t heads = s.heads_q + 2, sets = s.alibi_per_seq ? p.num_seqs : 1;  // with a gap between sequences
    slopes_ = Guarded<float>(static_cast<size_t>((sets - 1) * heads + s.heads_q));
    for (float &x : slopes_) x = 0.05f * normal(rng);
    p.alibi_slopes = slopes_.data(), p.alibi_batch_stride = s.alibi_per_seq ? heads : 0;
    dslopes_ = Guarded<float>(static_cast<size_t>(sets * s.heads_q));
    std::fill(dslopes_.begin(), dslopes_.end(), NAN);
    if (s.wanted_biases) params.dalibi_slopes = dslopes_.data();
  }
  if (s.rel_extent > 0) {
    p.rel_extent = s.rel_extent, p.rel_dtype = s.rel_dtype;
    p.rel_head_stride = s.rel_extent + kRelGap, p.rel_token_stride = s.heads_q * p.rel_head_stride;
    const int64_t count = rel_tokens(p) * p.rel_token_stride;
    rel_ = Guarded<char>(static_cast<size_t>(count) * dtype_size(s.rel_dtype));
    for (int64_t n = 0; n < count; ++n) store_from_float(rel_.data(), n, s.rel_dtype, normal(rng));
    p.rel_logits = rel_.data();
    drel_ = Guarded<float>(static_cast<size_t>(count));
    std::fill(drel_.begin(), drel_.end(), NAN);
    if (s.wanted_biases) params.drel_logits = drel_.data();
  }
}

void BackwardProblem::make_masks(uint64_t seed) {
  flashspark_attention_params &p = params.forward;
  const BackwardSpec &s = spec_;
  std::mt19937_64 rng(seed + 2);
  const auto below = [&rng](int64_t n) { return static_cast<int32_t>(rng() % static_cast<uint64_t>(n)); };
  p.attention_chunk = s.attention_chunk, p.rswa_window = s.rswa_window;
  if (s.rswa_window > 0) {
    prefixes_ = Guarded<int32_t>(s.tokens.size());
    for (int32_t &x : prefixes_) x = below(max_k_ + 8);
    p.rswa_prefix_lens = prefixes_.data();
  }
  p.prefix_mode = s.prefix_mode, p.prefix_clamp_window = s.prefix_clamp_window;
  if (s.prefix_mode == FLASHSPARK_PREFIX_NONE) return;
  p.num_prefix_ranges = s.prefix_mode == FLASHSPARK_PREFIX_PER_SEQ ? 3 : 0;
  const bool per_seq = s.prefix_mode == FLASHSPARK_PREFIX_PER_SEQ;
  ranges_ = Guarded<int32_t>(static_cast<size_t>(2 * (per_seq ? p.num_seqs * p.num_prefix_ranges : rel_tokens(p))));
  for (size_t n = 0; n < ranges_.size(); n += 2) {
    const int32_t first = below(max_k_ + 1) - 1;
    ranges_[n] = first, ranges_[n + 1] = first + below(per_seq ? 60 : 20);
    if (below(4) == 0) ranges_[n] = ranges_[n + 1] = -1;
  }
  p.prefix_ranges = ranges_.data();
}

void BackwardProblem::spoil_metadata(std::mt19937_64 &rng) {
  constexpr int32_t kValues[] = {INT32_MIN, -100000, -1, 0, 1, 17, 100000, 1 << 30, INT32_MAX - 1, INT32_MAX};
  for (Guarded<int32_t> *each : {&cu_q_, &cu_k_, &used_q_, &used_k_, &causal_, &ranges_, &prefixes_}) {
    if (rng() % 2 == 0) continue;
    const bool all = rng() % 2 == 0;
    for (int32_t &x : *each) {
      if (all || rng() % 3 == 0) x = kValues[rng() % std::size(kValues)];
    }
  }
}

// What no kept key has is not read.
void BackwardProblem::spare_unread_biases() {
  for (size_t n = 0; n < truth_rel_.noise.size(); ++n) {
    if (truth_rel_.noise[n] == 0) store_from_float(rel_.data(), static_cast<int64_t>(n), spec_.rel_dtype, NAN);
  }
}

Counters BackwardProblem::run(const BackwardKernel &kernel, uint64_t seed, int64_t passes) {
  const cuda::Machine machine{kernel.tiles, spec_.sm_count, 1 << 20, 100 << 10};
  cuda::BackwardPlan plan = cuda::make_backward_plan(params, machine, kernel.instance);
  if (plan.functions && plan.functions->sums_exactly()) plan.functions->cut_into(passes);
  Guarded<float> scratch(plan.workspace() / sizeof(float));
  std::fill(scratch.begin(), scratch.end(), std::bit_cast<float>(0xffc00000u));  // NaN, and a negative number
  plan.bind(scratch.data());
  const auto options = [&](const cuda::Launch &shape) {
    LaunchOptions o;
    std::copy_n(shape.grid, 3, o.grid);
    o.threads = shape.threads;
    o.shared_bytes = shape.shared_bytes;
    o.seed = seed;
    const bool in_turns = plan.functions ? plan.functions->in_turns : spec_.deterministic;
    o.in_order = in_turns || plan.arguments.num_pieces > 0;
    return o;
  };
  const bool bfloat16 = kernel.dtype == FLASHSPARK_BFLOAT16;
  const auto a = std::make_unique<BackwardArguments>(plan.arguments);
  if (plan.functions) ProblemFunctions::prepare(*plan.functions, seed);
  launch(options(plan.preprocess), [&] { bfloat16 ? preprocess<ptx::Bfloat16>(*a) : preprocess<ptx::Float16>(*a); });
  Counters counters;
  if (plan.main.grid[0] > 0 && plan.functions) {
    const auto with_functions = std::make_unique<FunctionBackwardArguments>(plan.functions->with(plan.arguments));
    counters = launch(options(plan.main), [&] { kernel.run_functions(*with_functions); });
    ProblemFunctions::finish(*plan.functions, seed);
  } else if (plan.main.grid[0] > 0) {
    counters = launch(options(plan.main), [&] { kernel.run(*a); });
  }
  // Postprocess waits for so many; with more it would begin too early where CTAs run at the same time.
  for (int64_t n = 0; a->added_blocks != nullptr && n < params.forward.num_seqs * params.forward.num_heads_q; ++n) {
    if (a->added_blocks[n] != a->head_blocks)
      throw Fault("blocks added to dq of head " + std::to_string(n) + ": " + std::to_string(a->added_blocks[n]) +
                  ", must be " + std::to_string(a->head_blocks));
  }
  if (plan.postprocess.grid[0] > 0)
    launch(options(plan.postprocess),
           [&] { bfloat16 ? postprocess<ptx::Bfloat16>(*a) : postprocess<ptx::Float16>(*a); });
  if (plan.sums.grid[0] > 0) launch(options(plan.sums), [&] { sums(*a); });
  for (int64_t pass = 1; plan.functions && pass < plan.functions->passes; ++pass) {
    plan.functions->begin_pass(pass);
    const auto alone = std::make_unique<FunctionBackwardArguments>(plan.functions->for_sums_alone(plan.arguments));
    ProblemFunctions::prepare(*plan.functions, seed);
    launch(options(plan.main), [&] { kernel.run_functions(*alone); });
    ProblemFunctions::finish(*plan.functions, seed);
  }
  return counters;
}

std::string BackwardProblem::compare(const char *name, const flashspark_tensor &got, const Truth &truth, int64_t heads,
                                     int64_t width, bool of_keys, int roundings) const {
  if (got.data == nullptr) return {};
  const BackwardSpec &s = spec_;
  const bool varlen = of_keys ? s.varlen_k : s.varlen_q;
  const int64_t batch = varlen ? 1 : params.forward.num_seqs;
  const int64_t rows = static_cast<int64_t>(truth.value.size()) / (batch * heads * width);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t d = 0; d < width; ++d) {
          const auto at = static_cast<size_t>(((b * rows + n) * heads + h) * width + d);
          const double x = element(got, b, n, h, d), y = truth.value[at];
          const double allowed = step() * std::fabs(y) + roundings * truth.allowed[at] + truth.noise[at] +
                                 (truth.allowed[at] > 0 ? 1e-6 : 0);
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

// Float32 results, of terms with so many roundings to 16 bits. What has no truth is not written.
std::string BackwardProblem::compare(const char *name, const Guarded<float> &got, const Truth &truth,
                                     int roundings) const {
  for (size_t n = 0; n < got.size(); ++n) {
    const double x = double{got[n]}, y = truth.value[n];
    if (std::isnan(y) ? std::isnan(x)
                      : std::fabs(x - y) <= roundings * truth.allowed[n] + truth.noise[n] + 1e-6 * std::fabs(y))
      continue;
    const auto text = [](double number) {
      char digits[32];
      std::snprintf(digits, sizeof digits, "%.9g", number);
      return std::string(digits);
    };
    return std::string(name) + "[" + std::to_string(n) + "]: " + text(x) + ", should be " + text(y) + " within " +
           text(roundings * truth.allowed[n] + truth.noise[n]);
  }
  return {};
}

std::string BackwardProblem::compare(const BackwardKernel &kernel) const {
  const BackwardSpec &s = spec_;
  // Of a term's factors: all round dS; pairs of warps hand P to each other in 16 bits, or, with modifications, slopes
  // of softcap. Of biases no factor is rounded.
  const BackwardInstance &instance = *kernel.instance;
  const bool pair = instance.tile(kernel.tiles).sharing != KeySharing::none,
             native = instance.score_mod == ScoreMod::native,
             hands_on = pair && (native ? kernel.functions == nullptr && s.softcap > 0 : true);
  const int roundings = hands_on ? 2 : 1;
  std::string text = compare("dv", params.dv, truth_v_, s.heads_kv, s.head_dim_v, true, 1);
  if (text.empty()) text = compare("dk", params.dk, truth_k_, s.heads_kv, s.head_dim, true, roundings);
  if (text.empty()) text = compare("dq", params.dq, truth_q_, s.heads_q, s.head_dim, false, roundings);
  if (text.empty() && functions_ != nullptr) text = functions_->compare();
  if (text.empty()) text = compare("dsinks", dsinks_, truth_sinks_, 0);
  if (text.empty() && s.wanted_biases) text = compare("dalibi_slopes", dslopes_, truth_slopes_, 0);
  if (text.empty() && s.wanted_biases) text = compare("drel_logits", drel_, truth_rel_, 0);
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
