#include "dispatch.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <initializer_list>
#include <string_view>

#include "cpu/append.hpp"
#include "cpu/backward.hpp"
#include "cpu/block_mask.hpp"
#include "cpu/engine.hpp"
#include "cpu/reference.hpp"
#include "cpu/thread_pool.hpp"
#include "cuda/append.hpp"
#include "cuda/arguments.hpp"
#include "cuda/backward.hpp"
#include "cuda/block_mask.hpp"
#include "cuda/device.hpp"
#include "cuda/forward.hpp"
#include "cuda/schedule.hpp"
#include "dtype.hpp"
#include "environment.hpp"
#include "error.hpp"
#include "mod.hpp"

namespace flashspark {
namespace {

bool uses(const Params &p, int32_t dtype) {
  return p.q.dtype == dtype || p.k.dtype == dtype || p.out.dtype == dtype;
}

// One line a feature: its name in messages, and when a problem asks for it. The index of a line is the feature's bit.
struct Feature {
  const char *name;
  bool (*required)(const Params &p);
};
constexpr Feature kFeatures[] = {
    {"float32", [](const Params &p) { return uses(p, FLASHSPARK_FLOAT32); }},
    {"float16", [](const Params &p) { return uses(p, FLASHSPARK_FLOAT16); }},
    {"bfloat16", [](const Params &p) { return uses(p, FLASHSPARK_BFLOAT16); }},
    {"fp8 q", [](const Params &p) { return p.q.dtype == FLASHSPARK_FLOAT8_E4M3; }},
    {"fp8 kv", [](const Params &p) { return p.k.dtype == FLASHSPARK_FLOAT8_E4M3; }},
    {"fp8 out", [](const Params &p) { return p.out.dtype == FLASHSPARK_FLOAT8_E4M3; }},
    {"out dtype other than q's", [](const Params &p) { return p.out.dtype != p.q.dtype; }},
    {"varlen q", [](const Params &p) { return is_varlen_q(p); }},
    {"varlen kv", [](const Params &p) { return is_varlen_k(p); }},
    {"paged kv", [](const Params &p) { return is_paged(p); }},
    {"page_size % 16 != 0", [](const Params &p) { return is_paged(p) && p.page_size % 16 != 0; }},
    {"page_table without seqused_k", [](const Params &p) { return is_paged(p) && p.seqused_k == nullptr; }},
    {"page_table with kv_batch_index", [](const Params &p) { return is_paged(p) && p.kv_batch_index != nullptr; }},
    {"seqused_q", [](const Params &p) { return p.seqused_q != nullptr; }},
    {"seqused_k", [](const Params &p) { return p.seqused_k != nullptr; }},
    {"leftpad_k", [](const Params &p) { return p.leftpad_k != nullptr; }},
    {"kv_batch_index", [](const Params &p) { return p.kv_batch_index != nullptr; }},
    {"gqa", [](const Params &p) { return p.num_heads_q != p.num_heads_kv; }},
    {"head_dim_v other than head_dim", [](const Params &p) { return p.head_dim_v != p.head_dim; }},
    {"causal", [](const Params &p) { return p.causal != 0; }},
    {"causal_per_seq", [](const Params &p) { return p.causal_per_seq != nullptr; }},
    {"window", [](const Params &p) { return p.window_left >= 0 || p.window_right >= 0; }},
    {"attention_chunk", [](const Params &p) { return p.attention_chunk > 0; }},
    {"softcap", [](const Params &p) { return p.softcap > 0; }},
    {"sinks", [](const Params &p) { return p.sinks != nullptr; }},
    {"prefix ranges", [](const Params &p) { return p.prefix_mode != FLASHSPARK_PREFIX_NONE; }},
    {"rswa", [](const Params &p) { return p.rswa_window > 0; }},
    {"rel_logits", [](const Params &p) { return p.rel_logits != nullptr; }},
    {"alibi", [](const Params &p) { return p.alibi_slopes != nullptr; }},
    {"score_mod", [](const Params &p) { return p.score_mod.mod != nullptr; }},
    {"mask_mod", [](const Params &p) { return p.mask_mod.mod != nullptr; }},
    {"block lists", [](const Params &p) { return has_block_lists(p); }},
    {"dropout", [](const Params &p) { return p.dropout_p > 0; }},
    {"lse", [](const Params &p) { return p.lse != nullptr; }},
    {"num_splits", [](const Params &p) { return p.num_splits > 1; }},
    {"deterministic", [](const Params &p) { return p.deterministic != 0; }},
};
constexpr size_t kNumFeatures = std::size(kFeatures);

// What only a backward pass is asked for. Its bits follow those of kFeatures.
struct GradientFeature {
  const char *name;
  bool (*required)(const BackwardParams &p);
};
bool wants_captured(const BackwardParams &p) {
  if (p.dtensors == nullptr) return false;
  return std::any_of(p.dtensors, p.dtensors + p.forward.score_mod.num_tensors,
                     [](const flashspark_captured_gradient &gradient) { return gradient.data != nullptr; });
}
constexpr GradientFeature kGradientFeatures[] = {
    {"gradient of lse", [](const BackwardParams &p) { return p.dlse != nullptr; }},
    {"gradient of sinks", [](const BackwardParams &p) { return p.dsinks != nullptr; }},
    {"gradient of rel_logits", [](const BackwardParams &p) { return p.drel_logits != nullptr; }},
    {"gradient of alibi_slopes", [](const BackwardParams &p) { return p.dalibi_slopes != nullptr; }},
    {"gradients of captured tensors", wants_captured},
};
constexpr size_t kNumGradientFeatures = std::size(kGradientFeatures), kAllBits = kNumFeatures + kNumGradientFeatures;
static_assert(kAllBits < 64);
constexpr FeatureSet kAllFeatures = (FeatureSet{1} << kNumFeatures) - 1;
constexpr std::string_view name_of(size_t bit) {
  return bit < kNumFeatures ? kFeatures[bit].name : kGradientFeatures[bit - kNumFeatures].name;
}

constexpr FeatureSet without(FeatureSet set, std::initializer_list<std::string_view> left_out) {
  for (size_t n = 0; n < kAllBits; ++n) {
    for (const std::string_view name : left_out) set &= ~(FeatureSet{name == name_of(n)} << n);
  }
  return set;
}
constexpr FeatureSet kCudaFeatures = without(kAllFeatures, {"float32"});
static_assert(std::popcount(kCudaFeatures) == kNumFeatures - 1);

// All that has gradients: validate(BackwardParams) refuses the others.
constexpr FeatureSet kAllGradients =
    without((FeatureSet{1} << kAllBits) - 1,
            {"fp8 q", "fp8 kv", "fp8 out", "out dtype other than q's", "paged kv", "page_size % 16 != 0",
             "page_table without seqused_k", "page_table with kv_batch_index", "leftpad_k", "kv_batch_index"});
static_assert(std::popcount(kAllGradients) == kAllBits - 10);

// What the kernels of the backward pass have not got yet.
constexpr FeatureSet kCudaGradients = without(kAllGradients, {"float32"});
static_assert(std::popcount(kCudaGradients) == std::popcount(kAllGradients) - 1);

FeatureSet required_features(const Params &p) {
  FeatureSet set = 0;
  for (size_t n = 0; n < kNumFeatures; ++n) set |= FeatureSet{kFeatures[n].required(p)} << n;
  return set;
}

// lse is always there, and nothing splits a backward pass: neither says anything.
FeatureSet required_features(const BackwardParams &p) {
  FeatureSet set = without(required_features(p.forward), {"lse", "num_splits"});
  for (size_t n = 0; n < kNumGradientFeatures; ++n)
    set |= FeatureSet{kGradientFeatures[n].required(p)} << (kNumFeatures + n);
  return set;
}

std::string names(FeatureSet set) {
  std::string text;
  for (size_t n = 0; n < kAllBits; ++n) {
    if (set >> n & 1) text += (text.empty() ? "" : ", ") + std::string(name_of(n));
  }
  return text;
}

std::string device_name(const Params &p) {
  return p.device == FLASHSPARK_CPU ? "the CPU" : "CUDA device " + std::to_string(p.device_index);
}

std::string engine_detail(const Params &) {
  return std::string(cpu::engine_target()) + ", " + std::to_string(cpu::default_threads()) + " threads";
}
std::string reference_detail(const Params &) {
  return "double precision, " + std::to_string(cpu::default_threads()) + " threads";
}
size_t no_workspace(const Params &) {
  return 0;
}
// The CPU looks at the lengths themselves at every call.
void no_schedule(const Params &) {}
int64_t no_schedule_size(const Params &) {
  return 0;
}
size_t no_backward_workspace(const BackwardParams &) {
  return 0;
}
template <auto kRun, class P>
void without_scratch(const P &p, const ScratchSource &) {
  kRun(p);
}

constexpr Implementation kImplementations[] = {
    {.name = "cuda",
     .description = "mma.sync FlashAttention kernels, built ahead of time",
     .device = FLASHSPARK_CUDA,
     .features = kCudaFeatures,
     .max_head_dim = kMaxHeadDim,
     .detail = cuda::detail,
     .plan = cuda::plan_text,
     .unavailable = cuda::device_unavailable_reason,
     .unsupported = cuda::unsupported,
     .forward = cuda::forward,
     .workspace = cuda::workspace,
     .backward = {.features = kCudaGradients,
                  .max_head_dim = cuda::kMaxBackwardHeadDim,
                  .plan = cuda::backward_plan_text,
                  .unsupported = cuda::unsupported_backward,
                  .run = cuda::backward,
                  .workspace = cuda::backward_workspace},
     .append = cuda::append_kv,
     .schedule = cuda::schedule,
     .schedule_size = cuda::schedule_size,
     .block_mask = cuda::create_block_mask},
    {.name = "cpu-engine",
     .description = "tiled online softmax in SIMD on all cores",
     .device = FLASHSPARK_CPU,
     .features = kAllFeatures,
     .max_head_dim = kMaxHeadDim,
     .detail = engine_detail,
     .plan = nullptr,
     .unavailable = nullptr,
     .unsupported = nullptr,
     .forward = without_scratch<cpu::engine_forward, Params>,
     .workspace = no_workspace,
     .backward = {.features = kAllGradients,
                  .max_head_dim = kMaxHeadDim,
                  .run = without_scratch<cpu::engine_backward, BackwardParams>,
                  .workspace = no_backward_workspace},
     .append = cpu::append_kv,
     .schedule = no_schedule,
     .schedule_size = no_schedule_size,
     .block_mask = cpu::create_block_mask},
    {.name = "cpu-reference",
     .description = "the oracle: the formula, one score at a time",
     .device = FLASHSPARK_CPU,
     .features = kAllFeatures,
     .max_head_dim = kMaxHeadDim,
     .detail = reference_detail,
     .plan = nullptr,
     .unavailable = nullptr,
     .unsupported = nullptr,
     .forward = without_scratch<cpu::reference_forward, Params>,
     .workspace = no_workspace,
     .backward = {.features = kAllGradients,
                  .max_head_dim = kMaxHeadDim,
                  .run = without_scratch<cpu::reference_backward, BackwardParams>,
                  .workspace = no_backward_workspace},
     .append = cpu::append_kv,
     .schedule = no_schedule,
     .schedule_size = no_schedule_size,
     .block_mask = nullptr},
};

[[noreturn]] void refuse(const std::string &why) {
  throw Error(FLASHSPARK_UNSUPPORTED, why);
}

// What an implementation is asked for: attention, or its gradients.
struct Request {
  const Params &problem;
  const BackwardParams *gradients;  // NULL: attention
  FeatureSet required;
};
Request request(const Params &p) {
  return {p, nullptr, required_features(p)};
}
Request request(const BackwardParams &p) {
  return {p.forward, &p, required_features(p)};
}

std::string unsupported(const Implementation &candidate, const Request &r) {
  if (r.gradients == nullptr) return candidate.unsupported != nullptr ? candidate.unsupported(r.problem) : "";
  return candidate.backward.unsupported != nullptr ? candidate.backward.unsupported(*r.gradients) : "";
}

std::string plan_of(const Implementation &candidate, const Request &r) {
  if (r.gradients == nullptr) return candidate.plan != nullptr ? candidate.plan(r.problem) : "";
  return candidate.backward.plan != nullptr ? candidate.backward.plan(*r.gradients) : "";
}

// What keeps an implementation from what it is asked for; empty if nothing.
std::string obstacles(const Implementation &candidate, const Request &r) {
  const Params &p = r.problem;
  const bool forward = r.gradients == nullptr;
  std::string text;
  const auto add = [&](const std::string &what) { text += (text.empty() ? "" : "; ") + what; };
  if (candidate.device != p.device)
    add(candidate.device == FLASHSPARK_CPU ? "runs on the CPU only" : "runs on CUDA only");
  if (!forward && candidate.backward.run == nullptr) {
    add("has no backward pass");
    return text;
  }
  const FeatureSet features = forward ? candidate.features : candidate.backward.features;
  if (const FeatureSet missing = r.required & ~features) add("lacks " + names(missing));
  const int64_t widest = std::max(p.head_dim, p.head_dim_v);
  const int64_t limit = forward ? candidate.max_head_dim : candidate.backward.max_head_dim;
  if (widest > limit) add("head_dim " + std::to_string(widest) + " > " + std::to_string(limit));
  if (candidate.device != p.device) return text;
  std::string why = candidate.unavailable != nullptr ? candidate.unavailable(p.device_index) : "";
  if (why.empty()) why = unsupported(candidate, r);
  if (!why.empty()) add(why);
  return text;
}

// The name that the caller, or else the environment, asks for; NULL: none.
const char *forced_name(const Params &p) {
  if (p.implementation != nullptr) return p.implementation;
  const std::string &name = environment().force_implementation;
  return name.empty() ? nullptr : name.c_str();
}

std::string problem_text(const Request &r) {
  const Params &p = r.problem;
  std::string text = (r.gradients == nullptr ? "problem: " : "problem: gradients, ") + device_name(p) + ", q " +
                     dtype_name(p.q.dtype) + ", kv " + dtype_name(p.k.dtype) + ", out " + dtype_name(p.out.dtype) +
                     ", num_seqs " + std::to_string(p.num_seqs) + ", heads " + std::to_string(p.num_heads_q) + "/" +
                     std::to_string(p.num_heads_kv) + ", head_dim " + std::to_string(p.head_dim);
  if (p.head_dim_v != p.head_dim) text += "/" + std::to_string(p.head_dim_v);
  text += ", max_seqlen " + std::to_string(p.max_seqlen_q) + "/" + std::to_string(p.max_seqlen_k);
  if (is_paged(p)) text += ", page_size " + std::to_string(p.page_size);
  return text + "\nrequired: " + names(r.required) + "\n";
}

const Implementation *find(const Request &r) {
  const char *forced = forced_name(r.problem);
  bool known = forced == nullptr;
  for (const Implementation &candidate : kImplementations) {
    if (forced != nullptr && std::strcmp(forced, candidate.name) != 0) continue;
    known = true;
    if (obstacles(candidate, r).empty()) return &candidate;
  }
  // The environment's name is a known one: check_environment().
  if (!known) fail("implementation", forced, "must be one of " + implementation_names());
  return nullptr;
}

// The first row with an operation that needs no features.
template <class Operation>
const Implementation &first_with(Operation Implementation::*operation, const char *name, int32_t device,
                                 int32_t device_index) {
  std::string why;
  for (const Implementation &candidate : kImplementations) {
    if (candidate.*operation == nullptr || candidate.device != device) continue;
    const std::string reason = candidate.unavailable != nullptr ? candidate.unavailable(device_index) : "";
    if (reason.empty()) return candidate;
    why += (why.empty() ? "" : "; ") + std::string(candidate.name) + ": " + reason;
  }
  refuse(std::string(name) + ": no implementation fits: " + why);
}

std::string indented(const std::string &lines) {
  std::string text;
  for (size_t begin = 0, end; begin < lines.size(); begin = end) {
    end = std::min(lines.find('\n', begin), lines.size() - 1) + 1;
    text += "  " + lines.substr(begin, end - begin);
  }
  return text;
}

std::string explain(const Request &r) {
  const Implementation *chosen = find(r);
  const bool forced = forced_name(r.problem) != nullptr;
  std::string text = problem_text(r);
  for (const Implementation &candidate : kImplementations) {
    const std::string why_not = obstacles(candidate, r);
    text += std::string(candidate.name) + " (" + candidate.detail(r.problem) + "): ";
    if (&candidate == chosen) {
      text += forced ? "chosen, as asked for\n" : "chosen\n";
      text += indented(plan_of(candidate, r));
    } else {
      text += why_not.empty() ? (forced ? "fits, but another was asked for\n" : "fits, comes later in the table\n")
                              : why_not + "\n";
    }
  }
  if (chosen == nullptr) text += "no implementation fits\n";
  return text;
}

const Implementation &choose(const Request &r) {
  if (const Implementation *chosen = find(r)) return *chosen;
  refuse("no implementation fits\n" + explain(r));
}

}  // namespace

std::span<const Implementation> implementations() {
  return kImplementations;
}

std::string implementation_names() {
  std::string text;
  for (const Implementation &each : kImplementations) text += (text.empty() ? "" : ", ") + std::string(each.name);
  return text;
}

std::string explain(const Params &p) {
  return explain(request(p));
}

std::string explain(const BackwardParams &p) {
  return explain(request(p));
}

const Implementation &choose(const Params &p) {
  return choose(request(p));
}

const Implementation &choose_backward(const BackwardParams &p) {
  return choose(request(p));
}

const Implementation &choose_append(const AppendParams &p) {
  return first_with(&Implementation::append, "append", p.device, p.device_index);
}

const Implementation &choose_schedule(const Params &p) {
  return first_with(&Implementation::schedule, "schedule", p.device, p.device_index);
}

const Implementation &choose_block_mask(const BlockMaskParams &p) {
  return first_with(&Implementation::block_mask, "create_block_mask", p.device, p.device_index);
}

}  // namespace flashspark
