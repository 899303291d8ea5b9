#include "tensor.hpp"

namespace flashspark::ffi {
namespace {

std::string list_text(const int64_t *values, int32_t count) {
  std::string text = "(";
  for (int32_t i = 0; i < count; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  return text + (count == 1 ? ",)" : ")");
}

int32_t dtype_of(DLDataType type) {
  if (type.lanes != 1) return FLASHSPARK_DTYPE_NONE;
  if (type.code == kDLFloat && type.bits == 32) return FLASHSPARK_FLOAT32;
  if (type.code == kDLFloat && type.bits == 16) return FLASHSPARK_FLOAT16;
  if (type.code == kDLBfloat && type.bits == 16) return FLASHSPARK_BFLOAT16;
  if (type.code == kDLFloat8_e4m3fn && type.bits == 8) return FLASHSPARK_FLOAT8_E4M3;
  return FLASHSPARK_DTYPE_NONE;
}

// Of a tensor that a function reads.
int32_t captured_dtype_of(DLDataType type) {
  constexpr struct {
    uint8_t code, bits;
    int32_t dtype;
  } kTypes[] = {{kDLFloat, 64, FLASHSPARK_FLOAT64}, {kDLFloat, 32, FLASHSPARK_FLOAT32},
                {kDLFloat, 16, FLASHSPARK_FLOAT16}, {kDLBfloat, 16, FLASHSPARK_BFLOAT16},
                {kDLBool, 8, FLASHSPARK_BOOL},      {kDLUInt, 8, FLASHSPARK_UINT8},
                {kDLInt, 8, FLASHSPARK_INT8},       {kDLInt, 16, FLASHSPARK_INT16},
                {kDLInt, 32, FLASHSPARK_INT32},     {kDLInt, 64, FLASHSPARK_INT64}};
  for (const auto &known : kTypes) {
    if (type.lanes == 1 && type.code == known.code && type.bits == known.bits) return known.dtype;
  }
  return FLASHSPARK_DTYPE_NONE;
}

}  // namespace

void fail(const char *kind, const std::string &argument, const std::string &value, const std::string &rule) {
  throw CallError{kind, argument + " = " + value + ": " + rule};
}
void fail_value(const std::string &argument, const std::string &value, const std::string &rule) {
  fail("ValueError", argument, value, rule);
}
void fail_type(const std::string &argument, const std::string &value, const std::string &rule) {
  fail("TypeError", argument, value, rule);
}

Tensor::Tensor(const DLTensor *tensor, const char *name, int32_t stored_as) : tensor_(tensor), name_(name) {
  dtype_ = dtype_of(tensor->dtype);
  if (stored_as == 0) return;
  const bool same_width = tensor->dtype.lanes == 1 && tensor->dtype.bits == 8 * flashspark_dtype_size(stored_as);
  if (!same_width)
    fail_type(std::string(name) + ".dtype", dtype_text(), "does not have the width of the type it stands for");
  dtype_ = stored_as;
}

int64_t Tensor::stride(int32_t i) const {
  i = axis(i);
  if (tensor_->strides != nullptr) return tensor_->strides[i];
  int64_t stride = 1;  // in DLPack null strides mean row-major
  for (int32_t j = tensor_->ndim - 1; j > i; --j) stride *= tensor_->shape[j];
  return stride;
}

bool Tensor::empty() const {
  for (int32_t i = 0; i < ndim(); ++i) {
    if (size(i) == 0) return true;
  }
  return false;
}

std::string Tensor::shape_text() const {
  return list_text(tensor_->shape, tensor_->ndim);
}

std::string Tensor::dtype_text() const {
  switch (dtype_) {
    case FLASHSPARK_FLOAT32:
      return "float32";
    case FLASHSPARK_FLOAT16:
      return "float16";
    case FLASHSPARK_BFLOAT16:
      return "bfloat16";
    case FLASHSPARK_FLOAT8_E4M3:
      return "float8_e4m3";
    default:
      break;
  }
  const DLDataType type = tensor_->dtype;
  const char *prefix = type.code == kDLInt     ? "int"
                       : type.code == kDLUInt  ? "uint"
                       : type.code == kDLFloat ? "float"
                       : type.code == kDLBool  ? "bool"
                                               : nullptr;
  if (prefix == nullptr)
    return "dlpack type " + std::to_string(type.code) + " of " + std::to_string(type.bits) + " bits";
  return type.code == kDLBool ? prefix : prefix + std::to_string(type.bits);
}

void Tensor::require_ndim(std::initializer_list<int32_t> allowed, const char *meaning) const {
  for (const int32_t n : allowed) {
    if (ndim() == n) return;
  }
  fail_value(std::string(name_) + ".shape", shape_text(), std::string("must be ") + meaning);
}

void Tensor::require_size(int32_t i, int64_t expected, const char *meaning) const {
  if (size(i) == expected) return;
  const int32_t index = i < 0 ? i + ndim() : i;
  fail_value(std::string(name_) + ".shape[" + std::to_string(index) + "]", std::to_string(size(i)),
             std::string("must be ") + meaning + ", " + std::to_string(expected));
}

void Tensor::require_rows() const {
  if (size(0) <= INT32_MAX) return;
  fail_value(std::string(name_) + ".shape[0]", std::to_string(size(0)), "must be below 2^31");
}

void Tensor::require_unit_stride() const {
  // The strides of an empty tensor are arbitrary.
  if (size(-1) <= 1 || stride(-1) == 1 || empty()) return;
  fail_value(std::string(name_) + ".stride(-1)", std::to_string(stride(-1)),
             "must be 1: the last dimension is contiguous");
}

void Tensor::require_dense() const {
  int64_t expected = 1;
  for (int32_t i = ndim() - 1; i >= 0; --i) {
    if (size(i) == 0) return;
    if (size(i) > 1 && stride(i) != expected) {
      fail_value(std::string(name_) + ".stride(" + std::to_string(i) + ")", std::to_string(stride(i)),
                 "must be " + std::to_string(expected) + ": the array is contiguous");
    }
    expected *= size(i);
  }
}

void Tensor::require_float() const {
  if (dtype_ == FLASHSPARK_DTYPE_NONE) {
    fail_type(std::string(name_) + ".dtype", dtype_text(), "must be float32, float16, bfloat16 or float8_e4m3");
  }
}

void Tensor::require_float32() const {
  if (dtype_ != FLASHSPARK_FLOAT32) fail_type(std::string(name_) + ".dtype", dtype_text(), "must be float32");
}

void Tensor::require_integer(int bits) const {
  const DLDataType type = tensor_->dtype;
  if (type.code == kDLInt && type.bits == bits && type.lanes == 1) return;
  fail_type(std::string(name_) + ".dtype", dtype_text(), "must be int" + std::to_string(bits));
}

const int32_t *Tensor::int32_data() const {
  require_integer(32);
  return static_cast<const int32_t *>(data());
}

const int64_t *Tensor::int64_vector() const {
  require_ndim({1}, "of one dimension");
  require_dense();
  require_integer(64);
  return static_cast<const int64_t *>(data());
}

const uint64_t *Tensor::random_state() const {
  require_ndim({1}, "(2,): seed and offset");
  require_size(0, 2, "seed and offset");
  require_dense();
  const DLDataType type = tensor_->dtype;
  if ((type.code != kDLInt && type.code != kDLUInt) || type.bits != 64 || type.lanes != 1)
    fail_type(std::string(name_) + ".dtype", dtype_text(), "must be int64 or uint64");
  return static_cast<const uint64_t *>(data());
}

flashspark_tensor Tensor::rows() const {
  require_float();
  require_unit_stride();
  return {data(), ndim() == 4 ? stride(0) : 0, stride(-3), stride(-2), dtype_, 0};
}

const int32_t *Tensor::int32_vector(int64_t expected, const char *meaning) const {
  if (tensor_ == nullptr) return nullptr;
  require_ndim({1}, "of one dimension");
  require_size(0, expected, meaning);
  require_dense();
  return int32_data();
}

flashspark_scale Tensor::per_head_scale(int64_t num_seqs, int64_t num_heads_kv) const {
  if (tensor_ == nullptr) return {nullptr, 0, 0};
  require_float32();
  const auto values = static_cast<const float *>(data());
  if (ndim() == 0 || (ndim() == 1 && size(0) == 1)) return {values, 0, 0};
  require_ndim({2}, "(num_seqs, num_heads_kv), or of one element");
  require_size(0, num_seqs, "the number of sequences");
  require_size(1, num_heads_kv, "the number of KV heads");
  return {values, stride(0), stride(1)};
}

flashspark_captured_tensor Tensor::captured(int32_t stored_as) const {
  flashspark_captured_tensor to{};
  to.dtype = stored_as != 0 ? stored_as : captured_dtype_of(tensor_->dtype);
  if (to.dtype == FLASHSPARK_DTYPE_NONE)
    fail_type(std::string(name_) + ".dtype", dtype_text(), "must be bool, an integer or a float type");
  if (ndim() > FLASHSPARK_MAX_CAPTURED_RANK)
    fail_value(std::string(name_) + ".ndim", std::to_string(ndim()), "must be at most 8");
  to.data = data();
  to.rank = ndim();
  for (int32_t d = 0; d < to.rank; ++d) {
    to.shape[d] = size(d);
    to.strides[d] = stride(d);
  }
  return to;
}

}  // namespace flashspark::ffi
