#include "platform/dynamic_library.hpp"
#include "platform/windows_text.hpp"

namespace flashspark {
namespace {

HMODULE load(const std::string &file, DWORD where, std::string &error) {
  const HMODULE module = LoadLibraryExW(wide(file).c_str(), nullptr, where);
  if (module == nullptr) error = file + ": " + error_words(GetLastError());
  return module;
}

}  // namespace

DynamicLibrary DynamicLibrary::open(const std::string &file) {
  DynamicLibrary library;
  // Windows refuses the folder of a library for a name without one.
  const bool is_path = file.find_first_of("/\\") != std::string::npos;
  std::string path = file;
  for (char &c : path) c = c == '/' ? '\\' : c;  // LoadLibraryExW wants its own separators
  library.handle_ =
      load(path, LOAD_LIBRARY_SEARCH_DEFAULT_DIRS | (is_path ? LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR : 0), library.error_);
  return library;
}

DynamicLibrary DynamicLibrary::open_system(const std::string &name) {
  DynamicLibrary library;
  library.handle_ = load(name, LOAD_LIBRARY_SEARCH_SYSTEM32, library.error_);
  return library;
}

DynamicLibrary DynamicLibrary::find_loaded(const std::string &name) {
  DynamicLibrary library;
  HMODULE module = nullptr;
  if (GetModuleHandleExW(0, wide(name).c_str(), &module)) library.handle_ = module;
  return library;
}

void *DynamicLibrary::symbol(const char *name) const {
  return reinterpret_cast<void *>(GetProcAddress(static_cast<HMODULE>(handle_), name));
}

void DynamicLibrary::close() {
  if (handle_ != nullptr) FreeLibrary(static_cast<HMODULE>(handle_));
  handle_ = nullptr;
}

std::string file_of(void *function) {
  HMODULE module = nullptr;
  constexpr DWORD kOfAddress = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
  if (!GetModuleHandleExW(kOfAddress, reinterpret_cast<const wchar_t *>(function), &module)) return "";
  return narrow(module_file(module));
}

}  // namespace flashspark
