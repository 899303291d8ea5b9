// flashspark verify: runs every case, results and gradients, on every implementation that supports it and compares with
// the oracle.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>

#include "cli/cli.hpp"
#include "cli/gpu_run.hpp"
#include "cli/json.hpp"
#include "cli/measure.hpp"
#include "cli/terminal.hpp"

namespace flashspark::cli {
namespace {

constexpr size_t kShortList = 40;  // up to this many cases print a line each; beyond, one line per group

// What the oracle gives.
cases::Result oracle(cases::Problem &problem) {
  return cases::reference(problem);
}
cases::Gradients oracle(cases::BackwardProblem &problem) {
  return problem.run("cpu-reference");
}

struct Outcome {
  const cases::Case *spec = nullptr;
  std::string implementation;
  enum { kPassed, kFailed, kSkipped } state = kPassed;
  std::string reason;            // of the failure or the skip
  cases::Comparison comparison;  // of gradients without lse
  double seconds = 0;
  Work work;
  double of_limit = 0;  // fraction; 0: unknown
};

std::string why_failed(const cases::Comparison &c) {
  std::string text;
  const auto add = [&](const std::string &reason) { text += (text.empty() ? "" : "; ") + reason; };
  if (c.ratio > 1) add(fmt::format("error is {:.2g} times the bound", c.ratio));
  if (!c.nonfinite_match) add("NaN or infinity where the oracle has none, or the reverse");
  if (!c.untouched) add("wrote outside the rows in use");
  return text;
}

// Compares the problem's results with the oracle's and says why they are wrong. On the GPU tensor cores take the
// probabilities in 16 bits.
void compare(Outcome &o, cases::Problem &problem, const cases::Result &expected) {
  const bool on_gpu = o.implementation == kGpuImplementation;
  std::vector<float> magnitudes;
  if (on_gpu) magnitudes = cases::magnitudes(problem);
  o.comparison = cases::compare(problem, problem.result(), expected, on_gpu ? &magnitudes : nullptr);
  o.reason = why_failed(o.comparison);
}

void compare(Outcome &o, cases::BackwardProblem &problem, const cases::Gradients &expected) {
  const cases::GradientComparison c = cases::compare_of(o.implementation, problem, problem.result(), expected);
  o.comparison.max_error = c.max_error;
  o.comparison.rms_error = c.rms_error;
  o.comparison.bound = c.bound;
  o.comparison.ratio = c.ratio;
  if (!c.passed()) o.reason = c.worst;
}

// Runs the problem on the GPU and copies the results back to the problem's own memory.
template <class Problem>
flashspark_status run_on(GpuSession &gpu, Problem &problem, const std::string &name, double &seconds) {
  GpuProblem copy(problem, 0);
  flashspark_status status = copy.launch(name.c_str());  // the first launch loads the kernel
  if (status != FLASHSPARK_OK) return status;
  seconds = gpu.time(copy, name.c_str(), status);
  copy.copy_results_back();
  return status;
}

template <class Problem, class Expected>
Outcome check(Problem &problem, const Expected &expected, const std::string &name, int threads, GpuSession *gpu) {
  Outcome o;
  o.implementation = name;
  flashspark_status status = FLASHSPARK_OK;
  problem.poison();
  if (name == kGpuImplementation) {
    status = run_on(*gpu, problem, name, o.seconds);
  } else {
    o.seconds = time_call(problem, name.c_str(), threads, status);
  }
  if (status == FLASHSPARK_UNSUPPORTED) {
    o.state = Outcome::kSkipped;
    o.reason = flashspark_last_error();
  } else if (status != FLASHSPARK_OK) {
    o.state = Outcome::kFailed;
    o.reason = flashspark_last_error();
  } else {
    compare(o, problem, expected);
    if (!o.comparison.passed()) o.state = Outcome::kFailed;
  }
  return o;
}

const char *state_name(const Outcome &o) {
  return o.state == Outcome::kPassed ? "pass" : o.state == Outcome::kFailed ? "FAIL" : "skip";
}
Colour state_colour(const Outcome &o) {
  return o.state == Outcome::kPassed ? Colour::kGreen : o.state == Outcome::kFailed ? Colour::kRed : Colour::kYellow;
}

void print_case_lines(const std::vector<const Outcome *> &outcomes) {
  Table table({"", "case", "implementation", ">max error", ">rms error", ">bound", ">of bound", ">time", ">GFLOP/s",
               ">of limit"});
  for (const Outcome *o : outcomes) {
    if (o->state == Outcome::kSkipped) {
      table.row({"skip", o->spec->name, o->implementation}, state_colour(*o));
      continue;
    }
    const cases::Comparison &c = o->comparison;
    table.row(
        {state_name(*o), o->spec->name, o->implementation, error_text(c.max_error), error_text(c.rms_error),
         error_text(c.bound), fmt::format("{:.2f}", c.ratio), seconds_text(o->seconds),
         o->work.flops > 0 ? fmt::format("{:.1f}", o->work.flops / o->seconds / 1e9) : "", percent_text(o->of_limit)},
        state_colour(*o));
  }
  table.print();
}

void print_group_lines(const std::vector<Outcome> &outcomes) {
  struct Sum {
    int passed = 0, failed = 0, skipped = 0;
    double max_error = 0, ratio = 0, seconds = 0;
  };
  std::vector<std::pair<std::string, std::string>> order;
  std::map<std::pair<std::string, std::string>, Sum> sums;
  for (const Outcome &o : outcomes) {
    const auto key = std::make_pair(o.spec->group, o.implementation);
    if (!sums.contains(key)) order.push_back(key);
    Sum &sum = sums[key];
    (o.state == Outcome::kPassed ? sum.passed : o.state == Outcome::kFailed ? sum.failed : sum.skipped) += 1;
    sum.max_error = std::max(sum.max_error, o.comparison.max_error);
    sum.ratio = std::max(sum.ratio, o.comparison.ratio);
    sum.seconds += o.seconds;
  }
  Table table({"", "group", "implementation", ">cases", ">failed", ">skipped", ">max error", ">of bound", ">time"});
  for (const auto &key : order) {
    const Sum &sum = sums[key];
    table.row(
        {sum.failed ? "FAIL" : "pass", key.first, key.second, std::to_string(sum.passed + sum.failed + sum.skipped),
         std::to_string(sum.failed), std::to_string(sum.skipped), error_text(sum.max_error),
         fmt::format("{:.2f}", sum.ratio), seconds_text(sum.seconds)},
        sum.failed ? Colour::kRed : Colour::kGreen);
  }
  table.print();
}

// feature -> implementation -> number of cases passed, or the failures
using Coverage = std::vector<std::pair<std::string, std::map<std::string, std::pair<int, int>>>>;

Coverage coverage(const std::vector<Outcome> &outcomes) {
  Coverage table;
  for (const Outcome &o : outcomes) {
    for (const std::string &feature : cases::features(*o.spec)) {
      auto row = std::find_if(table.begin(), table.end(), [&](const auto &r) { return r.first == feature; });
      if (row == table.end()) row = table.insert(table.end(), {feature, {}});
      auto &[passed, failed] = row->second[o.implementation];
      passed += o.state == Outcome::kPassed;
      failed += o.state == Outcome::kFailed;
    }
  }
  std::sort(table.begin(), table.end(), [](const auto &a, const auto &b) { return a.first < b.first; });
  return table;
}

void print_coverage(const Coverage &rows, const std::vector<std::string> &implementations) {
  std::vector<std::string> headers{"feature (cases passed)"};
  for (const std::string &name : implementations) headers.push_back(">" + name);
  Table table(headers);
  for (const auto &[feature, counts] : rows) {
    std::vector<std::string> cells{feature};
    bool any_failed = false;
    for (const std::string &name : implementations) {
      const auto it = counts.find(name);
      const auto [passed, failed] = it == counts.end() ? std::pair<int, int>{} : it->second;
      any_failed |= failed > 0;
      cells.push_back(failed ? fmt::format("{} FAILED", failed) : passed ? std::to_string(passed) : "not offered");
    }
    table.row(std::move(cells), any_failed ? Colour::kRed : Colour::kPlain);
  }
  table.print();
}

Json outcome_json(const Outcome &o) {
  Json json = {{"case", to_json(*o.spec)}, {"implementation", o.implementation}, {"result", state_name(o)}};
  if (!o.reason.empty()) json["reason"] = o.reason;
  if (o.state == Outcome::kSkipped) return json;
  const cases::Comparison &c = o.comparison;
  json["max_error"] = c.max_error;
  json["rms_error"] = c.rms_error;
  json["bound"] = c.bound;
  json["lse_max_error"] = c.lse_max_error;
  json["lse_rms_error"] = c.lse_rms_error;
  json["lse_bound"] = c.lse_bound;
  json["error_over_bound"] = c.ratio;
  json["nonfinite_match"] = c.nonfinite_match;
  json["untouched"] = c.untouched;
  json["seconds"] = o.seconds;
  json["flops"] = o.work.flops;
  json["bytes"] = o.work.bytes;
  json["of_limit"] = o.of_limit > 0 ? Json(o.of_limit) : Json();
  return json;
}

// What was asked for, and what came of it.
struct Verification {
  const VerifyOptions &options;
  std::vector<cases::Case> cases;
  std::vector<std::string> implementations;
  std::unique_ptr<GpuSession> gpu;
  Limits limits;
  std::vector<Outcome> outcomes;
  double seconds = 0, worst = 0;  // worst: error over bound
  int passed = 0, failed = 0, skipped = 0;
};

template <class Problem>
void run_case(Verification &v, const cases::Case &spec) {
  Problem problem(spec);
  const auto expected = oracle(problem);
  for (const std::string &name : v.implementations) {
    Outcome o = check(problem, expected, name, v.options.threads, v.gpu.get());
    if (expected.status != FLASHSPARK_OK) {
      o.state = Outcome::kFailed;
      o.reason = "the oracle: " + expected.error;
    }
    o.spec = &spec;
    o.work = work(problem);
    const Roofline roof = roofline(o.work, name == kGpuImplementation ? v.gpu->limits() : v.limits);
    // A call of a few microseconds says nothing about the limits.
    if (roof.seconds > 20e-6 && o.state == Outcome::kPassed) o.of_limit = roof.seconds / o.seconds;
    (o.state == Outcome::kPassed ? v.passed : o.state == Outcome::kFailed ? v.failed : v.skipped) += 1;
    v.worst = std::max(v.worst, o.comparison.ratio);
    v.outcomes.push_back(std::move(o));
  }
}

void run(Verification &v) {
  const auto start = std::chrono::steady_clock::now();
  v.limits = measure_limits(v.options.threads);
  Progress progress(v.cases.size());
  for (const cases::Case &spec : v.cases) {
    progress.step(spec.name);
    spec.backward ? run_case<cases::BackwardProblem>(v, spec) : run_case<cases::Problem>(v, spec);
  }
  v.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Json report_of(const Verification &v) {
  Json report = report_header();
  report["limits"] = to_json(v.limits);
  if (v.gpu) report["gpu"] = to_json(*v.gpu);
  report["summary"] = {{"cases", v.cases.size()}, {"passed", v.passed},   {"failed", v.failed},
                       {"skipped", v.skipped},    {"seconds", v.seconds}, {"worst_error_over_bound", v.worst}};
  report["implementations"] = v.implementations;
  Json &features = report["coverage"] = Json::object();
  for (const auto &[feature, counts] : coverage(v.outcomes)) {
    for (const auto &[name, count] : counts)
      features[feature][name] = {{"passed", count.first}, {"failed", count.second}};
  }
  Json &results = report["results"] = Json::array();
  for (const Outcome &o : v.outcomes) results.push_back(outcome_json(o));
  return report;
}

void print(const Verification &v) {
  const bool all_lines = v.options.verbose || v.outcomes.size() <= kShortList;
  std::vector<const Outcome *> lines;
  for (const Outcome &o : v.outcomes) {
    if (all_lines || o.spec->group == "guide" || o.state == Outcome::kFailed) lines.push_back(&o);
  }
  if (!lines.empty()) print_case_lines(lines);
  if (!all_lines) fmt::print("\n"), print_group_lines(v.outcomes);
  for (const Outcome &o : v.outcomes) {
    if (o.state == Outcome::kFailed)
      fmt::print("\n  {} on {}: {}\n", paint(Colour::kRed, o.spec->name), o.implementation, o.reason);
  }
  fmt::print("\n");
  print_coverage(coverage(v.outcomes), v.implementations);
  fmt::print("\n{}  {} checks of {} cases passed{}{} in {}\n",
             v.failed ? paint(Colour::kRed, "FAILED") : paint(Colour::kGreen, "PASSED"), v.passed, v.cases.size(),
             v.failed ? fmt::format(", {} failed", v.failed) : "",
             v.skipped ? fmt::format(", {} skipped", v.skipped) : "", seconds_text(v.seconds));
  fmt::print("{}\n", paint(Colour::kDim,
                           fmt::format("limits measured here: {:.0f} GFLOP/s float32 multiply-add, {:.1f} GB/s copy",
                                       v.limits.flops / 1e9, v.limits.bytes / 1e9)));
  if (v.gpu) fmt::print("{}\n", paint(Colour::kDim, v.gpu->text()));
  if (!v.options.report.empty()) fmt::print("report: {}\n", v.options.report);
}

}  // namespace

int verify(const VerifyOptions &options) {
  std::vector<cases::Case> all = cases::three_guide_checks();
  for (cases::Case &c : cases::feature_matrix()) all.push_back(std::move(c));
  for (cases::Case &c : cases::backward_matrix()) all.push_back(std::move(c));
  all = select(std::move(all), options.filter, options.seed);
  if (options.list) return print_list(all, options.json), kOk;
  if (!options.report.empty()) require_writable(options.report);
  std::unique_ptr<GpuSession> gpu = open_gpu(options.cpu);
  std::vector<std::string> implementations = select_implementations(options.implementation, gpu != nullptr);
  Verification v{options, std::move(all), std::move(implementations), std::move(gpu), {}, {}};
  run(v);
  if (options.json || !options.report.empty()) {
    const Json report = report_of(v);
    if (!options.report.empty()) write_json(report, options.report);
    if (options.json) print_json(report);
  }
  if (!options.json) print(v);
  return v.failed ? kFailed : kOk;
}

}  // namespace flashspark::cli
