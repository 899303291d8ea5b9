// flashspark bench: the time of each problem, the rates it reaches, and the fraction of the machine's limit.
#include "cli/bench.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <type_traits>

#include "cli/plot.hpp"

namespace flashspark::cli {
namespace {

constexpr size_t kCopies = 3;  // problems with different values, used in turn, so that no call finds its inputs in L2
constexpr size_t kFewestCalls = 5, kMostCalls = 2000;

cases::Problem problem_of(const cases::Case &spec, std::type_identity<cases::Problem>) {
  return cases::Problem(spec);
}
// The oracle's forward pass would take minutes.
cases::BackwardProblem problem_of(const cases::Case &spec, std::type_identity<cases::BackwardProblem>) {
  return cases::BackwardProblem(spec, "cpu-engine");
}

// On the GPU one set of values suffices: L2 is overwritten between calls.
template <class Problem>
Timing measure_on(GpuSession &gpu, const cases::Case &spec, const BenchOptions &options) {
  Timing t;
  t.spec = &spec;
  Problem problem = problem_of(spec, std::type_identity<Problem>());
  t.work = work(problem);
  t.roof = roofline(t.work, gpu.limits());
  GpuProblem copy(problem, 0);
  const char *name = options.implementation.empty() ? nullptr : options.implementation.c_str();
  flashspark_status status = FLASHSPARK_OK;
  for (int n = 0; n < 3 && status == FLASHSPARK_OK; ++n) gpu.time(copy, name, status);
  if (status != FLASHSPARK_OK) return t.refuse(status, options), t;
  t.implementation = chosen(copy.params());
  t.take(options.seconds, [&](size_t) { return gpu.time(copy, name, status); });
  return t;
}

template <class Problem>
Timing measure(const cases::Case &spec, const BenchOptions &options, const Limits &limits) {
  Timing t;
  t.spec = &spec;
  t.implementation = options.implementation;
  std::vector<Problem> problems;
  for (size_t n = 0; n < kCopies; ++n) {
    cases::Case other = spec;
    other.seed += 1000 * n;
    problems.push_back(problem_of(other, std::type_identity<Problem>()));
  }
  t.work = work(problems[0]);
  t.roof = roofline(t.work, limits);
  const char *name = options.implementation.empty() ? nullptr : options.implementation.c_str();
  flashspark_status status = FLASHSPARK_OK;
  for (Problem &problem : problems) {  // warm-up: start the threads, touch the pages of out
    time_call(problem, name, options.threads, status);
    if (status != FLASHSPARK_OK) return t.refuse(status, options), t;
  }
  if (t.implementation.empty()) t.implementation = chosen(problems[0].params);
  t.take(options.seconds, [&](size_t n) { return time_call(problems[n % kCopies], name, options.threads, status); });
  return t;
}

template <class Problem>
Timing measure(const Target &target, const cases::Case &spec, const BenchOptions &options) {
  return target.gpu ? measure_on<Problem>(*target.gpu, spec, options) : measure<Problem>(spec, options, target.limits);
}

std::string rate_text(const Timing &t) {
  return t.roof.memory_bound ? fmt::format("{:.1f} GB/s", t.work.bytes / t.median() / 1e9)
                             : fmt::format("{:.1f} GFLOP/s", t.work.flops / t.median() / 1e9);
}

Json timing_json(const Timing &t) {
  Json json = {{"case", to_json(*t.spec)}};
  if (!t.error.empty()) {
    json["error"] = t.error;
    return json;
  }
  json["implementation"] = t.implementation;
  json["median_seconds"] = t.median();
  json["fastest_seconds"] = t.seconds.front();
  json["p90_seconds"] = t.at(0.9);
  json["calls"] = t.seconds.size() * t.calls;
  json["flops"] = t.work.flops;
  json["bytes"] = t.work.bytes;
  json["gflops_per_second"] = t.work.flops / t.median() / 1e9;
  json["gb_per_second"] = t.work.bytes / t.median() / 1e9;
  json["limited_by"] = t.roof.memory_bound ? "memory" : "arithmetic";
  json["of_limit"] = t.roof.seconds / t.median();
  return json;
}

}  // namespace

Target::Target(const BenchOptions &options) {
  // A CPU implementation that is asked for by name is timed on the CPU.
  const bool wants_cpu = !options.implementation.empty() && options.implementation != kGpuImplementation;
  gpu = open_gpu(options.cpu || wants_cpu);
  select_implementations(options.implementation, gpu != nullptr);
  facts = machine();
  threads = options.threads > 0 ? options.threads : facts.threads;
  limits = gpu ? gpu->limits() : measure_limits(threads);
}

std::string Target::text() const {
  if (gpu) return gpu->text();
  return fmt::format("{}, {}, {} threads; limits measured here: {:.0f} GFLOP/s float32 multiply-add, {:.1f} GB/s copy",
                     facts.cpu, facts.simd, threads, limits.flops / 1e9, limits.bytes / 1e9);
}

void Timing::refuse(flashspark_status status, const BenchOptions &options) {
  error = flashspark_last_error();
  if (status == FLASHSPARK_UNSUPPORTED && options.implementation.empty()) left_out = "not offered";
}

void Timing::take(double most_seconds, const std::function<double(size_t)> &call) {
  double spent = 0;
  while ((spent < most_seconds || seconds.size() < kFewestCalls) && seconds.size() < kMostCalls) {
    seconds.push_back(call(seconds.size()));
    spent += seconds.back();
  }
  std::sort(seconds.begin(), seconds.end());
}

std::vector<Timing> time_all(const std::vector<cases::Case> &all,
                             const std::function<Timing(const cases::Case &)> &measure) {
  std::vector<Timing> timings;
  Progress progress(all.size());
  for (const cases::Case &spec : all) {
    progress.step(spec.name);
    timings.push_back(measure(spec));
  }
  return timings;
}

Json report(const Target &target, const std::vector<Timing> &timings) {
  Json json = report_header();
  if (target.gpu) {
    json["gpu"] = to_json(*target.gpu);
  } else {
    json["threads"] = target.threads;
    json["limits"] = to_json(target.limits);
  }
  Json &results = json["results"] = Json::array();
  for (const Timing &t : timings) results.push_back(timing_json(t));
  return json;
}

void add_untimed(Table &table, const Timing &t) {
  t.failed() ? table.row({t.spec->name, "failed"}, Colour::kRed)
             : table.row({t.spec->name, t.left_out}, Colour::kYellow);
}

void print_failures(const std::vector<Timing> &timings) {
  for (const Timing &t : timings) {
    if (t.failed()) fmt::print("\n  {}: {}\n", paint(Colour::kRed, t.spec->name), t.error);
  }
}

int exit_status(const std::vector<Timing> &timings) {
  return std::any_of(timings.begin(), timings.end(), [](const Timing &t) { return t.failed(); }) ? kFailed : kOk;
}

void plot_limit_shares(const std::vector<Timing> &timings, const Target &target, const BenchOptions &options) {
  std::vector<Bar> bars;
  for (const Timing &t : timings) {
    if (!t.error.empty()) continue;
    bars.push_back({t.spec->name, seconds_text(t.median()) + " · " + rate_text(t), t.roof.seconds / t.median(),
                    t.roof.memory_bound});
  }
  write_bars(options.plot, "flashspark " + target.facts.version + ": share of the machine's limit", target.text(),
             bars);
  if (!options.json) fmt::print("plot: {}\n", options.plot);
}

int bench(const BenchOptions &options) {
  std::vector<cases::Case> all;
  const auto add = [&](std::vector<cases::Case> more) {
    for (cases::Case &c : more) all.push_back(std::move(c));
  };
  if (!options.backward) add(cases::three_guide_checks());
  add(options.backward ? cases::backward_bench_cases() : cases::bench_cases());
  if (options.matrix) add(options.backward ? cases::backward_matrix() : cases::feature_matrix());
  all = select(std::move(all), options.filter, options.seed);
  if (options.list) return print_list(all, options.json), kOk;
  if (!options.plot.empty()) require_writable(options.plot);
  const Target target(options);
  const std::vector<Timing> timings = time_all(all, [&](const cases::Case &spec) {
    return options.backward ? measure<cases::BackwardProblem>(target, spec, options)
                            : measure<cases::Problem>(target, spec, options);
  });
  if (options.json) {
    print_json(report(target, timings));
  } else {
    Table table({"case", "implementation", ">median", ">fastest", ">calls", ">GFLOP/s", ">GB/s", ">of limit", "limit"});
    for (const Timing &t : timings) {
      if (!t.error.empty()) {
        add_untimed(table, t);
        continue;
      }
      table.row({t.spec->name, t.implementation, seconds_text(t.median()), seconds_text(t.seconds.front()),
                 std::to_string(t.seconds.size()), fmt::format("{:.1f}", t.work.flops / t.median() / 1e9),
                 fmt::format("{:.1f}", t.work.bytes / t.median() / 1e9), percent_text(t.roof.seconds / t.median()),
                 t.roof.memory_bound ? "memory" : "arithmetic"});
    }
    table.print();
    print_failures(timings);
    fmt::print("\n{}\n", paint(Colour::kDim, target.text()));
  }
  if (!options.plot.empty()) plot_limit_shares(timings, target, options);
  return exit_status(timings);
}

}  // namespace flashspark::cli
