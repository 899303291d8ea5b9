// Reads the packed arguments of one tvm-ffi call through tvm-ffi's C interface. Unlike the C++ templates in its
// headers, this compiles quickly and does not link against libtvm_ffi.
#pragma once

#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <cstdint>
#include <exception>
#include <new>
#include <string>

#include "tensor.hpp"

namespace flashspark::ffi {

// Types that NumPy cannot export through DLPack are passed as integers of the same width. The argument `stored_as`
// holds their flashspark_dtype, four bits for each tensor; 0: the tensor's own type.
inline int32_t stored_type(int64_t stored_as, int tensor) {
  return static_cast<int32_t>(stored_as >> 4 * tensor & 0xf);
}

// Reads arguments by their index in signature.def, and names them in errors. Arguments left out at the end read as
// None.
class Reader {
 public:
  Reader(const TVMFFIAny *args, int32_t count) : args_(args), count_(count) {}
  // Of the first `count` arguments; `rest`: of those behind them.
  void set_names(const char *const *names, int32_t count, const char *rest = "argument") {
    names_ = names;
    num_names_ = count;
    rest_ = rest;
  }
  // From now on argument 0 is what argument `by` was.
  void move(int32_t by) { args_ += by, count_ -= by; }
  const char *name(int32_t index) const { return index < num_names_ ? names_[index] : rest_; }
  bool has(int32_t index) const { return index < count_; }

  // All tensors of a call must be on one device.
  Tensor tensor(int32_t index, int32_t stored_as = 0);
  Tensor optional_tensor(int32_t index, int32_t stored_as = 0, const char *called = nullptr);
  int64_t integer(int32_t index, int64_t fallback) const;
  int64_t bound(int32_t index) const;  // at least 0, or -1 for None
  int32_t integer32(int32_t index, int32_t fallback) const;
  int32_t flag(int32_t index, int32_t fallback) const;  // a bool, or 0 or 1
  double real(int32_t index, double fallback) const;
  bool is_none(int32_t index) const { return at(index).type_index == kTVMFFINone; }
  std::string text(int32_t index) const;  // "" for None

  // Sets the device of the tensors read so far, and the caller's current stream there.
  template <class Params>
  void set_device(Params &params) const {
    if (!on_cuda_) return;
    params.device = FLASHSPARK_CUDA;
    params.device_index = device_index_;
    params.stream = TVMFFIEnvGetStream(kDLCUDA, device_index_);
  }

 private:
  const TVMFFIAny &at(int32_t index) const { return index < count_ ? args_[index] : none_; }
  void check_device(const Tensor &tensor);

  static constexpr TVMFFIAny none_{kTVMFFINone, {0}, {0}};
  const TVMFFIAny *args_;
  int32_t count_;
  const char *const *names_ = nullptr;
  int32_t num_names_ = 0;
  const char *rest_ = "argument";
  const char *first_tensor_ = nullptr;
  bool on_cuda_ = false;
  int32_t device_index_ = 0;
};

// Sets this thread's tvm-ffi error; returns the status for an export to return.
int raise(const char *kind, const char *message) noexcept;

// Thrown if tvm-ffi has already set its error.
struct AlreadyRaised {};

// Runs the body of an export and catches every exception. Returns tvm-ffi's status: 0, or -1 with the error set.
template <typename Body>
int guarded(Body &&body) noexcept {
  try {
    body();
    return 0;
  } catch (const CallError &error) {
    return raise(error.kind, error.message.c_str());
  } catch (const AlreadyRaised &) {
    return -1;
  } catch (const std::bad_alloc &) {
    return raise("MemoryError", "out of memory");
  } catch (const std::exception &error) {
    return raise("RuntimeError", error.what());
  }
}

}  // namespace flashspark::ffi
