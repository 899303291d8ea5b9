// A tensor argument, checks that name it in their errors, and the errors.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "flashspark/flashspark.h"

namespace flashspark::ffi {

// Thrown inside the binding only; guarded() turns it into the Python exception that `kind` names.
struct CallError {
  const char *kind;  // "ValueError", "TypeError", ...
  std::string message;
};

// "page_size = 24: must be a multiple of 16", in the form of the library's own errors.
[[noreturn]] void fail(const char *kind, const std::string &argument, const std::string &value,
                       const std::string &rule);
[[noreturn]] void fail_value(const std::string &argument, const std::string &value, const std::string &rule);
[[noreturn]] void fail_type(const std::string &argument, const std::string &value, const std::string &rule);

// A borrowed tensor argument, or an absent one. `dtype` is a flashspark_dtype; FLASHSPARK_DTYPE_NONE for other types.
class Tensor {
 public:
  Tensor() = default;
  Tensor(const DLTensor *tensor, const char *name, int32_t stored_as);

  explicit operator bool() const { return tensor_ != nullptr; }
  const char *name() const { return name_; }
  int32_t ndim() const { return tensor_->ndim; }
  int64_t size(int32_t i) const { return tensor_->shape[axis(i)]; }
  int64_t stride(int32_t i) const;
  void *data() const { return static_cast<char *>(tensor_->data) + tensor_->byte_offset; }
  int32_t dtype() const { return dtype_; }
  DLDevice device() const { return tensor_->device; }
  bool empty() const;  // has no elements
  bool on_host() const { return tensor_->device.device_type == kDLCPU || tensor_->device.device_type == kDLCUDAHost; }
  std::string shape_text() const;
  std::string dtype_text() const;
  // The tensor (num_seqs, heads, tokens, width) as one (num_seqs, tokens, heads, width).
  Tensor heads_first() const {
    Tensor to = *this;
    to.heads_first_ = ndim() == 4;
    return to;
  }

  void require_ndim(std::initializer_list<int32_t> allowed, const char *meaning) const;
  void require_size(int32_t i, int64_t expected, const char *meaning) const;
  void require_rows() const;         // size(0) fits in 32 bits
  void require_unit_stride() const;  // the last dimension is contiguous
  void require_dense() const;        // all dimensions are contiguous
  void require_float() const;        // f32, f16, bf16 or e4m3
  void require_float32() const;
  const int32_t *int32_data() const;
  const int64_t *int64_vector() const;
  const uint64_t *random_state() const;  // seed and offset, signed or not: their bits alone count

  // The fields of the C structs. int32_vector() and per_head_scale() accept an absent tensor and give null then.
  flashspark_tensor rows() const;  // (.., tokens, heads, width), only the last dimension contiguous
  const int32_t *int32_vector(int64_t expected, const char *meaning) const;
  flashspark_scale per_head_scale(int64_t num_seqs, int64_t num_heads_kv) const;  // or one element for all
  // Of any shape and type that a function may read. stored_as: a flashspark_dtype, or 0 for the tensor's own type.
  flashspark_captured_tensor captured(int32_t stored_as) const;

 private:
  void require_integer(int bits) const;
  // Of dimension i in the tensor's own order.
  int32_t axis(int32_t i) const {
    if (i < 0) i += tensor_->ndim;
    return heads_first_ && (i == 1 || i == 2) ? 3 - i : i;
  }

  const DLTensor *tensor_ = nullptr;
  const char *name_ = "";
  int32_t dtype_ = FLASHSPARK_DTYPE_NONE;
  bool heads_first_ = false;
};

}  // namespace flashspark::ffi
