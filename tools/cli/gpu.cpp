// The GPUs, the driver and the toolkit.
#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "cli/machine.hpp"
#include "cli/system.hpp"
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

void find_toolkit(GpuFacts &facts) {
  namespace fs = std::filesystem;
  std::vector<std::string> folders;
  for (const char *variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char *value = std::getenv(variable)) folders.push_back(value);
  }
  for (const std::string &folder : folders_of("PATH")) {
    std::error_code error;
    const fs::path nvcc = fs::canonical(fs::path(folder) / kNvcc, error);
    if (!error) folders.push_back(nvcc.parent_path().parent_path().string());
  }
  folders.push_back("/usr/local/cuda");
  for (const std::string &folder : folders) {
    if (!is_program(fs::path(folder) / "bin" / kNvcc)) continue;
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
