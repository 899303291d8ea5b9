#include "cli/doctor_findings.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdlib>
#include <string_view>

#include "cli/gpu_run.hpp"
#include "cli/measure.hpp"
#include "cuda/driver.hpp"
#include "cuda/fatbins.hpp"
#include "flashspark/flashspark.h"

namespace flashspark::cli {
namespace {

constexpr char kUpdateDriverMend[] = "install the NVIDIA driver 580 or newer";
constexpr char kReinstall[] = "install it again: pip install --no-deps --force-reinstall flashspark-*.whl";

bool built_without_kernels() {
  return std::string_view(cuda::why_no_fatbins()).find("built without") != std::string_view::npos;
}

void look_for_a_gpu(const GpuFacts &gpu, std::vector<Finding> &findings) {
  const char *visible = std::getenv("CUDA_VISIBLE_DEVICES");
  if (!gpu.driver_found && !gpu.driver.empty()) {
    findings.push_back({Finding::kWarning, "kernel driver " + gpu.driver + " is loaded but libcuda.so.1 is not found",
                        "in a container, start it with --gpus all; else install the driver's user libraries"});
  } else if (gpu.none && visible != nullptr) {
    findings.push_back(
        {Finding::kWarning, gpu.error, "unset CUDA_VISIBLE_DEVICES, or set it to one that nvidia-smi -L lists"});
  } else if (gpu.none && !gpu.driver.empty()) {
    findings.push_back({Finding::kWarning, gpu.error,
                        "nvidia-smi -L must list one; a GPU in MIG mode needs an instance (nvidia-smi mig -lgi), and a "
                        "container --gpus all"});
  } else if (gpu.driver_found && !gpu.none) {
    findings.push_back({Finding::kWarning, "the NVIDIA driver's library gives no GPU: " + gpu.error,
                        gpu.cuda_version == 0 ? kUpdateDriverMend
                                              : "nvidia-smi shows whether the driver works; after an update, reboot"});
  }
  findings.push_back({Finding::kNote, "no GPU: everything runs on the CPU", ""});
  if (cuda::fatbins().empty() && !built_without_kernels())
    findings.push_back({Finding::kWarning, std::string("no GPU would be used: ") + cuda::why_no_fatbins(), kReinstall});
}

// Two distributions on the path: Python imports the first, whatever the command or another program was installed with.
void look_for_copies(const PythonEnvironment &env, std::vector<Finding> &findings) {
  if (env.copies.size() < 2) return;
  std::string list;
  for (const Package &copy : env.copies)
    list += fmt::format("{}{} in {}", list.empty() ? "" : ", ", copy.version, copy.folder);
  findings.push_back(
      {Finding::kError,
       fmt::format("flashspark is installed {} times, and Python imports the first: {}", env.copies.size(), list),
       "remove all but one: rm -r the others, or pip uninstall until none is left, and install again"});
}

void look_at_package(const PythonEnvironment &env, std::vector<Finding> &findings) {
  const auto add = [&](Finding::Level level, std::string text, std::string mend) {
    findings.push_back({level, std::move(text), std::move(mend)});
  };
  const std::string pip = pip_install(env);
  const auto found = env.packages.find("flashspark");
  if (found == env.packages.end()) {
    add(Finding::kNote, "flashspark is not installed in this Python", pip + "flashspark-*.whl");
  } else {
    if (found->second.version == "unknown") {
      add(Finding::kNote, "flashspark is imported from " + found->second.folder + ", without metadata", "");
    } else if (found->second.version != flashspark_version()) {
      add(Finding::kError,
          fmt::format("the Python package is {} but this program is {}", found->second.version, flashspark_version()),
          pip + "--no-deps --force-reinstall flashspark-" + flashspark_version() + "-*.whl");
    }
    for (const std::string &requirement : found->second.requirements) {
      const auto [name, clauses] = split_requirement(requirement);
      const auto installed = env.packages.find(name);
      const std::string mend = pip + "'" + name + clauses + "'";
      if (installed == env.packages.end()) {
        add(Finding::kError, "flashspark needs " + name + clauses + ", which is not installed", mend);
      } else if (installed->second.version != "unknown" && !requirement_met(clauses, installed->second.version)) {
        add(Finding::kError,
            fmt::format("flashspark needs {}{} but {} is installed", name, clauses, installed->second.version), mend);
      }
    }
  }
  if (!env.loaded_version.empty() && found != env.packages.end() && found->second.version != "unknown" &&
      env.loaded_version != found->second.version) {
    add(Finding::kError,
        fmt::format("the Python package is {} but loads a library of {}", found->second.version, env.loaded_version),
        kReinstall);
  }
  const bool complete = findings.empty() || findings.back().level != Finding::kError;  // else the reason is known
  if (!env.import_error.empty() && complete) {
    add(Finding::kError, "flashspark cannot be imported: " + env.import_error,
        env.interpreter + " -c 'import flashspark; flashspark.native_version()'  # shows why");
  }
  look_for_copies(env, findings);
}

void look_at_torch(const PythonEnvironment &env, const GpuFacts &gpu, std::vector<Finding> &findings) {
  if (const auto torch = env.packages.find("torch"); torch != env.packages.end() && gpu.cuda_version > 0) {
    // "2.9.1+cu130" needs a driver that supports the same major CUDA version.
    const size_t at = torch->second.version.find("+cu");
    const int wanted = at == std::string::npos ? 0 : std::atoi(torch->second.version.c_str() + at + 3) / 10;
    if (wanted > gpu.cuda_version / 1000) {
      findings.push_back({Finding::kError,
                          fmt::format("torch {} needs CUDA {}, the driver offers {}", torch->second.version, wanted,
                                      gpu.cuda_version / 1000),
                          "update the NVIDIA driver, or install a torch for an older CUDA"});
    }
  }
}

}  // namespace

const char *level_name(Finding::Level level) {
  return level == Finding::kNote ? "note" : level == Finding::kWarning ? "warning" : "error";
}

Finding::Level level_of(const std::string &name) {
  return name == "error" ? Finding::kError : name == "warning" ? Finding::kWarning : Finding::kNote;
}

std::string value_of(const Switch &each) {
  const char *value = std::getenv(each.name);
  return value != nullptr ? value : "";
}

void look_at_machine(const Machine &m, std::vector<Finding> &findings) {
  const auto add = [&](Finding::Level level, std::string text, std::string mend) {
    findings.push_back({level, std::move(text), std::move(mend)});
  };
  if (m.simd == "SCALAR" || m.simd == "SSE2" || m.simd == "EMU128") {
    add(Finding::kWarning, "the SIMD target is " + m.simd + ": slow",
        "a CPU with AVX2 or NEON; in a virtual machine, pass the host's CPU flags through");
  }
  if (m.cpu_limit > 0 && m.threads > m.cpu_limit + 0.5) {
    add(Finding::kWarning, fmt::format("{} threads will share a quota of {:.1f} CPUs", m.threads, m.cpu_limit),
        fmt::format("FLASHSPARK_NUM_THREADS={:.0f}", std::max(1.0, m.cpu_limit)));
  }
}

void look_at_gpu(const GpuFacts &gpu, std::vector<Finding> &findings) {
  if (gpu.gpus.empty()) return look_for_a_gpu(gpu, findings);
  if (const std::string reason = gpu_unavailable_reason(); !reason.empty()) {
    const char *mend = "a GPU of compute capability 8.x, 9.0 or 12.x";
    if (cuda::fatbins().empty()) {
      mend = built_without_kernels() ? "build with nvcc 12.9 or newer, or install a wheel that has the kernels"
                                     : kReinstall;
    } else if (gpu.cuda_version < cuda::kOldestLoadingVersion) {
      mend = kUpdateDriverMend;
    }
    findings.push_back({Finding::kWarning, "problems in GPU memory are refused: " + reason, mend});
  } else if (gpu.cuda_version < cuda::kCertainlyLoadingVersion) {
    findings.push_back({Finding::kWarning,
                        "the NVIDIA driver offers " + cuda::version_text(gpu.cuda_version) +
                            "; kernels that CUDA 13 compiled may not load, and the first call then says so",
                        kUpdateDriverMend});
  }
}

void look_at_switches(std::vector<Finding> &findings) {
  for (const Switch &each : kSwitches) {
    if (const std::string value = value_of(each); !value.empty())
      findings.push_back({Finding::kNote, fmt::format("{}={} is set", each.name, value), ""});
  }
  if (const std::string wrong = environment_error(); !wrong.empty())
    findings.push_back({Finding::kError, "nothing runs: " + wrong, "unset the variable, or give it one of its values"});
  std::string takeover = value_of({"FLASHSPARK", ""});
  std::transform(takeover.begin(), takeover.end(), takeover.begin(), [](unsigned char c) { return std::tolower(c); });
  constexpr std::array kKnown = {"", "0", "off", "false", "no", "1", "on", "true", "yes"};
  if (std::find(kKnown.begin(), kKnown.end(), takeover) == kKnown.end())
    findings.push_back(
        {Finding::kError, "FLASHSPARK=" + takeover + " is neither on (1) nor off (0)", "unset FLASHSPARK"});
}

void look_at_python(const PythonEnvironment &env, const GpuFacts &gpu, std::vector<Finding> &findings) {
  const auto add = [&](Finding::Level level, std::string text, std::string mend) {
    findings.push_back({level, std::move(text), std::move(mend)});
  };
  if (env.interpreter.empty()) {
    add(Finding::kNote, "no Python found; the C and C++ interfaces do not need it", "");
    return;
  }
  if (!env.answered) {
    add(Finding::kError, env.interpreter + " does not run: what is installed there is not known",
        env.interpreter + " -c 'import importlib.metadata'  # shows why");
    return;
  }
  look_at_package(env, findings);
  for (const auto &[name, package] : env.packages) {
    if (package.version.empty()) {
      add(Finding::kError, "broken installation: no version in " + package.folder,
          pip_install(env) + "--force-reinstall " + name);
    }
  }
  look_at_torch(env, gpu, findings);
  for (const std::string &file : env.shim_files) {
    add(Finding::kWarning, "a community shim replaces vLLM's attention on SM12x: " + file,
        "flashspark steps in front of it; remove it: rm " + file);
  }
}

}  // namespace flashspark::cli
