// Calls the binding's library as Python would, where there is no Python: wine has none that could be installed.
//
//   binding_test.exe TVM_FFI.dll FOLDER      FOLDER: that of flashspark.dll and _flashspark_ffi.dll
//
// Prints what held and ends with 0, or with 1 and what did not.
#include <tvm/ffi/c_api.h>
#include <windows.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../bindings/signature.hpp"

namespace {

namespace attention = flashspark::ffi::attention;
using Export = int (*)(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);

constexpr int64_t kShape[] = {2, 70, 4, 64};  // sequences, tokens, heads, width
constexpr int64_t kElements = 2 * 70 * 4 * 64;

void require(bool holds, const std::string &what) {
  std::printf("%s: %s\n", holds ? "held" : "FAILED", what.c_str());
  if (!holds) std::exit(1);
}

HMODULE load(const std::string &path) {
  const HMODULE module = LoadLibraryExA(path.c_str(), nullptr, LOAD_WITH_ALTERED_SEARCH_PATH);
  require(module != nullptr, path + (module ? " loads" : ": error " + std::to_string(GetLastError())));
  return module;
}

template <class F>
F symbol(HMODULE module, const char *name) {
  const auto address = reinterpret_cast<F>(reinterpret_cast<void *>(GetProcAddress(module, name)));
  require(address != nullptr, name);
  return address;
}

TVMFFIAny integer(int64_t value) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIInt;
  any.v_int64 = value;
  return any;
}

TVMFFIAny text(const char *value) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIRawStr;
  any.v_c_str = value;
  return any;
}

struct Array {
  std::vector<float> elements = std::vector<float>(kElements);
  int64_t shape[4] = {kShape[0], kShape[1], kShape[2], kShape[3]};
  DLTensor tensor{};

  explicit Array(unsigned seed) {
    for (float &x : elements) {
      seed = seed * 1664525u + 1013904223u;
      x = static_cast<float>(seed >> 8) / (1 << 23) - 1;
    }
  }
  TVMFFIAny any() {
    tensor.data = elements.data();
    tensor.device = {kDLCPU, 0};
    tensor.ndim = 4;
    tensor.dtype = {kDLFloat, 32, 1};
    tensor.shape = shape;
    TVMFFIAny any{};
    any.type_index = kTVMFFIDLTensorPtr;
    any.v_ptr = &tensor;
    return any;
  }
};

// Causal attention; returns the binding's status.
int attend(Export call, const char *implementation, Array &q, Array &k, Array &v, Array &out) {
  TVMFFIAny arguments[attention::cu_seqlens_q] = {};  // None, all of them
  arguments[attention::face] = arguments[attention::stored_as] = integer(0);
  arguments[attention::q] = q.any();
  arguments[attention::k] = k.any();
  arguments[attention::v] = v.any();
  arguments[attention::out] = out.any();
  arguments[attention::causal] = integer(1);
  arguments[attention::implementation] = text(implementation);
  TVMFFIAny result{};
  return call(nullptr, arguments, attention::cu_seqlens_q, &result);
}

// What the last call raised: kind and message, as Python would show them.
std::string raised(HMODULE tvm_ffi) {
  TVMFFIObjectHandle error = nullptr;
  symbol<void (*)(TVMFFIObjectHandle *)>(tvm_ffi, "TVMFFIErrorMoveFromRaised")(&error);
  require(error != nullptr, "an error was raised");
  const TVMFFIErrorCell *cell = TVMFFIErrorGetCellPtr(error);
  return std::string(cell->kind.data, cell->kind.size) + ": " + std::string(cell->message.data, cell->message.size);
}

}  // namespace

int main(int count, char **words) {
  if (count != 3) return 2;
  const std::string folder = words[2];
  const HMODULE tvm_ffi = load(words[1]);
  load(folder + "\\flashspark.dll");  // first, as python/flashspark/_core.py does
  const HMODULE binding = load(folder + "\\_flashspark_ffi.dll");

  const auto forward = symbol<Export>(binding, "__tvm_ffi_attention_forward");
  Array q(1), k(2), v(3), out(4), oracle(5);
  require(attend(forward, "cpu-engine", q, k, v, out) == 0, "cpu-engine computes");
  require(attend(forward, "cpu-reference", q, k, v, oracle) == 0, "cpu-reference computes");
  double worst = 0;
  for (int64_t i = 0; i < kElements; ++i) {
    worst = std::fmax(worst, std::fabs(double{out.elements[i]} - double{oracle.elements[i]}));
  }
  require(worst < 1e-5, "they agree");

  k.shape[3] = 32;
  require(attend(forward, "cpu-engine", q, k, v, out) == -1, "keys of another width are refused");
  const std::string said = raised(tvm_ffi);
  require(said.rfind("ValueError: ", 0) == 0 && said.find("head") != std::string::npos, said);
  std::puts("binding: all held");
}
