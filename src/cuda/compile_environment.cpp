#include "cuda/compile_environment.hpp"

#include <charconv>
#include <string_view>

#include "platform/process.hpp"

namespace flashspark::cuda {
namespace {

constexpr int64_t kMaxMegabytes = 1 << 20;

std::string_view text_of(const char *value) {
  return value != nullptr ? value : "";
}

#if defined(_WIN32)
constexpr char kCacheFolder[] = "\\flashspark\\kernels";  // LOCALAPPDATA is a place for caches
constexpr char kNvrtcFiles[] = "nvrtc64_120_0.dll or nvrtc64_130_0.dll";

// "C:\\cache", "\\\\server\\share".
bool is_absolute(std::string_view path) {
  const auto separator = [&](size_t n) { return path.size() > n && (path[n] == '/' || path[n] == '\\'); };
  return separator(0) ? separator(1) : path.substr(0, 2).ends_with(':') && separator(2);
}
#else
constexpr char kCacheFolder[] = "/.cache/flashspark/kernels";
constexpr char kNvrtcFiles[] = "libnvrtc.so.12 or libnvrtc.so.13";

bool is_absolute(std::string_view path) {
  return path.starts_with('/');
}
#endif

}  // namespace

CompileEnvironment read_compile_environment(const CompileSwitches &switches) {
  const std::string_view nvrtc = text_of(switches.nvrtc), cache = text_of(switches.cache),
                         cache_dir = text_of(switches.cache_dir), max_mb = text_of(switches.cache_max_mb),
                         xdg_cache_home = text_of(switches.xdg_cache_home), home = text_of(switches.home);
  CompileEnvironment e;
  const auto wrong = [&](const char *name, std::string_view value, const std::string &rule) {
    if (e.error.empty()) e.error = std::string(name) + " = " + std::string(value) + ": must be " + rule;
  };
  e.cuda_home = text_of(switches.cuda_home);
  if (is_absolute(nvrtc)) {
    e.nvrtc = nvrtc;
  } else if (!nvrtc.empty()) {
    wrong("FLASHSPARK_NVRTC", nvrtc, std::string("the absolute path of ") + kNvrtcFiles);
  }
  e.cache = cache != "0";
  if (!cache.empty() && cache != "0" && cache != "1") wrong("FLASHSPARK_CACHE", cache, "0 or 1");
  // XDG_CACHE_HOME that is relative is as if not set: the XDG Base Directory Specification.
  if (is_absolute(cache_dir)) {
    e.cache_folder = cache_dir;
  } else if (is_absolute(xdg_cache_home)) {
    e.cache_folder = std::string(xdg_cache_home) + "/flashspark/kernels";
  } else if (is_absolute(home)) {
    e.cache_folder = std::string(home) + kCacheFolder;
  }
  if (!cache_dir.empty() && !is_absolute(cache_dir)) wrong("FLASHSPARK_CACHE_DIR", cache_dir, "an absolute path");
  if (!max_mb.empty()) {
    int64_t value = 0;
    const auto [stop, failure] = std::from_chars(max_mb.data(), max_mb.data() + max_mb.size(), value);
    if (failure == std::errc() && stop == max_mb.data() + max_mb.size() && value >= 1 && value <= kMaxMegabytes) {
      e.cache_bytes = value << 20;
    } else {
      wrong("FLASHSPARK_CACHE_MAX_MB", max_mb, "a number from 1 to " + std::to_string(kMaxMegabytes));
    }
  }
  return e;
}

const CompileEnvironment &compile_environment() {
  static const CompileEnvironment read = [] {
    const auto value = [](const char *name) { return environment_variable(name).value_or(""); };
    const std::string nvrtc = value("FLASHSPARK_NVRTC"), cuda_home = value(kCudaVariable),
                      cache = value("FLASHSPARK_CACHE"), cache_dir = value("FLASHSPARK_CACHE_DIR"),
                      cache_max_mb = value("FLASHSPARK_CACHE_MAX_MB"), xdg = value("XDG_CACHE_HOME"),
                      home = value(kHomeVariable);
    return read_compile_environment({.nvrtc = nvrtc.c_str(),
                                     .cuda_home = cuda_home.c_str(),
                                     .cache = cache.c_str(),
                                     .cache_dir = cache_dir.c_str(),
                                     .cache_max_mb = cache_max_mb.c_str(),
                                     .xdg_cache_home = xdg.c_str(),
                                     .home = home.c_str()});
  }();
  return read;
}

}  // namespace flashspark::cuda
