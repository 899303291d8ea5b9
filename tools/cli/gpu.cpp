// The GPUs, the driver and the toolkit.
#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "cli/machine.hpp"
#include "cuda/device.hpp"

namespace flashspark::cli {
namespace {

void ask_driver(GpuFacts &facts) {
  const cuda::Driver &d = cuda::driver();
  facts.cuda_version = d.version;
  facts.driver_found = d.found;
  facts.none = d.init_result == cuda::kNoDevice;
  facts.error = d.unavailable_reason;
  for (int index = 0; d.unavailable_reason.empty() && index < d.device_count; ++index) {
    cuda::Device device = 0;
    size_t bytes = 0;
    FLASHSPARK_CUDA_CALL(d, cuDeviceGet, &device, index);
    FLASHSPARK_CUDA_CALL(d, cuDeviceTotalMem, &bytes, device);
    const cuda::DeviceFacts &found = cuda::device_facts(index);
    facts.gpus.push_back({found.name, found.major, found.minor, static_cast<double>(bytes) / (1 << 30)});
  }
}

// Finds the first word that looks like a version, as in "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64
// 580.95.05  Release Build ...".
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
    // Distributions' packages omit that file; cuda.h always states the version.
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
