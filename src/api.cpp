// The public entry points. Nothing throws past here.
#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <string_view>

#include "cpu/engine.hpp"
#include "cpu/thread_pool.hpp"
#include "cuda/nvrtc.hpp"
#include "dispatch.hpp"
#include "dtype.hpp"
#include "environment.hpp"
#include "error.hpp"
#include "mod.hpp"
#include "validate.hpp"

namespace fs = flashspark;

namespace {

template <class F>
flashspark_status guarded(F &&f) noexcept {
  try {
    f();
    return FLASHSPARK_OK;
  } catch (const fs::Error &error) {
    fs::set_last_error(error.what());
    return error.status();
  } catch (const std::bad_alloc &) {
    fs::set_last_error("out of memory");
    return FLASHSPARK_OUT_OF_MEMORY;
  } catch (const std::exception &error) {
    fs::set_last_error(error.what());
    return FLASHSPARK_INTERNAL;
  } catch (...) {
    fs::set_last_error("unknown error");
    return FLASHSPARK_INTERNAL;
  }
}

template <class T>
const T &checked(const T *params, void (*validate)(const T &) = fs::validate) {
  fs::check_environment();
  if (params == nullptr) fs::fail("params", "NULL", "must point to the problem");
  validate(*params);
  return *params;
}

flashspark_status create(const char *text, bool is_score, flashspark_mod **mod) {
  return guarded([&] {
    if (mod == nullptr) fs::fail("mod", "NULL", "must point to the result");
    *mod = fs::make_mod(text, is_score);
  });
}

// The place of a name; -1: it is not there.
int32_t index_of(const std::vector<std::string> &names, const char *name) {
  const auto found = std::find(names.begin(), names.end(), std::string_view(name != nullptr ? name : ""));
  return found != names.end() ? static_cast<int32_t>(found - names.begin()) : -1;
}

template <class T>
T &result(T *size) {
  if (size == nullptr) fs::fail("size", "NULL", "must point to the result");
  return *size;
}

// Writes what explain() says of the problem, and fails where `choose` does.
template <class T, class Choice>
flashspark_status explained(const T *params, Choice (*choose)(const T &), char *buffer, size_t size) {
  if (buffer != nullptr && size > 0) *buffer = '\0';
  return guarded([&] {
    const T &p = checked(params);
    const std::string text = fs::explain(p);
    if (buffer != nullptr && size > 0) {
      const size_t length = std::min(text.size(), size - 1);
      std::memcpy(buffer, text.data(), length);
      buffer[length] = '\0';
    }
    choose(p);
  });
}

}  // namespace

void flashspark_attention_params_init(flashspark_attention_params *params) {
  *params = {};
  params->struct_size = sizeof *params;
  params->abi_version = FLASHSPARK_ABI_VERSION;
  params->softmax_scale = 1.0f;
  params->window_left = -1;
  params->window_right = -1;
}

void flashspark_attention_backward_params_init(flashspark_attention_backward_params *params) {
  *params = {};
  params->struct_size = sizeof *params;
  params->abi_version = FLASHSPARK_ABI_VERSION;
  flashspark_attention_params_init(&params->forward);
}

void flashspark_append_params_init(flashspark_append_params *params) {
  *params = {};
  params->struct_size = sizeof *params;
  params->abi_version = FLASHSPARK_ABI_VERSION;
}

void flashspark_block_mask_params_init(flashspark_block_mask_params *params) {
  *params = {};
  params->struct_size = sizeof *params;
  params->abi_version = FLASHSPARK_ABI_VERSION;
}

flashspark_status flashspark_attention_forward(const flashspark_attention_params *params) {
  return flashspark_attention_forward_with_allocator(params, nullptr, nullptr);
}

flashspark_status flashspark_attention_forward_with_allocator(const flashspark_attention_params *params,
                                                              flashspark_allocator allocate, void *context) {
  return guarded([&] {
    const fs::Params &p = checked(params);
    fs::choose(p).forward(p, {allocate, context});
  });
}

flashspark_status flashspark_attention_workspace_size(const flashspark_attention_params *params, size_t *size) {
  return guarded([&] {
    const fs::Params &p = checked(params);
    result(size) = fs::choose(p).workspace(p);
  });
}

flashspark_status flashspark_attention_schedule(const flashspark_attention_params *params) {
  return guarded([&] {
    const fs::Params &p = checked(params, fs::validate_schedule);
    fs::choose_schedule(p).schedule(p);
  });
}

flashspark_status flashspark_attention_schedule_size(const flashspark_attention_params *params, int64_t *size) {
  return guarded([&] {
    const fs::Params &p = checked(params, fs::validate_schedule);
    result(size) = fs::choose_schedule(p).schedule_size(p);
  });
}

flashspark_status flashspark_attention_validate(const flashspark_attention_params *params) {
  return guarded([&] { checked(params); });
}

flashspark_status flashspark_attention_explain(const flashspark_attention_params *params, char *buffer, size_t size) {
  return explained(params, fs::choose, buffer, size);
}

flashspark_status flashspark_attention_backward(const flashspark_attention_backward_params *params) {
  return flashspark_attention_backward_with_allocator(params, nullptr, nullptr);
}

flashspark_status flashspark_attention_backward_with_allocator(const flashspark_attention_backward_params *params,
                                                               flashspark_allocator allocate, void *context) {
  return guarded([&] {
    const fs::BackwardParams &p = checked(params);
    fs::choose_backward(p).backward.run(p, {allocate, context});
  });
}

flashspark_status flashspark_attention_backward_workspace_size(const flashspark_attention_backward_params *params,
                                                               size_t *size) {
  return guarded([&] {
    const fs::BackwardParams &p = checked(params);
    result(size) = fs::choose_backward(p).backward.workspace(p);
  });
}

flashspark_status flashspark_attention_backward_validate(const flashspark_attention_backward_params *params) {
  return guarded([&] { checked(params); });
}

flashspark_status flashspark_attention_backward_explain(const flashspark_attention_backward_params *params,
                                                        char *buffer, size_t size) {
  return explained(params, fs::choose_backward, buffer, size);
}

flashspark_status flashspark_score_mod_create(const char *text, flashspark_mod **mod) {
  return create(text, true, mod);
}

flashspark_status flashspark_mask_mod_create(const char *text, flashspark_mod **mod) {
  return create(text, false, mod);
}

int32_t flashspark_mod_tensor_index(const flashspark_mod *mod, const char *name) {
  return index_of(mod->tensors, name);
}

int32_t flashspark_mod_scalar_index(const flashspark_mod *mod, const char *name) {
  return index_of(mod->scalars, name);
}

void flashspark_mod_retain(flashspark_mod *mod) {
  mod->references.fetch_add(1, std::memory_order_relaxed);
}

void flashspark_mod_release(flashspark_mod *mod) {
  if (mod != nullptr && mod->references.fetch_sub(1, std::memory_order_acq_rel) == 1) delete mod;
}

void flashspark_set_nvrtc_search_path(const char *folders) {
  fs::cuda::set_nvrtc_search_path(folders != nullptr ? folders : "");
}

flashspark_status flashspark_append_kv(const flashspark_append_params *params) {
  return guarded([&] {
    const fs::AppendParams &p = checked(params);
    fs::choose_append(p).append(p);
  });
}

flashspark_status flashspark_create_block_mask(const flashspark_block_mask_params *params) {
  return guarded([&] {
    const fs::BlockMaskParams &p = checked(params);
    fs::choose_block_mask(p).block_mask(p);
  });
}

const char *flashspark_last_error(void) {
  return fs::last_error();
}

const char *flashspark_implementation_name(int32_t index) {
  const auto all = fs::implementations();
  return index >= 0 && static_cast<size_t>(index) < all.size() ? all[index].name : nullptr;
}

const char *flashspark_implementation_description(int32_t index) {
  const auto all = fs::implementations();
  return index >= 0 && static_cast<size_t>(index) < all.size() ? all[index].description : nullptr;
}

const char *flashspark_version(void) {
  return FLASHSPARK_VERSION;
}
const char *flashspark_cpu_target(void) {
  return fs::cpu::engine_target();
}
int32_t flashspark_cpu_threads(void) {
  return fs::cpu::default_threads();
}

const char *flashspark_status_name(flashspark_status status) {
  switch (status) {
    case FLASHSPARK_OK:
      return "ok";
    case FLASHSPARK_INVALID_ARGUMENT:
      return "invalid argument";
    case FLASHSPARK_INVALID_TYPE:
      return "invalid type";
    case FLASHSPARK_UNSUPPORTED:
      return "unsupported";
    case FLASHSPARK_VERSION_MISMATCH:
      return "version mismatch";
    case FLASHSPARK_OUT_OF_MEMORY:
      return "out of memory";
    case FLASHSPARK_DEVICE_ERROR:
      return "device error";
    case FLASHSPARK_INTERNAL:
      return "internal error";
  }
  return "unknown status";
}

size_t flashspark_dtype_size(int32_t dtype) {
  return fs::dtype_size(dtype);
}

const char *flashspark_dtype_name(int32_t dtype) {
  return fs::dtype_name(dtype);
}
