#include <fmt/format.h>
#include <io.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "cli/system.hpp"
#include "platform/process.hpp"
#include "platform/windows_text.hpp"

namespace flashspark::cli {
namespace {

HANDLE handle_of(Stream stream) {
  return GetStdHandle(stream == Stream::kOut ? STD_OUTPUT_HANDLE : STD_ERROR_HANDLE);
}

// A value of the registry below HKEY_LOCAL_MACHINE, a text; "" if there is none.
std::string registry_text(const wchar_t *key, const wchar_t *value) {
  std::array<wchar_t, 256> text{};
  DWORD size = sizeof text;
  if (RegGetValueW(HKEY_LOCAL_MACHINE, key, value, RRF_RT_REG_SZ, nullptr, text.data(), &size) != ERROR_SUCCESS)
    return "";
  return narrow(text.data());
}

// As the C run-time library takes command lines apart: backslashes count before a quotation mark only.
std::wstring quoted(const std::wstring &word) {
  std::wstring text = L"\"";
  size_t backslashes = 0;
  for (const wchar_t c : word) {
    if (c == L'"') text.append(backslashes + 1, L'\\');
    backslashes = c == L'\\' ? backslashes + 1 : 0;
    text += c;
  }
  return text.append(backslashes, L'\\') + L"\"";
}

// Starts a program; `out` takes its output, none: it has ours. The process, or NULL.
HANDLE start(const std::string &program, const std::vector<std::string> &arguments, HANDLE out) {
  SetEnvironmentVariableW(L"PYTHONSAFEPATH", L"1");
  std::wstring line = quoted(wide(program));
  for (const std::string &argument : arguments) line += L" " + quoted(wide(argument));
  STARTUPINFOW startup{};
  startup.cb = sizeof startup;
  if (out != nullptr) {
    startup.dwFlags = STARTF_USESTDHANDLES;
    startup.hStdOutput = out;
  }
  PROCESS_INFORMATION process{};
  if (!CreateProcessW(wide(program).c_str(), line.data(), nullptr, nullptr, out != nullptr, 0, nullptr, nullptr,
                      &startup, &process))
    return nullptr;
  CloseHandle(process.hThread);
  return process.hProcess;
}

}  // namespace

// The texts are UTF-8. Windows has no SIGPIPE: what cannot be written is an error at the end.
void prepare_standard_streams() {
  SetConsoleOutputCP(CP_UTF8);
}

bool is_terminal(Stream stream) {
  DWORD mode = 0;
  return GetConsoleMode(handle_of(stream), &mode) != 0;
}

bool takes_escapes(Stream stream) {
  DWORD mode = 0;
  const HANDLE handle = handle_of(stream);
  return GetConsoleMode(handle, &mode) && SetConsoleMode(handle, mode | ENABLE_VIRTUAL_TERMINAL_PROCESSING);
}

bool is_program(const std::filesystem::path &file) {
  std::error_code error;
  return std::filesystem::is_regular_file(file, error);
}

std::vector<std::string> folders_of(const char *variable) {
  const std::string text = environment_variable(variable).value_or("");
  std::vector<std::string> folders;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(kListSeparator, begin), text.size());
    if (end > begin) folders.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return folders;
}

std::string output_of(const std::string &program, const std::vector<std::string> &arguments) {
  SECURITY_ATTRIBUTES inherited{sizeof inherited, nullptr, TRUE};
  HANDLE from = nullptr, to = nullptr;
  if (!CreatePipe(&from, &to, &inherited, 0)) return "";
  SetHandleInformation(from, HANDLE_FLAG_INHERIT, 0);
  const HANDLE process = start(program, arguments, to);
  CloseHandle(to);
  std::string output;
  std::array<char, 4096> buffer;
  for (DWORD count = 0; ReadFile(from, buffer.data(), buffer.size(), &count, nullptr) && count > 0;)
    output.append(buffer.data(), count);
  CloseHandle(from);
  if (process != nullptr) CloseHandle(process);
  std::erase(output, '\r');
  return output;
}

// Windows has no exec: this process waits, and ends as the other does.
void become(const std::string &program, const std::vector<std::string> &arguments) {
  std::fflush(nullptr);
  const HANDLE process = start(program, arguments, nullptr);
  if (process == nullptr) throw std::runtime_error("cannot run " + program + ": " + error_words(GetLastError()));
  DWORD status = 1;
  WaitForSingleObject(process, INFINITE);
  GetExitCodeProcess(process, &status);
  std::exit(static_cast<int>(status));
}

SystemFacts system_facts() {
  constexpr wchar_t kVersion[] = L"SOFTWARE\\Microsoft\\Windows NT\\CurrentVersion";
  SystemFacts facts;
  facts.cpu = registry_text(L"HARDWARE\\DESCRIPTION\\System\\CentralProcessor\\0", L"ProcessorNameString");
  while (facts.cpu.ends_with(' ')) facts.cpu.pop_back();
  facts.arch = "x86_64";
  facts.kernel = registry_text(kVersion, L"CurrentBuildNumber");
  facts.os = registry_text(kVersion, L"ProductName");
  MEMORYSTATUSEX memory{};
  memory.dwLength = sizeof memory;
  if (GlobalMemoryStatusEx(&memory)) facts.memory_gib = static_cast<double>(memory.ullTotalPhys) / (1 << 30);
  return facts;
}

size_t free_memory() {
  MEMORYSTATUSEX memory{};
  memory.dwLength = sizeof memory;
  return GlobalMemoryStatusEx(&memory) ? memory.ullAvailPhys : 0;
}

std::string driver_number() {
  return "";
}

}  // namespace flashspark::cli
