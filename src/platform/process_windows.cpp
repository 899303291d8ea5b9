#include <algorithm>
#include <bit>
#include <thread>

#include "platform/process.hpp"
#include "platform/windows_text.hpp"

namespace flashspark {

void at_fork_in_child(void (*)()) {}

// Of its processor group, which has up to 64.
int cpus_of_process() {
  DWORD_PTR own = 0, system = 0;
  if (GetProcessAffinityMask(GetCurrentProcess(), &own, &system) && own != 0) return std::popcount(uint64_t{own});
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

std::optional<std::string> environment_variable(const char *name) {
  const std::wstring key = wide(name);
  std::wstring value(256, L'\0');
  for (;;) {
    SetLastError(ERROR_SUCCESS);
    const DWORD size = GetEnvironmentVariableW(key.c_str(), value.data(), static_cast<DWORD>(value.size()));
    if (size == 0 && GetLastError() == ERROR_ENVVAR_NOT_FOUND) return std::nullopt;
    if (size < value.size()) return narrow(value.substr(0, size));
    value.resize(size);  // the end mark included
  }
}

std::string program_file() {
  return narrow(module_file(nullptr));
}

}  // namespace flashspark
