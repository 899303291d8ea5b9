// flashspark bench flex: score functions and mask functions beside the kernel without functions, on the shapes of
// bench/gpu/flex.py.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <map>
#include <optional>
#include <span>
#include <utility>

#include "cli/bench.hpp"
#include "cli/flex_functions.hpp"
#include "dispatch.hpp"
#include "error.hpp"

namespace flashspark::cli {
namespace {

constexpr int64_t kWidth = 1024;      // of windows, documents and prefixes, in long sequences
constexpr double kRunSeconds = 3e-4;  // duration of the calls between two events, long enough to hide the events
constexpr double kMostCalls = 32;

struct FlexShape {
  const char *name;
  int64_t batch, heads_q, heads_kv, tokens, head_dim;
};
constexpr FlexShape kShapes[] = {{"A", 4, 32, 8, 4096, 128}, {"B", 1, 16, 16, 8192, 64}, {"C", 1, 32, 8, 16384, 128}};
// A hundredth of the work and less.
constexpr FlexShape kCpuShapes[] = {{"A", 1, 4, 1, 1024, 128}, {"B", 1, 4, 4, 2048, 64}, {"C", 1, 4, 1, 4096, 128}};

struct FlexCase {
  FlexShape shape;
  FlexFunction function;
};

// A selected case, and what its measurement found beside the timing.
struct Row {
  FlexCase what;
  double first_seconds = 0;  // of the first call, in which a GPU's kernel is compiled
};

cases::Case case_of(const FlexCase &what) {
  const FlexShape &s = what.shape;
  cases::Case c;
  c.name = fmt::format("{}/{}", s.name, what.function.name);
  c.group = s.name;
  c.lens.assign(static_cast<size_t>(s.batch), {s.tokens, s.tokens});
  c.heads_q = s.heads_q, c.heads_kv = s.heads_kv, c.head_dim = s.head_dim;
  c.q_layout = c.kv_layout = cases::Layout::kDense;
  c.causal = what.function.kind != FlexKind::mask;
  c.lse = false;
  return c;
}

Work work_of(const FlexCase &what) {
  const FlexShape &s = what.shape;
  const double rows = static_cast<double>(s.batch * s.tokens * s.head_dim) * flashspark_dtype_size(FLASHSPARK_BFLOAT16);
  const double pairs = kept_pairs(what.function, s.tokens) * static_cast<double>(s.batch * s.heads_q);
  return {4 * pairs * static_cast<double>(s.head_dim), 2 * rows * static_cast<double>(s.heads_q + s.heads_kv)};
}

// What a problem's params point to beside the problem's own memory.
class FlexArguments {
 public:
  FlexArguments(const FlexCase &what, bool gpu) : gpu_(gpu), what_(what) {
    if (what.function.kind != FlexKind::none) mod_ = make_mod_of(what.function);
  }

  void give(flashspark_attention_params &p) {
    const FlexFunction &function = what_.function;
    if (function.kind == FlexKind::none) return;
    (function.kind == FlexKind::score ? p.score_mod : p.mask_mod).mod = mod_.get();
    if (function.slopes) {
      std::vector<float> slopes;
      for (int64_t h = 1; h <= p.num_heads_q; ++h)
        slopes.push_back(std::exp2(-8.0f * static_cast<float>(h) / static_cast<float>(p.num_heads_q)));
      captured_ = {.data = keep(slopes), .dtype = FLASHSPARK_FLOAT32, .rank = 1, .shape = {}, .strides = {}};
      captured_.shape[0] = p.num_heads_q, captured_.strides[0] = 1;
      p.score_mod.tensors = &captured_;
      p.score_mod.num_tensors = 1;
    }
    if (function.kind != FlexKind::mask) return;
    const FlexLists lists(function, what_.shape.tokens);
    p.block_size_q = p.block_size_k = kFlexBlock;
    p.block_batch = p.block_heads = 1;
    p.num_blocks_q = lists.blocks;
    p.masked_blocks = list(lists.masked, lists.blocks);
    p.full_blocks = list(lists.full, lists.blocks);
  }

 private:
  template <class T>
  const T *keep(const std::vector<T> &values) {
    memory_.emplace_back(gpu_, values.size() * sizeof(T), std::as_bytes(std::span(values)));
    return reinterpret_cast<const T *>(memory_.back().data());
  }
  flashspark_block_list list(const FlexLists::List &from, int64_t blocks) {
    flashspark_block_list to{};
    to.counts = keep(from.counts);
    to.indices = keep(from.indices);
    to.width = to.index_block_stride = blocks;
    to.count_block_stride = 1;
    return to;
  }

  bool gpu_;
  const FlexCase &what_;
  Mod mod_;
  std::deque<Memory> memory_;
  flashspark_captured_tensor captured_{};
};

void measure(Timing &t, Row &row, const Target &target, const BenchOptions &options) {
  const bool gpu = target.gpu != nullptr;
  cases::Problem problem(*t.spec);
  std::optional<GpuProblem<cases::Problem>> copy;
  if (gpu) copy.emplace(problem, 0);
  flashspark_attention_params p = gpu ? copy->params() : problem.params;
  FlexArguments arguments(row.what, gpu);
  arguments.give(p);
  p.num_threads = options.threads;
  if (!options.implementation.empty()) p.implementation = options.implementation.c_str();
  flashspark_status status = flashspark_attention_workspace_size(&p, &p.workspace_size);
  if (status != FLASHSPARK_OK) return t.refuse(status, options);
  const Memory workspace(gpu, p.workspace_size);
  p.workspace = workspace.data();
  t.implementation = choose(p).name;
  const auto calls = [&] {
    for (size_t n = 0; n < t.calls && status == FLASHSPARK_OK; ++n) status = flashspark_attention_forward(&p);
  };
  const auto on_host = [&] {
    const auto start = std::chrono::steady_clock::now();
    calls();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  const auto seconds = [&](size_t) { return gpu ? target.gpu->time(calls) / static_cast<double>(t.calls) : on_host(); };
  row.first_seconds = on_host();
  if (status != FLASHSPARK_OK) return t.refuse(status, options);
  const double once = std::min(seconds(0), seconds(0));
  if (gpu) t.calls = static_cast<size_t>(std::clamp(kRunSeconds / once, 1.0, kMostCalls));
  t.take(options.seconds / static_cast<double>(t.calls), seconds);
  if (status != FLASHSPARK_OK) t.refuse(status, options);
}

Timing measure(const cases::Case &spec, Row &row, const Target &target, const BenchOptions &options) {
  Timing t;
  t.spec = &spec;
  t.work = work_of(row.what);
  t.roof = roofline(t.work, target.limits);
  try {
    measure(t, row, target, options);
  } catch (const Error &e) {
    if (e.status() != FLASHSPARK_OUT_OF_MEMORY) throw;
    t.error = fmt::format("{:.1f} GB: not so much memory is free", t.work.bytes / 1e9);
    t.left_out = "does not fit";
  }
  return t;
}

std::vector<FlexCase> flex_cases(std::span<const FlexShape> shapes) {
  std::vector<FlexCase> all;
  for (const FlexShape &shape : shapes) {
    // A sequence is at least four windows long, so that most of a window's blocks are left out.
    for (const FlexFunction &function : flex_functions(std::min(kWidth, shape.tokens / 4)))
      all.push_back({shape, function});
  }
  return all;
}

// The median of the kernel without functions on each shape, also where that is not among the cases: 0 where it failed.
std::map<std::string, double> plain_seconds(const std::vector<Timing> &timings, const std::vector<FlexCase> &all,
                                            const Target &target, const BenchOptions &options) {
  std::map<std::string, double> plain;
  const auto take = [&](const Timing &t) { plain[t.spec->group] = t.error.empty() ? t.median() : 0; };
  for (const Timing &t : timings) {
    if (t.spec->name == t.spec->group + "/none") take(t);
  }
  for (const Timing &t : timings) {
    if (plain.contains(t.spec->group)) continue;
    const std::string name = t.spec->group + "/none";
    const auto found = std::find_if(all.begin(), all.end(), [&](const FlexCase &c) { return case_of(c).name == name; });
    cases::Case spec = case_of(*found);
    spec.seed = t.spec->seed;
    Row row{*found};
    take(measure(spec, row, target, options));
  }
  return plain;
}

void print(const std::vector<Timing> &timings, const std::vector<Row> &rows, const std::map<std::string, double> &plain,
           const Target &target) {
  Table table({"case", "implementation", ">median", ">first", ">calls", ">GFLOP/s", ">GB/s", ">of limit", ">of plain"});
  for (size_t n = 0; n < timings.size(); ++n) {
    const Timing &t = timings[n];
    if (!t.error.empty()) {
      add_untimed(table, t);
      continue;
    }
    const double of = plain.at(t.spec->group);
    table.row({t.spec->name, t.implementation, seconds_text(t.median()), seconds_text(rows[n].first_seconds),
               std::to_string(t.calls * t.seconds.size()), fmt::format("{:.1f}", t.work.flops / t.median() / 1e9),
               fmt::format("{:.1f}", t.work.bytes / t.median() / 1e9), percent_text(t.roof.seconds / t.median()),
               of > 0 ? fmt::format("{:.2f}", t.median() / of) : "-"});
  }
  table.print();
  print_failures(timings);
  fmt::print(
      "\nof plain: time beside the causal kernel without functions; first: the first call, in which a GPU's kernel is "
      "compiled\n{}\n",
      paint(Colour::kDim, target.text()));
}

}  // namespace

int bench_flex(const BenchOptions &options) {
  const bool on_gpu = !options.cpu && gpu_unavailable_reason().empty() &&
                      (options.implementation.empty() || options.implementation == kGpuImplementation);
  const std::vector<FlexCase> all = flex_cases(on_gpu || options.full ? std::span(kShapes) : std::span(kCpuShapes));
  std::vector<cases::Case> named;
  named.reserve(all.size());
  for (const FlexCase &each : all) named.push_back(case_of(each));
  named = select(std::move(named), options.filter, options.seed);
  if (options.list) return print_list(named, options.json), kOk;
  if (!options.plot.empty()) require_writable(options.plot);
  std::vector<Row> rows;
  for (const FlexCase &each : all) {
    const std::string name = case_of(each).name;
    if (std::any_of(named.begin(), named.end(), [&](const cases::Case &c) { return c.name == name; }))
      rows.push_back({each});
  }
  const Target target(options);
  size_t next = 0;
  const std::vector<Timing> timings =
      time_all(named, [&](const cases::Case &spec) { return measure(spec, rows[next++], target, options); });
  const std::map<std::string, double> plain = plain_seconds(timings, all, target, options);
  if (options.json) {
    Json json = report(target, timings);
    for (size_t n = 0; n < timings.size(); ++n) {
      const Timing &t = timings[n];
      if (!t.error.empty()) continue;
      Json &result = json["results"][n];
      result["first_seconds"] = rows[n].first_seconds;
      result["of_plain"] = plain.at(t.spec->group) > 0 ? Json(t.median() / plain.at(t.spec->group)) : Json();
    }
    print_json(json);
  } else {
    print(timings, rows, plain, target);
  }
  if (!options.plot.empty()) plot_limit_shares(timings, target, options);
  return exit_status(timings);
}

}  // namespace flashspark::cli
