// The command's kernels are those of the shared library, which is installed with it. What is defined here takes the
// place of the fatbins in the static library, whose member the linker then leaves out: in a wheel they would be there
// twice.
//
// The library is opened, not linked: its folder depends on the Python version that a wheel is installed for, and the
// command must start where the library is missing, and say so.
#include <fmt/format.h>

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "cli/system.hpp"
#include "cuda/fatbins.hpp"
#include "cuda/kernel_sources.hpp"
#include "cuda/library_kernels.hpp"
#include "flashspark/flashspark.h"
#include "platform/dynamic_library.hpp"
#include "platform/process.hpp"

namespace flashspark::cuda {
namespace {

namespace fs = std::filesystem;

struct Found {
  std::span<const Fatbin> fatbins;
  const char *architectures = "";
  std::string missing_reason;  // empty: they are there
};

// Where wheels, CMake's install and build trees have the library, seen from the command.
std::vector<fs::path> libraries(const fs::path &folder) {
  std::vector<fs::path> list;
  const auto add = [&](const fs::path &path) {
    std::error_code error;
    if (const fs::path file = folder / path; fs::exists(file, error)) list.push_back(file.lexically_normal());
  };
  const fs::path inside = fs::path("flashspark") / cli::kLibraryFile;
  add(".." / inside);                              // pip install --target
  add(fs::path("../..") / inside);                 // an unpacked wheel
  add(fs::path("../Lib/site-packages") / inside);  // Windows
  for (const char *lib : {"../lib", "../lib64"}) {
    std::error_code error;
    for (const fs::directory_entry &entry : fs::directory_iterator(folder / lib, error)) {
      const std::string name = entry.path().filename().string();
      if (!name.starts_with("python3") && !name.starts_with("pypy3")) continue;
      for (const char *packages : {"site-packages", "dist-packages"}) add(fs::path(lib) / name / packages / inside);
    }
  }
  add(FLASHSPARK_INSTALLED_LIBRARY);
  add(FLASHSPARK_BUILT_LIBRARY);
  return list;
}

// Takes the library's kernels, or returns why they cannot be.
std::string take(const fs::path &library, Found &found) {
  DynamicLibrary handle = DynamicLibrary::open(library.string());
  if (!handle) return handle.error();
  const auto get = reinterpret_cast<GetLibraryKernels *>(handle.symbol(kLibraryKernelsSymbol));
  const LibraryKernels *kernels = get != nullptr ? get() : nullptr;
  const std::string version = kernels != nullptr ? kernels->version : "another version";
  if (version == flashspark_version() && kernels->sources_hash == kernel_sources_hash()) {
    found.fatbins = {kernels->fatbins, kernels->count};
    found.architectures = kernels->architectures;
    return {};
  }
  handle.close();
  return fmt::format("{} is of {}, this command of {}", library.string(),
                     version == flashspark_version() ? "another build of " + version : version, flashspark_version());
}

Found find() {
  const fs::path folder = fs::path(program_file()).parent_path();
  Found found;
  for (const fs::path &library : libraries(folder)) {
    const std::string reason = take(library, found);
    if (reason.empty()) {
      found.missing_reason = found.fatbins.empty() ? "this library was built without CUDA kernels" : "";
      return found;
    }
    if (found.missing_reason.empty()) found.missing_reason = reason;
  }
  if (found.missing_reason.empty())
    found.missing_reason =
        std::string("the kernels are in ") + cli::kLibraryFile + ", which is not installed beside " + folder.string();
  return found;
}

const Found &found() {
  static const Found instance = find();
  return instance;
}

}  // namespace

std::span<const Fatbin> fatbins() {
  return found().fatbins;
}

const char *fatbin_architectures() {
  return found().architectures;
}

const char *why_no_fatbins() {
  return found().missing_reason.c_str();
}

}  // namespace flashspark::cuda
