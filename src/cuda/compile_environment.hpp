// The switches of run-time compilation in the environment, read once a process.
#pragma once

#include <cstdint>
#include <string>

namespace flashspark::cuda {

struct CompileEnvironment {
  std::string nvrtc;                         // FLASHSPARK_NVRTC: the file to load; "": searched for
  std::string cuda_home;                     // kCudaVariable; "": not set
  bool cache = true;                         // FLASHSPARK_CACHE
  std::string cache_folder;                  // FLASHSPARK_CACHE_DIR, or where caches belong; "": nowhere
  int64_t cache_bytes = int64_t{256} << 20;  // FLASHSPARK_CACHE_MAX_MB
  std::string error;  // of the first switch with a wrong value, which is as if not set; "": all are right
};

const CompileEnvironment &compile_environment();

// Below which the user's caches belong, and how each system's CUDA toolkit says where it is.
#if defined(_WIN32)
constexpr char kHomeVariable[] = "LOCALAPPDATA", kCudaVariable[] = "CUDA_PATH";
#else
constexpr char kHomeVariable[] = "HOME", kCudaVariable[] = "CUDA_HOME";
#endif

// The values of the switches; NULL or "": not set.
struct CompileSwitches {
  const char *nvrtc = nullptr, *cuda_home = nullptr, *cache = nullptr, *cache_dir = nullptr, *cache_max_mb = nullptr;
  const char *xdg_cache_home = nullptr, *home = nullptr;
};
CompileEnvironment read_compile_environment(const CompileSwitches &switches);

}  // namespace flashspark::cuda
