#include "cli/python_env.hpp"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "cli/system.hpp"
#include "platform/process.hpp"

namespace flashspark::cli {
namespace {

namespace fs = std::filesystem;

fs::path on_path() {
  for (const std::string &folder : folders_of("PATH")) {
    if (is_program(fs::path(folder) / kPython)) return fs::path(folder) / kPython;
  }
  return {};
}

void find_interpreter(PythonEnvironment &env) {
  const fs::path folder = fs::path(program_file()).parent_path();
  const auto take = [&](const fs::path &python, const char *found_by) {
    if (env.interpreter.empty() && is_program(python)) env.interpreter = python.string(), env.found_by = found_by;
  };
  if (!folder.empty()) take(folder / kPython, "beside this program");
#if defined(_WIN32)  // outside of environments python.exe is one folder above the scripts
  if (!folder.empty()) take(folder.parent_path() / kPython, "beside this program");
#endif
  if (const auto venv = environment_variable("VIRTUAL_ENV"))
    take(fs::path(*venv) / kVenvPrograms / kPython, "$VIRTUAL_ENV");
  take(on_path(), "PATH");
}

// Lists what importlib.metadata finds on the path of the user's own programs, since .pth files, PYTHONPATH or system
// packages may extend an environment. An importable package without metadata has an unknown version.
constexpr char kQuestion[] = R"(
import sys
if sys.path and not sys.path[0]: del sys.path[0]  # the current folder
import importlib.metadata, importlib.util, json, os, re, site
names = ["flashspark", "torch", "vllm", "apache-tvm-ffi", "numpy", "ml-dtypes", "transformers"]
modules = {"apache-tvm-ffi": "tvm_ffi"}
packages = {}
for name in names:
    try:
        found = importlib.metadata.distribution(name)
        requires = [r for r in found.requires or [] if ";" not in r]
        packages[name] = {"version": found.metadata["Version"] or "", "requirements": requires,
                          "folder": str(getattr(found, "_path", found.locate_file("")))}
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(modules.get(name, name.replace("-", "_")))
        if spec is None or not spec.origin: continue
        packages[name] = {"version": "unknown", "requirements": [], "folder": os.path.dirname(spec.origin)}
    if name == "flashspark":
        wanted = [re.split("[^A-Za-z0-9._-]", r)[0] for r in packages[name]["requirements"]]
        names += [n for n in (re.sub("[-_.]+", "-", w).lower() for w in wanted) if n not in names]
copies = {os.path.realpath(str(d._path)): d.metadata["Version"] or "" for d in importlib.metadata.distributions(name="flashspark")
          if hasattr(d, "_path")}
sites = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
sites = list(dict.fromkeys(os.path.realpath(s) for s in sites if os.path.isdir(s)))
folders = list(dict.fromkeys([*sites, *(os.path.realpath(p) for p in sys.path)]))
shim = ["fa4_sm120_shim.py", "zzz_fa4_sm120_shim.pth"]
files = sorted(f for f in (os.path.join(p, s) for p in folders for s in shim) if os.path.isfile(f))
print(json.dumps({"site_folders": sites, "packages": packages, "copies": [*copies.items()], "shim_files": files,
                  "has_pip": importlib.util.find_spec("pip") is not None}))
)";

// Whether flashspark's native library loads, in a process of its own, which may crash.
constexpr char kImport[] = R"(
import sys
if sys.path and not sys.path[0]: del sys.path[0]  # the current folder
import importlib.util
if importlib.util.find_spec("flashspark") is None:
    print("loaded")
else:
    try:
        import flashspark
        print("loaded", getattr(flashspark, "native_version", str)())
    except Exception as e:
        print(type(e).__name__ + ":", (str(e).splitlines() or [""])[0])
)";

void take_answer(PythonEnvironment &env, const nlohmann::json &answer) {
  env.answered = true;
  env.site_folders = answer.at("site_folders");
  env.shim_files = answer.at("shim_files");
  env.has_pip = answer.at("has_pip");
  for (const auto &copy : answer.at("copies")) env.copies.push_back({copy.at(1), copy.at(0), {}});
  for (const auto &[name, package] : answer.at("packages").items())
    env.packages[name] = {package.at("version"), package.at("folder"), package.at("requirements")};
}

// PEP 503: lower case, with runs of "-", "_" and "." replaced by "-".
std::string normalise(const std::string &name) {
  std::string result;
  for (const char c : name) {
    const bool separator = c == '-' || c == '_' || c == '.';
    if (separator && !result.empty() && result.back() == '-') continue;
    result += separator ? '-' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  return result;
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

std::string last_line_of(const PythonEnvironment &env, const std::vector<std::string> &arguments) {
  std::istringstream lines(output_of(env.interpreter, arguments));
  std::string last;
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty()) last = line;
  }
  return last;
}

PythonEnvironment python_environment() {
  PythonEnvironment env;
  find_interpreter(env);
  if (env.interpreter.empty()) return env;
  const auto answer = nlohmann::json::parse(last_line_of(env, {"-c", kQuestion}), nullptr, /*allow_exceptions=*/false);
  if (answer.is_object() && answer.contains("has_pip")) take_answer(env, answer);
  if (env.packages.contains("flashspark")) {
    const std::string said = last_line_of(env, {"-c", kImport});
    if (said.starts_with("loaded")) {
      env.loaded_version = said.substr(std::min(said.size(), std::string("loaded ").size()));
    } else {
      env.import_error = said.empty() ? "the interpreter crashes" : said;
    }
  }
  return env;
}

std::string pip_install(const PythonEnvironment &env) {
  return env.has_pip ? env.interpreter + " -m pip install " : "uv pip install --python " + env.interpreter + " ";
}

}  // namespace flashspark::cli
