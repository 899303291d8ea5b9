// Temporary folders, and processes in which the environment is not read yet and NVRTC not loaded.
#pragma once

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/nvrtc.hpp"

namespace flashspark {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = std::filesystem::temp_directory_path() / "flashspark-XXXXXX";
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp: " + name);
    path = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  TemporaryFolder(const TemporaryFolder &) = delete;
  TemporaryFolder &operator=(const TemporaryFolder &) = delete;

  std::filesystem::path path;
};

inline std::string read_file(const std::filesystem::path &path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_file(const std::filesystem::path &path, const std::string &text) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << text;
}

inline std::vector<std::string> names_in(const std::filesystem::path &folder) {
  std::vector<std::string> names;
  for (const auto &each : std::filesystem::directory_iterator(folder)) names.push_back(each.path().filename());
  return names;
}

inline mode_t mode_of(const std::filesystem::path &path) {
  struct stat facts{};
  return stat(path.c_str(), &facts) == 0 ? facts.st_mode & 0777 : 0;
}

// A child that runs `work`, and whether it returned true.
template <class Work>
pid_t start(const Work &work) {
  const pid_t child = fork();
  if (child == 0) std::_Exit(work() ? 0 : 1);
  return child;
}
inline bool succeeded(pid_t child) {
  int status = 1;
  return waitpid(child, &status, 0) == child && status == 0;
}

// Runs the test from its begin in a new process, up to this. `work` says what is wrong, or "".
inline void in_a_process(const std::function<std::string()> &work) {
  const std::string complaint = work();
  std::fputs(complaint.c_str(), stderr);
  std::_Exit(complaint.empty() ? 0 : 1);
}

inline void expect_in_a_process(const std::function<std::string()> &work) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(in_a_process(work), testing::ExitedWithCode(0), "");
}

// nvrtc_description() of a child: this process has loaded nothing then.
inline const std::string &description_in_a_child() {
  static const std::string text = [] {
    int ends[2];
    if (pipe(ends) != 0) return std::string("no pipe");
    const pid_t child = fork();
    if (child == 0) {
      const std::string said = cuda::nvrtc_description();
      const ssize_t written = write(ends[1], said.data(), said.size());
      std::_Exit(written > 0 ? 0 : 1);
    }
    close(ends[1]);
    std::string said(4096, '\0');
    said.resize(static_cast<size_t>(std::max<ssize_t>(0, read(ends[0], said.data(), said.size()))));
    close(ends[0]);
    waitpid(child, nullptr, 0);
    return said;
  }();
  return text;
}

inline bool has_nvrtc() {
  return description_in_a_child().starts_with("NVRTC 1");
}

}  // namespace flashspark
