// The functions that Python calls, exported as tvm-ffi expects: C symbols named __tvm_ffi_<function>. tvm-ffi releases
// the interpreter lock around each call.
#include "exports.hpp"
#include "functions.hpp"
#include "signature.hpp"

namespace {

using flashspark::ffi::guarded;
using flashspark::ffi::Reader;

void give_text(const std::string &text, TVMFFIAny *result) {
  const TVMFFIByteArray bytes{text.data(), text.size()};
  if (TVMFFIStringFromByteArray(&bytes, result) != 0) throw std::bad_alloc();
}

void give_integer(int64_t value, TVMFFIAny *result) {
  result->type_index = kTVMFFIInt;
  result->zero_padding = 0;
  result->v_int64 = value;
}

}  // namespace

#define FLASHSPARK_EXPORT(name) \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##name(void *, const TVMFFIAny *args, int32_t count, TVMFFIAny *result)

FLASHSPARK_EXPORT(attention_forward) {
  static_cast<void>(result);
  return guarded([&] {
    Reader reader(args, count);
    flashspark::ffi::attention_forward(reader);
  });
}

FLASHSPARK_EXPORT(attention_explain) {
  return guarded([&] {
    Reader reader(args, count);
    give_text(flashspark::ffi::attention_explain(reader), result);
  });
}

FLASHSPARK_EXPORT(attention_validate) {
  static_cast<void>(result);
  return guarded([&] {
    Reader reader(args, count);
    flashspark::ffi::attention_validate(reader);
  });
}

FLASHSPARK_EXPORT(attention_backward) {
  static_cast<void>(result);
  return guarded([&] {
    Reader reader(args, count);
    flashspark::ffi::attention_backward(reader);
  });
}

FLASHSPARK_EXPORT(attention_backward_explain) {
  return guarded([&] {
    Reader reader(args, count);
    give_text(flashspark::ffi::attention_backward_explain(reader), result);
  });
}

FLASHSPARK_EXPORT(attention_schedule) {
  return guarded([&] {
    Reader reader(args, count);
    give_integer(flashspark::ffi::attention_schedule(reader), result);
  });
}

FLASHSPARK_EXPORT(append_kv) {
  static_cast<void>(result);
  return guarded([&] {
    Reader reader(args, count);
    flashspark::ffi::append_kv(reader);
  });
}

FLASHSPARK_EXPORT(create_block_mask) {
  static_cast<void>(result);
  return guarded([&] {
    Reader reader(args, count);
    flashspark::ffi::create_block_mask(reader);
  });
}

// score_mod_create(graph) and mask_mod_create(graph): a handle, for mod_release(handle).
FLASHSPARK_EXPORT(score_mod_create) {
  return guarded([&] { give_integer(flashspark::ffi::create_mod(Reader(args, count).text(0), true), result); });
}

FLASHSPARK_EXPORT(mask_mod_create) {
  return guarded([&] { give_integer(flashspark::ffi::create_mod(Reader(args, count).text(0), false), result); });
}

FLASHSPARK_EXPORT(mod_release) {
  static_cast<void>(result);
  return guarded([&] { flashspark::ffi::release_mod(Reader(args, count).integer(0, 0)); });
}

FLASHSPARK_EXPORT(set_nvrtc_search_path) {
  static_cast<void>(result);
  return guarded([&] { flashspark_set_nvrtc_search_path(Reader(args, count).text(0).c_str()); });
}

FLASHSPARK_EXPORT(signature) {
  static_cast<void>(args), static_cast<void>(count);
  return guarded([&] { give_text(flashspark::ffi::kSignature, result); });
}

FLASHSPARK_EXPORT(version) {
  static_cast<void>(args), static_cast<void>(count);
  return guarded([&] { give_text(flashspark_version(), result); });
}

FLASHSPARK_EXPORT(cpu_target) {
  static_cast<void>(args), static_cast<void>(count);
  return guarded([&] { give_text(flashspark_cpu_target(), result); });
}

FLASHSPARK_EXPORT(cpu_threads) {
  static_cast<void>(args), static_cast<void>(count);
  return guarded([&] { give_integer(flashspark_cpu_threads(), result); });
}

// implementation_name(index) and implementation_description(index): "" past the end.
FLASHSPARK_EXPORT(implementation_name) {
  return guarded([&] {
    const char *name = flashspark_implementation_name(Reader(args, count).integer32(0, 0));
    give_text(name != nullptr ? name : "", result);
  });
}

FLASHSPARK_EXPORT(implementation_description) {
  return guarded([&] {
    const char *text = flashspark_implementation_description(Reader(args, count).integer32(0, 0));
    give_text(text != nullptr ? text : "", result);
  });
}
