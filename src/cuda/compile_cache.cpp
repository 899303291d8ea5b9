#include "cuda/compile_cache.hpp"

#include <chrono>
#include <utility>

#include "cuda/compile_environment.hpp"
#include "cuda/kernel_sources.hpp"
#include "cuda/sha256.hpp"

namespace flashspark::cuda {
namespace {

// A process that makes ever new functions keeps no more cubins than these in memory.
constexpr size_t kMaxCubinsInMemory = 256;

DiskCache disk_cache() {
  const CompileEnvironment &e = compile_environment();
  return {e.cache ? e.cache_folder : "", e.cache_bytes};
}

}  // namespace

std::string cache_key(const CompileRequest &request, const std::string &compiler_version) {
  Sha256 sum;
  sum.add_field(compiler_version);
  sum.add_field(kernel_sources_hash());
  sum.add_field(request.source);
  const std::vector<std::string> options = compile_options(request);
  sum.add_field(std::to_string(options.size()));
  for (const std::string &option : options) sum.add_field(option);
  for (const CompileRequest::Header &header : request.headers) {
    sum.add_field(header.name);
    sum.add_field(header.text);
  }
  return sum.finish_hex();
}

Cubin CompileCache::load_or_compile(const CompileRequest &request, const std::string &key) const {
  if (auto kept = disk_.load(key)) return std::make_shared<const std::vector<char>>(std::move(*kept));
  auto cubin = std::make_shared<const std::vector<char>>(compiler_.compile(request));
  disk_.store(key, *cubin);
  return cubin;
}

Cubin CompileCache::get(const CompileRequest &request) {
  const std::string key = cache_key(request, compiler_.version());
  std::promise<Cubin> promise;
  std::shared_future<Cubin> others;
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = cubins_.find(key); found != cubins_.end()) {
      others = found->second;
    } else {
      if (cubins_.size() >= kMaxCubinsInMemory) {
        std::erase_if(cubins_, [](const auto &each) {
          return each.second.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
        });
      }
      cubins_.emplace(key, promise.get_future().share());
    }
  }
  if (others.valid()) return others.get();
  try {
    Cubin cubin = load_or_compile(request, key);
    promise.set_value(cubin);
    return cubin;
  } catch (...) {
    {
      const std::lock_guard lock(mutex_);
      cubins_.erase(key);
    }
    promise.set_exception(std::current_exception());
    throw;
  }
}

Cubin cubin_for(const CompileRequest &request) {
  // Never destroyed: threads may compile while the process ends.
  static CompileCache &cache = *new CompileCache({.version = nvrtc_version, .compile = compile}, disk_cache());
  return cache.get(request);
}

std::string compile_cache_description() {
  return compile_environment().cache ? disk_cache().description() : "off: FLASHSPARK_CACHE is 0";
}

}  // namespace flashspark::cuda
