// What doctor finds wrong with a machine, its GPU's driver, the environment variables and Python, and what mends it.
#pragma once

#include <string>
#include <vector>

#include "cli/machine.hpp"
#include "cli/python_env.hpp"

namespace flashspark::cli {

struct Finding {
  enum Level { kNote, kWarning, kError } level;
  std::string text;
  std::string mend;  // how to fix it; empty for notes
};
const char *level_name(Finding::Level level);
Finding::Level level_of(const std::string &name);

// The effect of environment variables. The library itself reports values that it does not accept.
struct Switch {
  const char *name;
  const char *meaning;
};
constexpr Switch kSwitches[] = {
    {"FLASHSPARK_FORCE_IMPLEMENTATION", "a name from the table of implementations, for every call"},
    {"FLASHSPARK_CPU_TARGET",
     "SIMD target: AVX-512-BF16, AVX-512, AVX2, SSE4, NEON, as far as the build and the CPU have it"},
    {"FLASHSPARK_NUM_THREADS", "CPU threads of a call, up to 1024; 0: all"},
    {"FLASHSPARK_CHECK", "1: metadata in GPU memory is checked before every call; 0: it is not"},
    {"FLASHSPARK", "0: vLLM keeps its own attention"},
    {"FLASHSPARK_CAPABILITIES", "compute capabilities to take over in vLLM, such as 9.0,12.x"},
};
std::string value_of(const Switch &each);  // empty if it is not set

// Each adds what it finds.
void look_at_machine(const Machine &m, std::vector<Finding> &findings);
void look_at_gpu(const GpuFacts &gpu, std::vector<Finding> &findings);
void look_at_switches(std::vector<Finding> &findings);
void look_at_python(const PythonEnvironment &env, const GpuFacts &gpu, std::vector<Finding> &findings);

}  // namespace flashspark::cli
