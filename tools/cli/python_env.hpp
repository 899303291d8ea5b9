// The Python environment that the command serves, as its own interpreter describes it.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace flashspark::cli {

struct Package {
  std::string version;  // "unknown" if importable but without metadata; empty if the metadata is broken
  std::string folder;   // the .dist-info, or the folder of the module
  std::vector<std::string> requirements;  // Requires-Dist without extras
};

struct PythonEnvironment {
  std::string interpreter;                // empty if no Python was found
  std::string found_by;                   // "beside this program", "$VIRTUAL_ENV", "PATH"
  bool answered = false;                  // otherwise nothing below is known
  std::vector<std::string> site_folders;  // existing folders whose .pth files are read: site-packages and dist-packages
  std::map<std::string, Package> packages;  // those found of flashspark, its requirements, torch and vllm
  std::vector<Package> copies;          // of flashspark, as the interpreter would find them; more than one is a fault
  std::string loaded_version;           // of the native library that flashspark loads; empty if it was not asked
  std::string import_error;             // why it loads none; empty if it does
  std::vector<std::string> shim_files;  // of the community's SM120 shim for vLLM
  bool has_pip = false;                 // environments made by uv have none
};

PythonEnvironment python_environment();
// Runs the interpreter with the user's environment; returns the last line of its standard output, or an empty string.
std::string last_line_of(const PythonEnvironment &env, const std::vector<std::string> &arguments);
// The command that installs the packages appended to it.
std::string pip_install(const PythonEnvironment &env);

// Whether an installed version satisfies clauses such as "numpy>=1.24,<3". Clauses that are not plain comparisons count
// as satisfied.
bool requirement_met(const std::string &clauses, const std::string &version);
// Splits a Requires-Dist line into the normalised name and the version clauses.
std::pair<std::string, std::string> split_requirement(const std::string &requirement);
// Compares release numbers: -1, 0 or 1; "2.10.1" > "2.9".
int compare_versions(const std::string &a, const std::string &b);

}  // namespace flashspark::cli
