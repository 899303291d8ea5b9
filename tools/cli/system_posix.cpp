#include <fcntl.h>
#include <fmt/format.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

#include "cli/machine.hpp"
#include "cli/system.hpp"

namespace flashspark::cli {
namespace {

// The value after the separator in the first line that starts with `key`.
std::string field(const std::string &text, const std::string &key, char separator) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with(key)) continue;
    const size_t at = line.find(separator);
    if (at == std::string::npos) continue;
    std::string value = line.substr(at + 1);
    std::erase(value, '"');
    return value.substr(std::min(value.find_first_not_of(" \t"), value.size()));
  }
  return {};
}

std::string cpu_model() {
  const std::string info = read_text("/proc/cpuinfo");
  if (std::string name = field(info, "model name", ':'); !name.empty()) return name;
  // Arm CPUs report no model name there: use the board's, or the numbers that identify the core.
  if (std::string board = read_text("/sys/firmware/devicetree/base/model"); !board.empty()) {
    std::erase(board, '\0');
    return board;
  }
  const std::string implementer = field(info, "CPU implementer", ':'), part = field(info, "CPU part", ':');
  return implementer.empty() ? "unknown" : fmt::format("Arm implementer {} part {}", implementer, part);
}

double cpu_quota() {
  std::istringstream text(read_text("/sys/fs/cgroup/cpu.max"));
  double quota = 0, period = 0;
  return text >> quota >> period && period > 0 ? quota / period : 0;  // "max 100000" means no quota
}

std::string quoted(const std::string &word) {
  std::string text = "'";
  for (const char c : word) text += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return text + "'";
}

}  // namespace

// If the caller closed a standard stream, the next file opened would take its descriptor and receive the output. Fill
// those descriptors with ones that cannot be written.
void prepare_standard_streams() {
  for (int fd = 0; fd <= 2; ++fd) {
    if (fcntl(fd, F_GETFD) < 0 && errno == EBADF) open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY);
  }
  std::signal(SIGPIPE, SIG_DFL);  // `| head -1` ends the command silently, whatever disposition was inherited
}

bool is_terminal(Stream stream) {
  return isatty(stream == Stream::kOut ? STDOUT_FILENO : STDERR_FILENO) != 0;
}

bool takes_escapes(Stream stream) {
  const char *term = std::getenv("TERM");
  return is_terminal(stream) && term && *term && std::string(term) != "dumb";
}

bool is_program(const std::filesystem::path &file) {
  return access(file.c_str(), X_OK) == 0 && std::filesystem::is_regular_file(file);
}

std::vector<std::string> folders_of(const char *variable) {
  std::istringstream text(std::getenv(variable) ? std::getenv(variable) : "");
  std::vector<std::string> folders;
  for (std::string folder; std::getline(text, folder, kListSeparator);) folders.push_back(folder);
  return folders;
}

std::string output_of(const std::string &program, const std::vector<std::string> &arguments) {
  std::string command = "PYTHONSAFEPATH=1 " + quoted(program);
  for (const std::string &argument : arguments) command += " " + quoted(argument);
  std::string output;
  if (FILE *pipe = popen((command + " 2>/dev/null").c_str(), "r")) {
    std::array<char, 4096> buffer;
    while (std::fgets(buffer.data(), buffer.size(), pipe)) output += buffer.data();
    pclose(pipe);
  }
  return output;
}

void become(const std::string &program, const std::vector<std::string> &arguments) {
  setenv("PYTHONSAFEPATH", "1", 1);
  std::vector<const char *> words{program.c_str()};
  for (const std::string &argument : arguments) words.push_back(argument.c_str());
  words.push_back(nullptr);
  execv(program.c_str(), const_cast<char *const *>(words.data()));
  throw std::runtime_error("cannot run " + program);
}

SystemFacts system_facts() {
  SystemFacts facts;
  utsname names{};
  uname(&names);
  facts.cpu = cpu_model();
  facts.arch = names.machine;
  facts.kernel = names.release;
  facts.os = field(read_text("/etc/os-release"), "PRETTY_NAME", '=');
  facts.cpu_limit = cpu_quota();
  struct sysinfo info{};
  if (sysinfo(&info) == 0) facts.memory_gib = static_cast<double>(info.totalram) * info.mem_unit / (1 << 30);
  return facts;
}

size_t free_memory() {
  return std::strtoull(field(read_text("/proc/meminfo"), "MemAvailable", ':').c_str(), nullptr, 10) << 10;  // "123 kB"
}

// Finds the first word that looks like a version, as in "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64
// 580.95.05  Release Build ...".
std::string driver_number() {
  std::istringstream words(read_text("/proc/driver/nvidia/version"));
  for (std::string word; words >> word;) {
    if (word.find_first_not_of("0123456789.") == std::string::npos && word.find('.') != std::string::npos) return word;
  }
  return {};
}

}  // namespace flashspark::cli
