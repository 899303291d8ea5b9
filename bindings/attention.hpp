// What attention's forward and backward calls share: the arguments of the problem, errors, scratch memory.
#pragma once

#include <string>

#include "functions.hpp"
#include "names.hpp"

namespace flashspark::ffi {

struct Call {
  Face face = kFunc;
  bool heads_first = false;
  int64_t stored_as = 0;
  flashspark_attention_params params;
  std::string implementation;
  FunctionArguments functions;

  // A tensor of q's, k's, v's or out's layout as (.., tokens, heads, width).
  Tensor in_order(const Tensor &tensor) const { return heads_first ? tensor.heads_first() : tensor; }
};

enum { kStoredQ, kStoredK, kStoredV, kStoredOut, kStoredSinks, kStoredRel };  // indices in `stored_as`

void read_call(Reader &args, Call &call);

// Throws the error of a call that has failed, in the words of this face.
void require_ok(flashspark_status status, Face face);

// What would run, or what each implementation lacks.
template <class Params>
std::string explained(Face face, flashspark_status (*explain)(const Params *, char *, size_t), const Params &params) {
  std::string text(8192, '\0');
  const flashspark_status status = explain(&params, text.data(), text.size());
  if (status != FLASHSPARK_UNSUPPORTED) require_ok(status, face);
  text.resize(text.find('\0'));
  return text;
}

// Scratch memory from the allocator of the caller's framework, if it has set one for the call: torch's respects streams
// and graph captures, and is faster than the driver's, which the library uses otherwise.
class Scratch {
 public:
  explicit Scratch(int32_t device_index) : device_index_(device_index) {}
  ~Scratch() {
    if (tensor_ != nullptr) TVMFFIObjectDecRef(tensor_);  // the allocator reuses memory in stream order
  }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;

  flashspark_allocator allocator();  // for calls with this object as context; NULL: the library's own
  // An error of the framework's stays raised there: it must not pass through C.
  bool failed() const { return failed_; }

 private:
  static void *allocate(void *scratch, size_t bytes);

  int32_t device_index_;
  bool failed_ = false;
  TVMFFIObjectHandle tensor_ = nullptr;
};

}  // namespace flashspark::ffi
