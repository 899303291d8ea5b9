// flashspark doctor: what is installed, what will run, and how to fix what is wrong.
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <sstream>

#include "cases/backward.hpp"
#include "cli/cli.hpp"
#include "cli/doctor_findings.hpp"
#include "cli/gpu_run.hpp"
#include "cli/json.hpp"
#include "cli/machine.hpp"
#include "cli/measure.hpp"
#include "cli/python_env.hpp"
#include "cli/terminal.hpp"
#include "cli/vllm.hpp"
#include "cuda/fatbins.hpp"

namespace flashspark::cli {
namespace {

struct Choice {
  std::string problem;
  std::string implementation;  // empty if none supports the problem
  std::string reason;          // why it was chosen, or why none is supported
  std::string explanation;     // the full explanation
  std::string on_gpu;          // the implementation for the same problem in GPU memory; empty if none
  std::string gpu_explanation;
};

// Small problems of every common kind: dispatch depends on the kind of a problem, not on its size.
std::vector<cases::Case> common_problems() {
  cases::Case base;
  base.lens = {{64, 64}, {64, 64}};
  base.heads_q = 8, base.heads_kv = 2, base.head_dim = 128;
  base.causal = true;
  std::vector<cases::Case> list;
  const auto add = [&](const char *name, const std::function<void(cases::Case &)> &change) {
    list.push_back(base);
    list.back().name = name;
    change(list.back());
  };
  const auto paged = [](cases::Case &c) { c.kv_layout = cases::Layout::kPaged; };
  const auto decode = [&](cases::Case &c) { paged(c), c.lens = {{1, 64}, {1, 64}}; };
  add("prefill, bf16", [](cases::Case &) {});
  add("prefill, f32", [](cases::Case &c) { c.q_dtype = c.kv_dtype = c.out_dtype = FLASHSPARK_FLOAT32; });
  add("chunked prefill, paged, bf16", paged);
  add("decode, paged, bf16", decode);
  add("decode, paged, f16",
      [&](cases::Case &c) { decode(c), c.q_dtype = c.kv_dtype = c.out_dtype = FLASHSPARK_FLOAT16; });
  add("decode, fp8 KV", [&](cases::Case &c) {
    decode(c), c.kv_dtype = FLASHSPARK_FLOAT8_E4M3;
    c.k_descale = c.v_descale = cases::Descale::kPerTensor;
  });
  add("decode, sinks and window", [&](cases::Case &c) { decode(c), c.sinks = true, c.window_left = 31; });
  add("softcap, D = 256", [](cases::Case &c) { c.softcap = 50, c.head_dim = 256; });
  add("D = 512", [](cases::Case &c) { c.head_dim = 512; });
  add("D = 192, Dv = 128", [](cases::Case &c) { c.head_dim = 192, c.head_dim_v = 128; });
  add("PrefixLM, per token", [&](cases::Case &c) { paged(c), c.prefix_mode = FLASHSPARK_PREFIX_PER_TOKEN; });
  add("relative-position bias", [&](cases::Case &c) { paged(c), c.rel_extent = 32; });
  add("dropout", [](cases::Case &c) { c.dropout = 0.1f; });
  const auto gradients = [](cases::Case &c) { c.backward = true; };
  add("gradients, bf16", gradients);
  add("gradients, f32", [&](cases::Case &c) { gradients(c), c.q_dtype = c.kv_dtype = FLASHSPARK_FLOAT32; });
  add("gradients, sinks and window", [&](cases::Case &c) { gradients(c), c.sinks = true, c.window_left = 31; });
  add("gradients, softcap and dropout", [&](cases::Case &c) { gradients(c), c.softcap = 50, c.dropout = 0.1f; });
  add("gradients, D = 256", [&](cases::Case &c) { gradients(c), c.head_dim = 256; });
  add("gradients, D = 512", [&](cases::Case &c) { gradients(c), c.head_dim = 512; });
  return list;
}

flashspark_status explain(const flashspark_attention_params &p, std::string &text) {
  return flashspark_attention_explain(&p, text.data(), text.size());
}
flashspark_status explain(const flashspark_attention_backward_params &p, std::string &text) {
  return flashspark_attention_backward_explain(&p, text.data(), text.size());
}

// The choice for a problem whose params say that it is in GPU memory. Dispatch reads no pointer, so it need not be.
template <class Params>
void choose_on_gpu(const Params &params, Choice &choice) {
  std::string text(4096, '\0');
  if (explain(params, text) == FLASHSPARK_OK) choice.on_gpu = chosen(params);
  choice.gpu_explanation = text.c_str();
}

template <class Params>
void choose_on_cpu(const Params &params, Choice &choice) {
  std::string text(4096, '\0');
  const flashspark_status status = explain(params, text);
  choice.explanation = text.c_str();
  if (status != FLASHSPARK_OK) {
    choice.reason = flashspark_last_error();
    return;
  }
  choice.implementation = chosen(params);
  std::istringstream lines(choice.explanation);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with(choice.implementation)) choice.reason = line.substr(choice.implementation.size());
  }
  // " (AVX2, 2 threads): chosen" or "...: chosen, as asked for"
  const size_t open = choice.reason.find('('), close = choice.reason.rfind("): ");
  if (open != std::string::npos && close != std::string::npos) {
    const bool forced = choice.reason.ends_with("as asked for");
    choice.reason = (forced ? "asked for, " : "first that fits, ") + choice.reason.substr(open + 1, close - open - 1);
  }
}

Choice choice_for(const cases::Case &spec, bool gpu) {
  Choice choice;
  choice.problem = spec.name;
  if (spec.backward) {
    cases::BackwardProblem problem(spec);
    choose_on_cpu(problem.params, choice);
    problem.params.forward.device = FLASHSPARK_CUDA;
    if (gpu) choose_on_gpu(problem.params, choice);
  } else {
    cases::Problem problem(spec);
    choose_on_cpu(problem.params, choice);
    problem.params.device = FLASHSPARK_CUDA;
    if (gpu) choose_on_gpu(problem.params, choice);
  }
  return choice;
}

std::vector<Choice> choices(bool gpu) {
  std::vector<Choice> list;
  for (const cases::Case &spec : common_problems()) list.push_back(choice_for(spec, gpu));
  return list;
}

Json doctor_json(const std::vector<Choice> &chosen, const PythonEnvironment &env, const VllmReport &vllm,
                 const VllmReport &programs, const std::vector<Finding> &findings, const Limits *limits, bool healthy) {
  Json report = report_header();
  report["limits"] = limits ? to_json(*limits) : Json();
  const bool none = cuda::fatbins().empty();
  report["kernels"] = {{"architectures", none ? Json() : Json(cuda::fatbin_architectures())},
                       {"missing", none ? Json(cuda::why_no_fatbins()) : Json()}};
  Json &implementations = report["implementations"] = Json::array();
  for (int n = 0; const char *name = flashspark_implementation_name(n); ++n) {
    implementations.push_back({{"name", name}, {"description", flashspark_implementation_description(n)}});
  }
  Json &problems = report["problems"] = Json::array();
  for (const Choice &c : chosen) {
    problems.push_back({{"problem", c.problem},
                        {"implementation", c.implementation.empty() ? Json() : Json(c.implementation)},
                        {"reason", c.reason},
                        {"explanation", c.explanation}});
    if (c.gpu_explanation.empty()) continue;
    problems.back()["gpu_implementation"] = c.on_gpu.empty() ? Json() : Json(c.on_gpu);
    problems.back()["gpu_explanation"] = c.gpu_explanation;
  }
  Json packages = Json::object();
  for (const auto &[name, package] : env.packages) packages[name] = package.version;
  report["python"] = {{"interpreter", env.interpreter.empty() ? Json() : Json(env.interpreter)},
                      {"found_by", env.found_by},
                      {"site_folders", env.site_folders},
                      {"packages", packages},
                      {"loaded_version", env.loaded_version.empty() ? Json() : Json(env.loaded_version)},
                      {"shim_files", env.shim_files},
                      {"hook_files", hook_files(env)}};
  report["vllm"] = vllm.json;
  report["programs"] = programs.json;
  Json &switches = report["switches"] = Json::array();
  for (const Switch &each : kSwitches) {
    const std::string value = value_of(each);
    switches.push_back(
        {{"name", each.name}, {"value", value.empty() ? Json() : Json(value)}, {"meaning", each.meaning}});
  }
  Json &list = report["findings"] = Json::array();
  for (const Finding &f : findings) {
    list.push_back(
        {{"level", level_name(f.level)}, {"text", f.text}, {"mend", f.mend.empty() ? Json() : Json(f.mend)}});
  }
  report["healthy"] = healthy;
  return report;
}

void line(const std::string &name, const std::string &value) {
  fmt::print("  {} {}\n", paint(Colour::kDim, fmt::format("{:<10}", name)), value);
}

void print_machine(const Machine &m, const GpuFacts &gpu, const Limits *limits) {
  fmt::print("{}\n", paint(Colour::kBold, "flashspark " + m.version));
  line("CPU", fmt::format("{}, {} cores, {}, {} threads, {:.1f} GiB", m.cpu, m.cores, m.simd, m.threads, m.memory_gib));
  line("system", fmt::format("{}, kernel {}, {}", m.os, m.kernel, m.arch));
  if (limits) {
    line("limits", fmt::format("{:.0f} GFLOP/s float32 multiply-add, {:.1f} GB/s copy", limits->flops / 1e9,
                               limits->bytes / 1e9));
  }
  for (const Gpu &g : gpu.gpus) {
    line("GPU", fmt::format("{}, compute capability {}.{}, {:.0f} GiB", g.name, g.major, g.minor, g.memory_gib));
  }
  if (gpu.gpus.empty()) line("GPU", "none");
  if (!gpu.driver.empty() || gpu.cuda_version > 0) {
    line("driver", fmt::format("{}, CUDA {}.{}", gpu.driver.empty() ? "unknown version" : gpu.driver,
                               gpu.cuda_version / 1000, gpu.cuda_version % 1000 / 10));
  }
  std::string kernels = fmt::format("none: {}", cuda::why_no_fatbins());
  if (!cuda::fatbins().empty()) kernels = fmt::format("for {}", cuda::fatbin_architectures());
  if (!gpu.gpus.empty() && gpu_unavailable_reason().empty())
    kernels += fmt::format("; the GPU takes {}", cuda::architecture_name(cuda::device_facts(0).machine.arch));
  line("kernels", kernels);
  line("toolkit", gpu.toolkit.empty() ? "none (not needed to run)" : gpu.toolkit + " " + gpu.toolkit_version);
}

void print_python(const PythonEnvironment &env) {
  if (env.interpreter.empty()) return line("Python", "none");
  line("Python", env.interpreter + " (" + env.found_by + ")");
  std::string packages;
  for (const auto &[name, package] : env.packages)
    packages += (packages.empty() ? "" : ", ") + name + " " + package.version;
  line("packages", packages.empty() ? "none of flashspark's" : packages);
}

void print_choices(const std::vector<Choice> &chosen, bool gpu_runs, bool verbose) {
  std::vector<std::string> headers{"problem", "runs on", "because"};
  if (gpu_runs) headers.insert(headers.begin() + 1, "in GPU memory");
  Table table(headers);
  for (const Choice &c : chosen) {
    std::vector<std::string> cells{c.problem, c.implementation.empty() ? "nothing" : c.implementation,
                                   c.implementation.empty() ? "see below" : c.reason};
    if (gpu_runs) cells.insert(cells.begin() + 1, c.on_gpu.empty() ? "not offered" : c.on_gpu);
    table.row(cells, c.implementation.empty() ? Colour::kRed : Colour::kPlain);
  }
  table.print();
  if (verbose) {
    for (const Choice &c : chosen)
      fmt::print("\n{}\n{}", paint(Colour::kBold, c.problem), c.gpu_explanation + c.explanation);
  }
}

void print_switches() {
  Table table({"switch", "value", "meaning"});
  for (const Switch &each : kSwitches) table.row({each.name, value_of(each), each.meaning});
  table.print();
}

void print_findings(const std::vector<Finding> &findings) {
  for (const Finding &f : findings) {
    const Colour colour = f.level == Finding::kNote      ? Colour::kDim
                          : f.level == Finding::kWarning ? Colour::kYellow
                                                         : Colour::kRed;
    fmt::print("  {} {}\n", paint(colour, fmt::format("{:<8}", level_name(f.level))), f.text);
    if (!f.mend.empty()) fmt::print("           {} {}\n", paint(Colour::kDim, "mend:"), f.mend);
  }
}

}  // namespace

int doctor(const DoctorOptions &options) {
  const Machine facts = machine();
  const GpuFacts gpu = gpu_facts();
  const PythonEnvironment env = python_environment();
  const bool gpu_runs = !gpu.gpus.empty() && gpu_unavailable_reason().empty();
  const std::vector<Choice> chosen = choices(gpu_runs);
  Limits measured;
  if (options.bandwidth) measured = measure_limits(facts.threads);
  const Limits *limits = options.bandwidth ? &measured : nullptr;

  std::vector<Finding> findings;
  look_at_gpu(gpu, findings);
  look_at_machine(facts, findings);
  look_at_switches(findings);
  for (const Choice &c : chosen) {
    // If all problems fail for the same reason, report it once.
    const bool told = !findings.empty() && findings.back().text.ends_with(": " + c.reason);
    if (c.implementation.empty() && !told) {
      findings.push_back({Finding::kError, "nothing runs \"" + c.problem + "\": " + c.reason,
                          "unset FLASHSPARK_FORCE_IMPLEMENTATION if it is set"});
    }
  }
  look_at_python(env, gpu, findings);
  const VllmReport vllm = vllm_report(env);
  const VllmReport programs = programs_report(env);
  for (const VllmFinding &f : vllm.findings) findings.push_back({level_of(f.level), f.text, f.mend});
  int errors = 0, warnings = 0;
  for (const Finding &f : findings) errors += f.level == Finding::kError, warnings += f.level == Finding::kWarning;

  if (options.json) {
    print_json(doctor_json(chosen, env, vllm, programs, findings, limits, errors == 0));
    return errors ? kFailed : kOk;
  }
  print_machine(facts, gpu, limits);
  print_python(env);
  for (const auto &[name, value] : vllm.lines) line(name, value);
  for (const auto &[name, value] : programs.lines) line(name, value);
  fmt::print("\n");
  print_choices(chosen, gpu_runs, options.verbose);
  fmt::print("\n");
  print_switches();
  fmt::print("\n");
  print_findings(findings);
  fmt::print("\n{}\n", errors     ? paint(Colour::kRed, fmt::format("{} errors, {} warnings", errors, warnings))
                       : warnings ? paint(Colour::kYellow, fmt::format("no errors, {} warnings", warnings))
                                  : paint(Colour::kGreen, "no troubles"));
  return errors ? kFailed : kOk;
}

}  // namespace flashspark::cli
