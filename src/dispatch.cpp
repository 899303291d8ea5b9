#include "dispatch.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <initializer_list>
#include <string_view>

#include "cpu/append.hpp"
#include "cpu/block_mask.hpp"
#include "cpu/engine.hpp"
#include "cpu/reference.hpp"
#include "cpu/thread_pool.hpp"
#include "cuda/append.hpp"
#include "cuda/arguments.hpp"
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
static_assert(kNumFeatures < 64);
constexpr FeatureSet kAllFeatures = (FeatureSet{1} << kNumFeatures) - 1;

constexpr FeatureSet without(std::initializer_list<std::string_view> left_out) {
  FeatureSet set = kAllFeatures;
  for (size_t n = 0; n < kNumFeatures; ++n) {
    for (const std::string_view name : left_out) set &= ~(FeatureSet{name == kFeatures[n].name} << n);
  }
  return set;
}
constexpr FeatureSet kCudaFeatures = without({"float32"});
static_assert(std::popcount(kCudaFeatures) == kNumFeatures - 1);

FeatureSet required_features(const Params &p) {
  FeatureSet set = 0;
  for (size_t n = 0; n < kNumFeatures; ++n) set |= FeatureSet{kFeatures[n].required(p)} << n;
  return set;
}

std::string names(FeatureSet set) {
  std::string text;
  for (size_t n = 0; n < kNumFeatures; ++n) {
    if (set >> n & 1) text += (text.empty() ? "" : ", ") + std::string(kFeatures[n].name);
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
template <void (*kForward)(const Params &)>
void without_scratch(const Params &p, const ScratchSource &) {
  kForward(p);
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
     .backward = nullptr,
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
     .forward = without_scratch<cpu::engine_forward>,
     .workspace = no_workspace,
     .backward = nullptr,
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
     .forward = without_scratch<cpu::reference_forward>,
     .workspace = no_workspace,
     .backward = nullptr,
     .append = cpu::append_kv,
     .schedule = no_schedule,
     .schedule_size = no_schedule_size,
     .block_mask = nullptr},
};

[[noreturn]] void refuse(const std::string &why) {
  throw Error(FLASHSPARK_UNSUPPORTED, why);
}

// What keeps an implementation from a problem that requires these features; empty if nothing.
std::string obstacles(const Implementation &candidate, const Params &p, FeatureSet required) {
  std::string text;
  const auto add = [&](const std::string &what) { text += (text.empty() ? "" : "; ") + what; };
  if (candidate.device != p.device)
    add(candidate.device == FLASHSPARK_CPU ? "runs on the CPU only" : "runs on CUDA only");
  if (const FeatureSet missing = required & ~candidate.features) add("lacks " + names(missing));
  const int64_t widest = std::max(p.head_dim, p.head_dim_v);
  if (widest > candidate.max_head_dim)
    add("head_dim " + std::to_string(widest) + " > " + std::to_string(candidate.max_head_dim));
  if (candidate.device != p.device) return text;
  std::string why = candidate.unavailable != nullptr ? candidate.unavailable(p.device_index) : "";
  if (why.empty() && candidate.unsupported != nullptr) why = candidate.unsupported(p);
  if (!why.empty()) add(why);
  return text;
}

// The name that the caller, or else the environment, asks for; NULL: none.
const char *forced_name(const Params &p) {
  if (p.implementation != nullptr) return p.implementation;
  const std::string &name = environment().force_implementation;
  return name.empty() ? nullptr : name.c_str();
}

std::string problem_text(const Params &p, FeatureSet required) {
  std::string text = "problem: " + device_name(p) + ", q " + dtype_name(p.q.dtype) + ", kv " + dtype_name(p.k.dtype) +
                     ", out " + dtype_name(p.out.dtype) + ", num_seqs " + std::to_string(p.num_seqs) + ", heads " +
                     std::to_string(p.num_heads_q) + "/" + std::to_string(p.num_heads_kv) + ", head_dim " +
                     std::to_string(p.head_dim);
  if (p.head_dim_v != p.head_dim) text += "/" + std::to_string(p.head_dim_v);
  text += ", max_seqlen " + std::to_string(p.max_seqlen_q) + "/" + std::to_string(p.max_seqlen_k);
  if (is_paged(p)) text += ", page_size " + std::to_string(p.page_size);
  return text + "\nrequired: " + names(required) + "\n";
}

const Implementation *find(const Params &p, FeatureSet required) {
  const char *forced = forced_name(p);
  bool known = forced == nullptr;
  for (const Implementation &candidate : kImplementations) {
    if (forced != nullptr && std::strcmp(forced, candidate.name) != 0) continue;
    known = true;
    if (obstacles(candidate, p, required).empty()) return &candidate;
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
  const FeatureSet required = required_features(p);
  const Implementation *chosen = find(p, required);
  const bool forced = forced_name(p) != nullptr;
  std::string text = problem_text(p, required);
  for (const Implementation &candidate : kImplementations) {
    const std::string why_not = obstacles(candidate, p, required);
    text += std::string(candidate.name) + " (" + candidate.detail(p) + "): ";
    if (&candidate == chosen) {
      text += forced ? "chosen, as asked for\n" : "chosen\n";
      if (candidate.plan != nullptr) text += indented(candidate.plan(p));
    } else {
      text += why_not.empty() ? (forced ? "fits, but another was asked for\n" : "fits, comes later in the table\n")
                              : why_not + "\n";
    }
  }
  if (chosen == nullptr) text += "no implementation fits\n";
  return text;
}

const Implementation &choose(const Params &p) {
  if (const Implementation *chosen = find(p, required_features(p))) return *chosen;
  refuse("no implementation fits\n" + explain(p));
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
