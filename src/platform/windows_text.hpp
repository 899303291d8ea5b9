// Windows' own texts are UTF-16; flashspark's are UTF-8, whatever code page the process has.
#pragma once

#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>

#include <string>

namespace flashspark {

inline std::wstring wide(const std::string &text) {
  std::wstring result(MultiByteToWideChar(CP_UTF8, 0, text.data(), static_cast<int>(text.size()), nullptr, 0), L'\0');
  MultiByteToWideChar(CP_UTF8, 0, text.data(), static_cast<int>(text.size()), result.data(),
                      static_cast<int>(result.size()));
  return result;
}

inline std::string narrow(const std::wstring &text) {
  const int size = static_cast<int>(text.size());
  std::string result(WideCharToMultiByte(CP_UTF8, 0, text.data(), size, nullptr, 0, nullptr, nullptr), '\0');
  WideCharToMultiByte(CP_UTF8, 0, text.data(), size, result.data(), static_cast<int>(result.size()), nullptr, nullptr);
  return result;
}

// "the folder is missing (3)": Windows' words for GetLastError().
inline std::string error_words(DWORD error) {
  wchar_t words[256];
  DWORD size = FormatMessageW(FORMAT_MESSAGE_FROM_SYSTEM | FORMAT_MESSAGE_IGNORE_INSERTS, nullptr, error, 0, words,
                              static_cast<DWORD>(std::size(words)), nullptr);
  while (size > 0 && (words[size - 1] == L'\n' || words[size - 1] == L'\r' || words[size - 1] == L'.')) --size;
  return narrow({words, size}) + " (" + std::to_string(error) + ")";
}

// The file of a module; NULL: of the program.
inline std::wstring module_file(HMODULE module) {
  std::wstring path(MAX_PATH, L'\0');
  for (;;) {
    const DWORD size = GetModuleFileNameW(module, path.data(), static_cast<DWORD>(path.size()));
    if (size < path.size()) return path.substr(0, size);
    path.resize(2 * path.size());
  }
}

}  // namespace flashspark
