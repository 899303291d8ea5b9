// NVRTC, NVIDIA's compiler as a library: makes cubins at run time from the kernels' embedded sources and the user's
// functions. It is loaded when it is first needed; nothing of it is needed to build.
#pragma once

#include <string>
#include <vector>

namespace flashspark::cuda {

struct CompileRequest {
  // Includes files of kernels/ by their names there, and `headers`.
  std::string source;
  std::string entry;                // FLASHSPARK_ENTRY, the kernel's name in the cubin
  std::vector<std::string> macros;  // "FLASHSPARK_NAME=d128_prefill_mod"
  std::string architecture;         // "sm_120f"
  struct Header {
    std::string name, text;
  };
  std::vector<Header> headers;
  // The user wrote a part: a header, or what follows a line `#line 1 "name"` of `source`. NVRTC's errors name it, and
  // are INVALID_ARGUMENT; in our own text they are INTERNAL.
  bool user_source = false;
};

// The cubin. Throws Error: UNSUPPORTED without an NVRTC that is new enough. For any thread.
std::vector<char> compile(const CompileRequest &request);

// All that NVRTC is told beside the texts.
std::vector<std::string> compile_options(const CompileRequest &request);

// "13.0". Throws as compile() does.
std::string nvrtc_version();

// "NVRTC 13.0, /usr/local/cuda/lib64/libnvrtc.so.13", or why there is none. Never throws.
std::string nvrtc_description();

// Folders in which to look for NVRTC, separated by colons (Windows: semicolons): a C library does not know where Python
// keeps packages. Without effect once NVRTC is loaded.
void set_nvrtc_search_path(std::string folders);

}  // namespace flashspark::cuda
