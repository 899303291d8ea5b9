#include "cuda/nvrtc.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <type_traits>

#include "cuda/compile_environment.hpp"
#include "cuda/kernel_sources.hpp"
#include "error.hpp"
#include "platform/dynamic_library.hpp"

namespace flashspark::cuda {
namespace {

// nvrtcResult and nvrtcProgram.
using Outcome = int;
using Program = struct ProgramObject *;
constexpr Outcome kDone = 0, kNoMemory = 1, kCompileError = 6;

#define FLASHSPARK_NVRTC_FUNCTIONS(F)                                                                                  \
  F(nvrtcVersion, Outcome(int *, int *))                                                                               \
  F(nvrtcGetErrorString, const char *(Outcome))                                                                        \
  F(nvrtcCreateProgram, Outcome(Program *, const char *, const char *, int, const char *const *, const char *const *)) \
  F(nvrtcDestroyProgram, Outcome(Program *))                                                                           \
  F(nvrtcCompileProgram, Outcome(Program, int, const char *const *))                                                   \
  F(nvrtcGetProgramLogSize, Outcome(Program, size_t *))                                                                \
  F(nvrtcGetProgramLog, Outcome(Program, char *))                                                                      \
  F(nvrtcGetCUBINSize, Outcome(Program, size_t *))                                                                     \
  F(nvrtcGetCUBIN, Outcome(Program, char *))

struct Nvrtc {
  std::string path;
  int major = 0, minor = 0;
#define FLASHSPARK_NVRTC_POINTER(name, ...) std::add_pointer_t<__VA_ARGS__> name = nullptr;
  FLASHSPARK_NVRTC_FUNCTIONS(FLASHSPARK_NVRTC_POINTER)
#undef FLASHSPARK_NVRTC_POINTER

  std::string version() const { return std::to_string(major) + "." + std::to_string(minor); }
  // sm_120f, one cubin for every SM12x, came with 12.9.
  bool is_new_enough() const { return major > 12 || (major == 12 && minor >= 9); }
};

#if defined(_WIN32)
constexpr const char *kFileNames[] = {"nvrtc64_130_0.dll", "nvrtc64_120_0.dll"};
constexpr char kListSeparator = ';';
constexpr std::string_view kFolderSeparators = "/\\";
#else
constexpr const char *kFileNames[] = {"libnvrtc.so.13", "libnvrtc.so.12"};
constexpr char kListSeparator = ':';
constexpr std::string_view kFolderSeparators = "/";
#endif

std::string builtins_file(const Nvrtc &n) {
#if defined(_WIN32)
  return "nvrtc-builtins64_" + std::to_string(n.major) + std::to_string(n.minor) + ".dll";
#else
  return "libnvrtc-builtins.so." + n.version();
#endif
}

std::mutex loading;
std::string search_path;      // guarded by `loading`
std::optional<Nvrtc> loaded;  // guarded by `loading`; stays as it is once it is there

// NVRTC opens its other half by its bare name. Where libnvrtc has no RPATH, the dynamic linker finds that only once it
// is loaded from the same folder.
void load_builtins(const Nvrtc &n) {
  const size_t end = n.path.find_last_of(kFolderSeparators);
  if (end == std::string::npos) return;
  DynamicLibrary::open(n.path.substr(0, end + 1) + builtins_file(n));
}

// The functions of a library that is open. What is wrong with it goes to `faults`.
std::optional<Nvrtc> take(DynamicLibrary library, const std::string &file, std::string &faults) {
  if (!library) return std::nullopt;
  Nvrtc n;
  bool complete = true;
#define FLASHSPARK_NVRTC_TAKE(name, ...)                              \
  n.name = reinterpret_cast<decltype(n.name)>(library.symbol(#name)); \
  complete = complete && n.name != nullptr;
  FLASHSPARK_NVRTC_FUNCTIONS(FLASHSPARK_NVRTC_TAKE)
#undef FLASHSPARK_NVRTC_TAKE
  if (complete) n.path = file_of(reinterpret_cast<void *>(n.nvrtcVersion));
  if (n.path.empty()) n.path = file;
  complete = complete && n.nvrtcVersion(&n.major, &n.minor) == kDone;
  if (complete && n.is_new_enough()) {
    load_builtins(n);
    return n;
  }
  faults +=
      (faults.empty() ? "" : ", ") + n.path + (complete ? " is " + n.version() : " is no NVRTC that makes cubins");
  library.close();
  return std::nullopt;
}

constexpr const char *kMend =
    "CUDA 12.9 or newer is needed to compile kernels at run time: pip install nvidia-cuda-nvrtc (CUDA 13) or "
    "'nvidia-cuda-nvrtc-cu12>=12.9', or install the CUDA toolkit, or set FLASHSPARK_NVRTC to the path of its library";

std::vector<std::string> folders_after_plain_names() {
  std::vector<std::string> folders;
  const std::string &home = compile_environment().cuda_home;
#if defined(_WIN32)
  if (!home.empty()) folders = {home + "/bin/x64", home + "/bin"};  // of CUDA 13, of CUDA 12
#else
  if (!home.empty()) folders.push_back(home + "/lib64");
  folders.emplace_back("/usr/local/cuda/lib64");
#endif
  return folders;
}

Nvrtc find() {
  std::string faults;
  if (const std::string &file = compile_environment().nvrtc; !file.empty()) {
    const DynamicLibrary library = DynamicLibrary::open(file);
    if (auto n = take(library, file, faults)) return *n;
    if (faults.empty()) faults = library.error();
    throw Error(FLASHSPARK_UNSUPPORTED, "FLASHSPARK_NVRTC = " + file + ": " + faults + "; " + kMend);
  }
  // What torch has loaded comes first: one NVRTC is enough.
  for (const char *name : kFileNames) {
    if (auto n = take(DynamicLibrary::find_loaded(name), name, faults)) return *n;
  }
  std::vector<std::string> prefixes;
  for (size_t begin = 0; begin < search_path.size();) {
    const size_t end = std::min(search_path.find(kListSeparator, begin), search_path.size());
    if (end > begin) prefixes.push_back(search_path.substr(begin, end - begin) + "/");
    begin = end + 1;
  }
  prefixes.emplace_back("");
  for (const std::string &folder : folders_after_plain_names()) prefixes.push_back(folder + "/");
  for (const std::string &prefix : prefixes) {
    for (const char *name : kFileNames) {
      if (auto n = take(DynamicLibrary::open(prefix + name), prefix + name, faults)) return *n;
    }
  }
  throw Error(FLASHSPARK_UNSUPPORTED,
              (faults.empty() ? "NVRTC is not found" : "NVRTC is too old: " + faults) + "; " + kMend);
}

// A failure is not remembered: the user may install NVRTC and try again.
const Nvrtc &nvrtc() {
  const std::lock_guard lock(loading);
  if (!loaded) loaded = find();
  return *loaded;
}

// Without the blank end, and without what nobody reads.
std::string trim(std::string log) {
  constexpr size_t kMaxBytes = 4000;
  log.resize(std::strlen(log.c_str()));
  log.erase(log.find_last_not_of(" \n\r\t") + 1);
  if (log.size() <= kMaxBytes) return log;
  return log.substr(0, std::min(log.rfind('\n', kMaxBytes), kMaxBytes)) + "\n...";
}

std::string log_of(const Nvrtc &n, Program program) {
  size_t size = 0;
  if (n.nvrtcGetProgramLogSize(program, &size) != kDone || size == 0) return "";
  std::string log(size, '\0');
  if (n.nvrtcGetProgramLog(program, log.data()) != kDone) return "";
  return trim(log);
}

[[noreturn]] void throw_error(const Nvrtc &n, Outcome outcome, const CompileRequest &request, const std::string &log) {
  if (outcome == kCompileError && request.user_source)
    throw Error(FLASHSPARK_INVALID_ARGUMENT, "the function does not compile:\n" + log);
  std::string what = n.nvrtcGetErrorString(outcome);
  what += ", NVRTC " + n.version() + " compiling " + request.entry + " for " + request.architecture;
  if (!log.empty()) what += ":\n" + log;
  throw Error(outcome == kNoMemory ? FLASHSPARK_OUT_OF_MEMORY : FLASHSPARK_INTERNAL, what);
}

}  // namespace

std::vector<std::string> compile_options(const CompileRequest &request) {
  std::vector<std::string> options = {"-std=c++20", "-arch=" + request.architecture, "-default-device",
                                      // Only what is embedded can be included, nothing of the current folder.
                                      "-no-source-include", "-include=prelude.hpp",
                                      "-DFLASHSPARK_ENTRY=" + request.entry};
#if defined(FLASHSPARK_TILES_SM120F)
  options.emplace_back("-DFLASHSPARK_TILES_SM120F");
#endif
  for (const std::string &macro : request.macros) options.push_back("-D" + macro);
  return options;
}

std::vector<char> compile(const CompileRequest &request) {
  const Nvrtc &n = nvrtc();
  std::vector<const char *> names, texts, options;
  for (const SourceFile &file : kernel_sources()) {
    names.push_back(file.name);
    texts.push_back(file.text.data());
  }
  for (const CompileRequest::Header &header : request.headers) {
    names.push_back(header.name.c_str());
    texts.push_back(header.text.c_str());
  }
  const std::vector<std::string> option_texts = compile_options(request);
  for (const std::string &option : option_texts) options.push_back(option.c_str());

  Program program = nullptr;
  Outcome outcome = n.nvrtcCreateProgram(&program, request.source.c_str(), "kernel.cu", static_cast<int>(names.size()),
                                         texts.data(), names.data());
  if (outcome != kDone) throw_error(n, outcome, request, "");
  const auto destroy = [&n](Program p) { n.nvrtcDestroyProgram(&p); };
  const std::unique_ptr<ProgramObject, decltype(destroy)> owner(program, destroy);
  outcome = n.nvrtcCompileProgram(program, static_cast<int>(options.size()), options.data());
  if (outcome != kDone) throw_error(n, outcome, request, log_of(n, program));
  size_t size = 0;
  outcome = n.nvrtcGetCUBINSize(program, &size);
  std::vector<char> cubin(size);
  if (outcome == kDone) outcome = n.nvrtcGetCUBIN(program, cubin.data());
  if (outcome != kDone) throw_error(n, outcome, request, "");
  return cubin;
}

std::string nvrtc_version() {
  return nvrtc().version();
}

std::string nvrtc_description() {
  try {
    const Nvrtc &n = nvrtc();
    return "NVRTC " + n.version() + ", " + n.path;
  } catch (const Error &e) {
    return e.what();
  }
}

void set_nvrtc_search_path(std::string folders) {
  const std::lock_guard lock(loading);
  search_path = std::move(folders);
}

}  // namespace flashspark::cuda
