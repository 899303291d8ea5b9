// The Python environment that `flashspark` would serve. Its own interpreter is asked what it would import.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace flashspark::cli {

struct Package {
  std::string version;                    // "unknown": can be imported, but has no metadata; empty: broken metadata
  std::string folder;                     // the .dist-info, or where its module lies
  std::vector<std::string> requirements;  // Requires-Dist without extras
};

struct PythonEnvironment {
  std::string interpreter;                  // empty: no Python found
  std::string found_by;                     // "beside this program", "$VIRTUAL_ENV", "PATH"
  bool answered = false;                    // otherwise nothing below is known
  std::vector<std::string> site_folders;    // whose .pth files it reads: site-packages and dist-packages that exist
  std::map<std::string, Package> packages;  // of the whole path: flashspark, its requirements, torch, vllm; those found
  std::vector<std::string> shim_files;      // of the community's SM120 shim for vLLM
  bool has_pip = false;                     // uv makes environments without
};

PythonEnvironment python_environment();
// Runs its interpreter with the user's environment; the last line of its standard output, empty if there is none.
std::string last_line_of(const PythonEnvironment &env, const std::vector<std::string> &arguments);
// The command that installs what is appended to it.
std::string pip_install(const PythonEnvironment &env);

// "numpy>=1.24,<3" against an installed version: false if one of the clauses does not hold. Clauses that are not plain
// comparisons count as met.
bool requirement_met(const std::string &clauses, const std::string &version);
// The normalised name and the version clauses of one Requires-Dist line.
std::pair<std::string, std::string> split_requirement(const std::string &requirement);
// -1, 0, 1 by the numbers of the release: "2.10.1" > "2.9".
int compare_versions(const std::string &a, const std::string &b);

}  // namespace flashspark::cli
