// The GPUs, asked through the driver's own library if there is one; nothing is linked or initialised beyond cuInit().
#include <dlfcn.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "cli/machine.hpp"

namespace flashspark::cli {
namespace {

// The part of the CUDA driver API that is used here; CUresult, CUdevice and CUdevice_attribute are ints.
constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;
constexpr int kNoDevice = 100;

template <class F>
F *symbol(void *library, const char *name) {
  return reinterpret_cast<F *>(dlsym(library, name));
}

void ask_driver(GpuFacts &facts) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return;
  const auto init = symbol<int(unsigned)>(library, "cuInit");
  const auto driver_version = symbol<int(int *)>(library, "cuDriverGetVersion");
  const auto count_devices = symbol<int(int *)>(library, "cuDeviceGetCount");
  const auto device_name = symbol<int(char *, int, int)>(library, "cuDeviceGetName");
  const auto attribute = symbol<int(int *, int, int)>(library, "cuDeviceGetAttribute");
  const auto total_memory = symbol<int(size_t *, int)>(library, "cuDeviceTotalMem_v2");
  if (!init || !driver_version || !count_devices || !device_name || !attribute || !total_memory) {
    facts.error = "libcuda.so.1 lacks functions that every driver has";
    return;
  }
  driver_version(&facts.cuda_version);
  if (const int result = init(0)) {
    if (result != kNoDevice) facts.error = fmt::format("cuInit() failed with CUDA error {}", result);
    return;
  }
  int count = 0;
  count_devices(&count);
  for (int device = 0; device < count; ++device) {
    Gpu gpu;
    char name[256] = "";
    size_t bytes = 0;
    device_name(name, sizeof name, device);
    attribute(&gpu.major, kComputeCapabilityMajor, device);
    attribute(&gpu.minor, kComputeCapabilityMinor, device);
    total_memory(&bytes, device);
    gpu.name = name;
    gpu.memory_gib = static_cast<double>(bytes) / (1 << 30);
    facts.gpus.push_back(gpu);
  }
}

// "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build ...": the first word like a
// version.
std::string driver_number() {
  std::istringstream words(read_text("/proc/driver/nvidia/version"));
  for (std::string word; words >> word;) {
    if (word.find_first_not_of("0123456789.") == std::string::npos && word.find('.') != std::string::npos) return word;
  }
  return {};
}

void find_toolkit(GpuFacts &facts) {
  namespace fs = std::filesystem;
  std::vector<std::string> folders;
  for (const char *variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char *value = std::getenv(variable)) folders.push_back(value);
  }
  std::istringstream path(std::getenv("PATH") ? std::getenv("PATH") : "");
  for (std::string folder; std::getline(path, folder, ':');) {
    std::error_code error;
    const fs::path nvcc = fs::canonical(fs::path(folder) / "nvcc", error);
    if (!error) folders.push_back(nvcc.parent_path().parent_path());
  }
  folders.push_back("/usr/local/cuda");
  for (const std::string &folder : folders) {
    if (access((folder + "/bin/nvcc").c_str(), X_OK) != 0) continue;
    facts.toolkit = folder;
    const auto json = nlohmann::json::parse(read_text(folder + "/version.json"), nullptr, false);
    if (!json.is_discarded() && json.contains("cuda")) facts.toolkit_version = json["cuda"].value("version", "");
    // Packages of distributions leave that file out; the header always says it.
    std::istringstream header(facts.toolkit_version.empty() ? read_text(folder + "/include/cuda.h") : "");
    for (std::string line; std::getline(header, line);) {
      int version = 0;
      if (std::sscanf(line.c_str(), "#define CUDA_VERSION %d", &version) != 1) continue;
      facts.toolkit_version = fmt::format("{}.{}", version / 1000, version % 1000 / 10);
      break;
    }
    return;
  }
}

}  // namespace

GpuFacts gpu_facts() {
  GpuFacts facts;
  facts.driver = driver_number();
  ask_driver(facts);
  find_toolkit(facts);
  return facts;
}

}  // namespace flashspark::cli
