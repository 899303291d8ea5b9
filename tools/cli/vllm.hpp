// What concerns vLLM in the environment that `flashspark` would serve. Its own Python is asked: flashspark.vllm.doctor.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cli/json.hpp"
#include "cli/python_env.hpp"

namespace flashspark::cli {

struct VllmFinding {
  std::string level;  // "note", "warning", "error"
  std::string text;
  std::string mend;  // empty: none needed
};

struct VllmReport {
  std::vector<std::pair<std::string, std::string>> lines;  // name, value
  std::vector<VllmFinding> findings;
  Json json;  // all that Python said; null: nothing was asked
};

// Imports the environment's vLLM, which takes seconds. Empty where vLLM or flashspark is not installed.
VllmReport vllm_report(const PythonEnvironment &env);

// Files of the start-up hook in the environment.
std::vector<std::string> hook_files(const PythonEnvironment &env);

}  // namespace flashspark::cli
