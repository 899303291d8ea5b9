#include "cli/vllm.hpp"

#include <fmt/format.h>

#include <array>
#include <filesystem>

#include "cli/cli.hpp"
#include "cli/system.hpp"

namespace flashspark::cli {
namespace {

constexpr std::array kHookFiles = {"flashspark.pth", "flashspark.start"};

}  // namespace

VllmReport vllm_report(const PythonEnvironment &env) {
  VllmReport report;
  if (!env.packages.contains("vllm")) return report;
  const std::string version = env.packages.at("vllm").version;
  if (!env.packages.contains("flashspark")) {
    report.findings.push_back(
        {"note", "vLLM " + version + " is installed, without flashspark", pip_install(env) + "flashspark-*.whl"});
    return report;
  }
  if (is_terminal(Stream::kErr)) fmt::print(stderr, "asking vLLM {}: half a minute if torch is cold\n", version);
  report.json = Json::parse(last_line_of(env, {"-m", "flashspark.vllm.doctor"}), nullptr, /*allow_exceptions=*/false);
  if (report.json.is_discarded() || !report.json.contains("lines") || !report.json.contains("findings")) {
    report.json = Json();
    report.findings.push_back({"warning", "vLLM " + version + " is installed, but could not be asked",
                               env.interpreter + " -m flashspark.vllm.doctor  # shows why"});
    return report;
  }
  for (const Json &line : report.json["lines"]) report.lines.emplace_back(line.at(0), line.at(1));
  for (const Json &f : report.json["findings"]) report.findings.push_back({f.at("level"), f.at("text"), f.at("mend")});
  return report;
}

VllmReport programs_report(const PythonEnvironment &env) {
  VllmReport report;
  if (!env.packages.contains("flashspark")) return report;
  Json answer = Json::parse(last_line_of(env, {"-m", "flashspark.integrations.doctor"}), nullptr, false);
  if (answer.is_discarded() || !answer.contains("lines")) return report;
  report.json = std::move(answer);
  for (const Json &line : report.json["lines"]) report.lines.emplace_back(line.at(0), line.at(1));
  return report;
}

std::vector<std::string> hook_files(const PythonEnvironment &env) {
  std::vector<std::string> found;
  for (const std::string &site : env.site_folders) {
    for (const char *name : kHookFiles) {
      const std::filesystem::path path = std::filesystem::path(site) / name;
      if (std::error_code error; std::filesystem::is_regular_file(path, error)) found.push_back(path.string());
    }
  }
  return found;
}

int verify_vllm(const VerifyOptions &options) {
  const PythonEnvironment env = python_environment();
  if (env.interpreter.empty() || !env.packages.contains("vllm") || !env.packages.contains("flashspark"))
    throw UsageError("verify --vllm: vLLM and flashspark are not both installed in " +
                     (env.interpreter.empty() ? "any Python found" : env.interpreter));
  const std::string seed = std::to_string(options.seed);
  std::vector<std::string> words{"-m", "flashspark.vllm.verify", "--seed", seed};
  if (options.verbose) words.emplace_back("--verbose");
  become(env.interpreter, words);
}

int uninstall() {
  const PythonEnvironment env = python_environment();
  const std::vector<std::string> files = hook_files(env);
  for (const std::string &file : files) {
    std::filesystem::remove(file);  // throws, with the path, where that is not allowed
    fmt::print("removed {}\n", file);
  }
  if (files.empty()) fmt::print("no start-up hook in {}\n", env.interpreter.empty() ? "any Python" : env.interpreter);
  fmt::print(
      "{}", env.packages.contains("flashspark")
                ? "vLLM still finds the plug-in: FLASHSPARK=0 turns it off, pip uninstall flashspark removes the rest\n"
                : "");
  return kOk;
}

}  // namespace flashspark::cli
