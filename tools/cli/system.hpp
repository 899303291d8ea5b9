// What the command asks of the operating system: a POSIX half and a Windows half.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

namespace flashspark::cli {

#if defined(_WIN32)
constexpr char kLibraryFile[] = "flashspark.dll", kPython[] = "python.exe", kVenvPrograms[] = "Scripts",
               kNvcc[] = "nvcc.exe";
constexpr char kListSeparator = ';';
#else
constexpr char kLibraryFile[] = "libflashspark.so", kPython[] = "python3", kVenvPrograms[] = "bin", kNvcc[] = "nvcc";
constexpr char kListSeparator = ':';
#endif

// Called first: no file takes the place of a closed standard stream, and output that nobody reads ends the command.
void prepare_standard_streams();

// Whether stdout or stderr is a terminal that supports escape sequences.
enum class Stream { kOut, kErr };
bool takes_escapes(Stream stream);
bool is_terminal(Stream stream);

bool is_program(const std::filesystem::path &file);
// A list of folders in the environment: PATH.
std::vector<std::string> folders_of(const char *variable);

// The standard output of a program, with PYTHONSAFEPATH=1: the current folder may contain another numpy or vllm, and
// Python's option -P requires 3.11. What it says on stderr is dropped.
std::string output_of(const std::string &program, const std::vector<std::string> &arguments);
// Goes on as another program, likewise. Throws if there is none.
[[noreturn]] void become(const std::string &program, const std::vector<std::string> &arguments);

struct SystemFacts {
  std::string cpu;     // "AMD EPYC 7763"
  std::string arch;    // "x86_64"
  std::string kernel;  // "6.1.0"
  std::string os;      // "Debian GNU/Linux 12 (bookworm)"
  double memory_gib = 0;
  double cpu_limit = 0;  // CPUs that the container's quota allows; 0: no quota
};
SystemFacts system_facts();
size_t free_memory();  // bytes available without swapping
std::string
driver_number();  // of the NVIDIA kernel module: "580.95.05"; "" if there is none or the system does not say

}  // namespace flashspark::cli
