#include "args.hpp"

namespace flashspark::ffi {
namespace {

const char *type_name(int32_t type_index) {
  switch (type_index) {
    case kTVMFFINone:
      return "None";
    case kTVMFFIInt:
      return "an int";
    case kTVMFFIBool:
      return "a bool";
    case kTVMFFIFloat:
      return "a float";
    case kTVMFFIRawStr:
    case kTVMFFISmallStr:
    case kTVMFFIStr:
      return "a str";
    case kTVMFFIArray:
      return "a list or tuple";
    case kTVMFFITensor:
    case kTVMFFIDLTensorPtr:
      return "a tensor";
    default:
      return "an object of another type";
  }
}

[[noreturn]] void fail_kind(const char *name, int32_t type_index, const char *wanted) {
  fail_type(name, type_name(type_index), wanted);
}

}  // namespace

void Reader::check_device(const Tensor &tensor) {
  const DLDevice device = tensor.device();
  const bool cuda = device.device_type == kDLCUDA || device.device_type == kDLCUDAManaged;
  const auto text = [](bool on_cuda, int32_t index) {
    return on_cuda ? "cuda:" + std::to_string(index) : std::string("cpu");
  };
  if (!cuda && !tensor.on_host()) {
    fail("NotImplementedError", std::string(tensor.name()) + ".device",
         "DLPack device type " + std::to_string(device.device_type), "must be the CPU or a CUDA device");
  }
  const int32_t index = cuda ? device.device_id : 0;
  if (first_tensor_ == nullptr) {
    first_tensor_ = tensor.name();
    on_cuda_ = cuda;
    device_index_ = index;
  } else if (cuda != on_cuda_ || index != device_index_) {
    fail_value(std::string(tensor.name()) + ".device", text(cuda, index),
               std::string("must be the device of ") + first_tensor_ + ", " + text(on_cuda_, device_index_));
  }
}

Tensor Reader::optional_tensor(int32_t index, int32_t stored_as, const char *called) {
  const char *word = called != nullptr ? called : name(index);
  const TVMFFIAny &arg = at(index);
  if (arg.type_index == kTVMFFINone) return {};
  if (arg.type_index != kTVMFFITensor && arg.type_index != kTVMFFIDLTensorPtr) {
    fail_kind(word, arg.type_index, "must be a NumPy array, a torch tensor or another DLPack tensor");
  }
  const DLTensor *raw = arg.type_index == kTVMFFITensor ? TVMFFITensorGetDLTensorPtr(arg.v_obj)
                                                        : static_cast<const DLTensor *>(arg.v_ptr);
  const Tensor tensor(raw, word, stored_as);
  // To the C interface a null pointer is an absent tensor.
  if (raw->data == nullptr && !tensor.empty()) {
    fail_value(tensor.name(), "a tensor without memory", "must hold its elements");
  }
  check_device(tensor);
  return tensor;
}

Tensor Reader::tensor(int32_t index, int32_t stored_as) {
  if (is_none(index)) fail_type(name(index), "None", "must be a NumPy array, a torch tensor or another DLPack tensor");
  return optional_tensor(index, stored_as);
}

int64_t Reader::integer(int32_t index, int64_t fallback) const {
  const TVMFFIAny &arg = at(index);
  if (arg.type_index == kTVMFFINone) return fallback;
  if (arg.type_index != kTVMFFIInt) fail_kind(name(index), arg.type_index, "must be an int");
  return arg.v_int64;
}

int64_t Reader::bound(int32_t index) const {
  if (is_none(index)) return -1;
  const int64_t value = integer(index, -1);
  if (value < 0) fail_value(name(index), std::to_string(value), "must be at least 0, or None");
  return value;
}

int32_t Reader::integer32(int32_t index, int32_t fallback) const {
  const int64_t value = integer(index, fallback);
  if (value < INT32_MIN || value > INT32_MAX) fail_value(name(index), std::to_string(value), "must fit in 32 bits");
  return static_cast<int32_t>(value);
}

int32_t Reader::flag(int32_t index, int32_t fallback) const {
  const TVMFFIAny &arg = at(index);
  if (arg.type_index == kTVMFFINone) return fallback;
  if (arg.type_index != kTVMFFIInt && arg.type_index != kTVMFFIBool) {
    fail_kind(name(index), arg.type_index, "must be a bool");
  }
  if (arg.v_int64 != 0 && arg.v_int64 != 1) fail_value(name(index), std::to_string(arg.v_int64), "must be 0 or 1");
  return static_cast<int32_t>(arg.v_int64);
}

double Reader::real(int32_t index, double fallback) const {
  const TVMFFIAny &arg = at(index);
  switch (arg.type_index) {
    case kTVMFFINone:
      return fallback;
    case kTVMFFIFloat:
      return arg.v_float64;
    case kTVMFFIInt:
      return static_cast<double>(arg.v_int64);
    default:
      fail_kind(name(index), arg.type_index, "must be a float");
  }
}

std::string Reader::text(int32_t index) const {
  const TVMFFIAny &arg = at(index);
  switch (arg.type_index) {
    case kTVMFFINone:
      return "";
    case kTVMFFIRawStr:
      return arg.v_c_str;
    case kTVMFFISmallStr:
      return {arg.v_bytes, arg.small_str_len};
    case kTVMFFIStr: {
      const TVMFFIByteArray *bytes = TVMFFIBytesGetByteArrayPtr(arg.v_obj);
      return {bytes->data, bytes->size};
    }
    default:
      fail_kind(name(index), arg.type_index, "must be a str");
  }
}

int raise(const char *kind, const char *message) noexcept {
  TVMFFIErrorSetRaisedFromCStr(kind, message);
  return -1;
}

}  // namespace flashspark::ffi
