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

// Gives arguments by their places in signature.def; names are what errors call them. Trailing arguments may be left
// out: they read as None.
class Reader {
 public:
  Reader(const TVMFFIAny *args, int32_t count) : args_(args), count_(count) {}
  void call_them(const char *const *names) { names_ = names; }
  const char *name(int32_t place) const { return names_ != nullptr ? names_[place] : "argument"; }

  // All tensors of a call share one device.
  Tensor tensor(int32_t place, int32_t stored_as = 0);
  Tensor optional_tensor(int32_t place, int32_t stored_as = 0);
  int64_t integer(int32_t place, int64_t fallback) const;
  int64_t bound(int32_t place) const;  // -1 for None; others are not negative
  int32_t integer32(int32_t place, int32_t fallback) const;
  int32_t flag(int32_t place, int32_t fallback) const;  // a bool, or 0 or 1
  double real(int32_t place, double fallback) const;
  bool is_none(int32_t place) const { return at(place).type_index == kTVMFFINone; }
  std::string text(int32_t place) const;  // "" for None

  // Where the tensors read so far are, and the caller's stream there.
  template <class Params>
  void place(Params &params) const {
    if (!on_cuda_) return;
    params.device = FLASHSPARK_CUDA;
    params.device_index = device_index_;
    params.stream = TVMFFIEnvGetStream(kDLCUDA, device_index_);
  }

 private:
  const TVMFFIAny &at(int32_t place) const { return place < count_ ? args_[place] : none_; }
  void check_device(const Tensor &tensor);

  static constexpr TVMFFIAny none_{kTVMFFINone, {0}, {0}};
  const TVMFFIAny *args_;
  int32_t count_;
  const char *const *names_ = nullptr;
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
