#include "cli/python_env.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <sstream>

#include "cli/machine.hpp"

namespace flashspark::cli {
namespace {

namespace fs = std::filesystem;

constexpr std::array kInteresting = {"flashspark", "torch",     "vllm",        "apache-tvm-ffi",
                                     "numpy",      "ml-dtypes", "transformers"};

bool executable(const fs::path &path) {
  return access(path.c_str(), X_OK) == 0 && fs::is_regular_file(path);
}

fs::path on_path() {
  std::istringstream folders(std::getenv("PATH") ? std::getenv("PATH") : "");
  for (std::string folder; std::getline(folders, folder, ':');) {
    if (executable(fs::path(folder) / "python3")) return fs::path(folder) / "python3";
  }
  return {};
}

void find_interpreter(PythonEnvironment &env) {
  std::error_code error;
  const fs::path self = fs::read_symlink("/proc/self/exe", error);
  if (const fs::path beside = self.parent_path() / "python3"; !error && executable(beside)) {
    env.interpreter = beside, env.found_by = "beside this program";
  } else if (const char *venv = std::getenv("VIRTUAL_ENV"); venv && executable(fs::path(venv) / "bin/python3")) {
    env.interpreter = fs::path(venv) / "bin/python3", env.found_by = "$VIRTUAL_ENV";
  } else if (const fs::path found = on_path(); !found.empty()) {
    env.interpreter = found, env.found_by = "PATH";
  }
}

void add_folders(PythonEnvironment &env, const fs::path &prefix) {
  std::vector<std::string> found;
  for (const char *lib : {"lib", "lib64", "local/lib"}) {
    std::error_code error;
    for (const auto &entry : fs::directory_iterator(prefix / lib, error)) {
      if (!entry.path().filename().string().starts_with("python3")) continue;
      for (const char *kind : {"site-packages", "dist-packages"}) {
        const fs::path folder = fs::weakly_canonical(entry.path() / kind, error);
        if (fs::is_directory(folder, error)) found.push_back(folder);
      }
    }
  }
  std::sort(found.begin(), found.end());
  for (const std::string &folder : found) {
    if (std::find(env.site_folders.begin(), env.site_folders.end(), folder) == env.site_folders.end()) {
      env.site_folders.push_back(folder);
    }
  }
}

// Asks an interpreter behind a shim script (pyenv, asdf) for its prefix; -I -S run none of its packages' code.
std::string ask_prefix(const std::string &interpreter) {
  if (interpreter.find('\'') != std::string::npos) return {};
  const std::string command = "'" + interpreter + "' -I -S -c 'import sys; print(sys.prefix)' 2>/dev/null";
  std::string answer;
  if (FILE *pipe = popen(command.c_str(), "r")) {
    std::array<char, 4096> buffer;
    while (std::fgets(buffer.data(), buffer.size(), pipe)) answer += buffer.data();
    pclose(pipe);
  }
  while (!answer.empty() && std::isspace(static_cast<unsigned char>(answer.back()))) answer.pop_back();
  return answer;
}

void find_folders(PythonEnvironment &env) {
  const fs::path prefix = fs::path(env.interpreter).parent_path().parent_path();
  add_folders(env, prefix);
  const std::string config = read_text(prefix / "pyvenv.cfg");
  if (!env.site_folders.empty() && config.find("include-system-site-packages = true") == std::string::npos) return;
  if (!config.empty()) {  // a virtual environment that sees the system's packages too
    std::error_code error;
    add_folders(env, fs::canonical(env.interpreter, error).parent_path().parent_path());
    return;
  }
  if (const std::string real = ask_prefix(env.interpreter); !real.empty()) add_folders(env, real);
}

// PEP 503: lower case, runs of - _ . are one -.
std::string normalise(const std::string &name) {
  std::string result;
  for (const char c : name) {
    const bool separator = c == '-' || c == '_' || c == '.';
    if (separator && !result.empty() && result.back() == '-') continue;
    result += separator ? '-' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  return result;
}

Package read_package(const fs::path &folder) {
  Package package;
  package.folder = folder;
  std::istringstream lines(read_text(folder / "METADATA"));
  for (std::string line; std::getline(lines, line) && !line.empty() && line != "\r";) {
    if (line.back() == '\r') line.pop_back();
    if (line.starts_with("Version: ")) package.version = line.substr(9);
    // What follows ';' is a condition: extras, platforms, Python versions.
    if (line.starts_with("Requires-Dist: ") && line.find(';') == std::string::npos) {
      package.requirements.push_back(line.substr(15));
    }
  }
  return package;
}

std::vector<int> release(const std::string &version) {
  std::vector<int> numbers;
  for (size_t at = 0; at < version.size() && std::isdigit(static_cast<unsigned char>(version[at]));) {
    int number = 0;
    for (; at < version.size() && std::isdigit(static_cast<unsigned char>(version[at])); ++at) {
      number = std::min(number, 100000000) * 10 + (version[at] - '0');
    }
    numbers.push_back(number);
    if (at < version.size() && version[at] == '.') ++at;
  }
  while (!numbers.empty() && numbers.back() == 0) numbers.pop_back();
  return numbers;
}

}  // namespace

int compare_versions(const std::string &a, const std::string &b) {
  const std::vector<int> x = release(a), y = release(b);
  return x < y ? -1 : x > y ? 1 : 0;
}

std::pair<std::string, std::string> split_requirement(const std::string &requirement) {
  const size_t end = requirement.find_first_of(" <>=!~[(");
  std::string clauses = end == std::string::npos ? "" : requirement.substr(end);
  if (clauses.starts_with('[')) clauses = clauses.substr(std::min(clauses.find(']') + 1, clauses.size()));
  std::erase_if(clauses, [](char c) { return c == ' ' || c == '(' || c == ')'; });
  return {normalise(requirement.substr(0, end)), clauses};
}

bool requirement_met(const std::string &clauses, const std::string &version) {
  std::istringstream parts(clauses);
  for (std::string part; std::getline(parts, part, ',');) {
    const size_t at = part.find_first_not_of("<>=!~");
    if (at == std::string::npos || part.find('*') != std::string::npos) continue;
    const std::string op = part.substr(0, at);
    const int order = compare_versions(version, part.substr(at));
    if ((op == ">=" || op == "~=") && order < 0) return false;
    if (op == ">" && order <= 0) return false;
    if (op == "<=" && order > 0) return false;
    if (op == "<" && order >= 0) return false;
    if (op == "==" && order != 0) return false;
    if (op == "!=" && order == 0) return false;
  }
  return true;
}

PythonEnvironment python_environment() {
  PythonEnvironment env;
  find_interpreter(env);
  if (env.interpreter.empty()) return env;
  find_folders(env);
  for (const std::string &site : env.site_folders) {
    std::error_code error;
    for (const auto &entry : fs::directory_iterator(site, error)) {
      const std::string name = entry.path().filename();
      if (name == "fa4_sm120_shim.py" || name == "zzz_fa4_sm120_shim.pth") env.shim_files.push_back(entry.path());
      if (!name.ends_with(".dist-info")) continue;
      const std::string project = normalise(name.substr(0, name.find('-')));
      env.has_pip |= project == "pip";
      if (std::find(kInteresting.begin(), kInteresting.end(), project) == kInteresting.end()) continue;
      env.packages.try_emplace(project, read_package(entry.path()));  // the first folder wins, as on sys.path
    }
  }
  std::sort(env.shim_files.begin(), env.shim_files.end());
  return env;
}

std::string pip_install(const PythonEnvironment &env) {
  return env.has_pip ? env.interpreter + " -m pip install " : "uv pip install --python " + env.interpreter + " ";
}

}  // namespace flashspark::cli
