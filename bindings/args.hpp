// Reads the packed arguments of one tvm-ffi call. Written against tvm-ffi's C interface: the C++ templates of its
// headers cost seconds a function to compile and link libtvm_ffi; this reader needs neither.
#pragma once

#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <cstdint>
#include <exception>
#include <new>
#include <string>

#include "tensor.hpp"

namespace flashspark::ffi {

// Types that DLPack cannot carry from NumPy travel as integers of the same width. `stored_as` arguments say what they
// are: a flashspark_dtype in four bits for each tensor, 0 for "as it says itself".
inline int32_t stored_type(int64_t stored_as, int tensor) {
  return static_cast<int32_t>(stored_as >> 4 * tensor & 0xf);
}

// Takes the arguments one after the other. Trailing arguments may be left out: they read as None.
class Reader {
 public:
  Reader(const TVMFFIAny *args, int32_t count) : args_(args), count_(count) {}

  // All tensors of a call share one device.
  Tensor tensor(const char *name, int32_t stored_as = 0);
  Tensor optional_tensor(const char *name, int32_t stored_as = 0);
  int64_t integer(const char *name, int64_t fallback);
  int32_t integer32(const char *name, int32_t fallback);
  double real(const char *name, double fallback);
  bool is_none() const { return next_ >= count_ || args_[next_].type_index == kTVMFFINone; }
  std::string text(const char *name);  // "" for None

  // Where the tensors read so far are, and the caller's stream there.
  template <class Params>
  void place(Params &params) const {
    if (!on_cuda_) return;
    params.device = FLASHSPARK_CUDA;
    params.device_index = device_index_;
    params.stream = TVMFFIEnvGetStream(kDLCUDA, device_index_);
  }

 private:
  const TVMFFIAny &take() { return next_ < count_ ? args_[next_++] : none_; }
  void check_device(const Tensor &tensor);

  static constexpr TVMFFIAny none_{kTVMFFINone, {0}, {0}};
  const TVMFFIAny *args_;
  int32_t count_;
  int32_t next_ = 0;
  const char *first_tensor_ = nullptr;
  bool on_cuda_ = false;
  int32_t device_index_ = 0;
};

// Sets tvm-ffi's error of this thread; returns the status that an export then gives.
int raise(const char *kind, const char *message) noexcept;

// Thrown where tvm-ffi has set its error already.
struct AlreadyRaised {};

// Runs the body of an export; no exception leaves it. Returns tvm-ffi's status: 0, or -1 with the error raised.
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
