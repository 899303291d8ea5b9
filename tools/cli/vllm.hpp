// vLLM in the environment that the command serves, as flashspark.vllm.doctor reports it from that environment's Python.
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
  std::string mend;  // how to fix it; empty if nothing needs fixing
};

struct VllmReport {
  std::vector<std::pair<std::string, std::string>> lines;  // name, value
  std::vector<VllmFinding> findings;
  Json json;  // the whole report; null if Python was not asked
};

// Imports the environment's vLLM, which takes seconds. Empty if vLLM or flashspark is not installed.
VllmReport vllm_report(const PythonEnvironment &env);

// Other programs of the environment that flashspark can serve, as flashspark.integrations.doctor reports them: lines,
// and json. Empty if flashspark is not installed, or is older than that module.
VllmReport programs_report(const PythonEnvironment &env);

// Files of the start-up hook in the environment.
std::vector<std::string> hook_files(const PythonEnvironment &env);

}  // namespace flashspark::cli
