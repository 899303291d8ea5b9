// Libraries that are opened at run time: a POSIX half and a Windows half. File names are UTF-8.
#pragma once

#include <string>

namespace flashspark {

// Open as long as the process lives, unless it is closed.
class DynamicLibrary {
 public:
  DynamicLibrary() = default;

  // A path, or a bare name that is looked for where the system keeps libraries; never in the current folder. Windows
  // finds what the library needs beside it, too.
  static DynamicLibrary open(const std::string &file);
  // One that comes with the system or its drivers; on Windows from System32 alone.
  static DynamicLibrary open_system(const std::string &name);
  // One of this name that the process has loaded already.
  static DynamicLibrary find_loaded(const std::string &name);

  explicit operator bool() const { return handle_ != nullptr; }
  // Why open() failed.
  const std::string &error() const { return error_; }
  void *symbol(const char *name) const;
  void close();

 private:
  void *handle_ = nullptr;
  std::string error_;
};

// The file that a function was loaded from, or "".
std::string file_of(void *function);

}  // namespace flashspark
