// Cubins of run-time compilation: each is compiled once a process, and once a machine where a folder keeps them.
#pragma once

#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/disk_cache.hpp"
#include "cuda/nvrtc.hpp"

namespace flashspark::cuda {

using Cubin = std::shared_ptr<const std::vector<char>>;

struct Compiler {
  std::function<std::string()> version;
  std::function<std::vector<char>(const CompileRequest &)> compile;
};

class CompileCache {
 public:
  CompileCache(Compiler compiler, DiskCache disk) : compiler_(std::move(compiler)), disk_(std::move(disk)) {}

  // From memory, from the disk or compiled. Threads that ask for one cubin at once wait for one compilation, and throw
  // what it throws; the next call tries again.
  Cubin get(const CompileRequest &request);

 private:
  Cubin load_or_compile(const CompileRequest &request, const std::string &key) const;

  Compiler compiler_;
  DiskCache disk_;
  std::mutex mutex_;
  std::unordered_map<std::string, std::shared_future<Cubin>> cubins_;  // by key
};

// A hash of all that decides what the cubin is.
std::string cache_key(const CompileRequest &request, const std::string &compiler_version);

// Of NVRTC, kept where the environment says (compile_environment.hpp).
Cubin cubin_for(const CompileRequest &request);

// "/home/me/.cache/flashspark, 3 cubins, 0.3 of 256 MiB", or why nothing is kept. Never throws.
std::string compile_cache_description();

}  // namespace flashspark::cuda
