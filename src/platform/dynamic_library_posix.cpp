#include <dlfcn.h>

#include "platform/dynamic_library.hpp"

namespace flashspark {

DynamicLibrary DynamicLibrary::open(const std::string &file) {
  DynamicLibrary library;
  library.handle_ = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) library.error_ = dlerror();
  return library;
}

DynamicLibrary DynamicLibrary::open_system(const std::string &name) {
  return open(name);
}

DynamicLibrary DynamicLibrary::find_loaded(const std::string &name) {
  DynamicLibrary library;
  library.handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  return library;
}

void *DynamicLibrary::symbol(const char *name) const {
  return dlsym(handle_, name);
}

void DynamicLibrary::close() {
  if (handle_ != nullptr) dlclose(handle_);
  handle_ = nullptr;
}

std::string file_of(void *function) {
  Dl_info info{};
  return dladdr(function, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : "";
}

}  // namespace flashspark
