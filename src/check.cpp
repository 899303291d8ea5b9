#include "check.hpp"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "dtype.hpp"
#include "error.hpp"
#include "problem.hpp"

namespace flashspark::check {
namespace {

// Every byte offset of a tensor must fit in an int64 with room for sums of three terms.
constexpr int64_t kMaxOffset = int64_t{1} << 58;

// `field` is "" or ".data". No text is made, nor memory taken, for a pointer that is aligned: every call of a GPU
// kernel comes here (docs/experiments.md E62).
void aligned(const char *argument, const char *field, const void *pointer, size_t size) {
  if (reinterpret_cast<uintptr_t>(pointer) % size == 0) return;
  char text[32];
  // Not %p, which is without 0x on Windows.
  std::snprintf(text, sizeof text, "0x%" PRIxPTR, reinterpret_cast<uintptr_t>(pointer));
  fail(std::string(argument) + field, text, "must be aligned to " + std::to_string(size) + " bytes");
}

template <class T>
void each_aligned(Arrays<T> arrays) {
  for (const auto &[argument, pointer] : arrays) aligned(argument, "", pointer, sizeof(T));
}

}  // namespace

std::string at(const char *name, int64_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

void version(uint32_t struct_size, size_t expected_size, uint32_t abi_version, const char *type) {
  if (struct_size != expected_size || abi_version != FLASHSPARK_ABI_VERSION) {
    char text[256];
    std::snprintf(text, sizeof text,
                  "%s: struct_size = %" PRIu32 ", abi_version = %" PRIu32
                  ": this library takes size %zu, version %u; call %s_init() and build against its header",
                  type, struct_size, abi_version, expected_size, FLASHSPARK_ABI_VERSION, type);
    throw Error(FLASHSPARK_VERSION_MISMATCH, text);
  }
}

void device(int32_t device, int32_t index) {
  if (device != FLASHSPARK_CPU && device != FLASHSPARK_CUDA)
    fail("device", int64_t{device}, "must be 0 (CPU) or 1 (CUDA)");
  if (index < 0) fail("device_index", int64_t{index}, "must not be negative");
  if (device == FLASHSPARK_CPU && index != 0) fail("device_index", int64_t{index}, "must be 0 for the CPU");
}

void in_range(const char *argument, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return;
  fail(argument, value, "must be from " + std::to_string(low) + " to " + std::to_string(high));
}

void heads(int64_t num_heads_q, int64_t num_heads_kv) {
  in_range("num_heads_q", num_heads_q, 1, 1 << 16);
  in_range("num_heads_kv", num_heads_kv, 1, 1 << 16);
  if (num_heads_q % num_heads_kv != 0) {
    fail("num_heads_q", num_heads_q, "must be a multiple of num_heads_kv = " + std::to_string(num_heads_kv));
  }
}

void width(const char *argument, int64_t value) {
  if (value < 8 || value > kMaxHeadDim || value % 8 != 0)
    fail(argument, value, "must be a multiple of 8 from 8 to " + std::to_string(kMaxHeadDim));
}

void dtype(const char *argument, int32_t value, bool allow_fp8) {
  const bool known = value == FLASHSPARK_FLOAT32 || value == FLASHSPARK_FLOAT16 || value == FLASHSPARK_BFLOAT16;
  if (known || (allow_fp8 && value == FLASHSPARK_FLOAT8_E4M3)) return;
  fail(argument, std::to_string(value) + " (" + dtype_name(value) + ")",
       std::string("must be float32, float16") + (allow_fp8 ? ", bfloat16 or float8_e4m3" : " or bfloat16"),
       FLASHSPARK_INVALID_TYPE);
}

void same_dtype(const char *argument, int32_t dtype, const char *other, int32_t wanted) {
  if (dtype == wanted) return;
  fail(argument, dtype_name(dtype), std::string("must be ") + other + "'s: " + dtype_name(wanted),
       FLASHSPARK_INVALID_TYPE);
}

void absent(const char *argument, const void *pointer, const char *rule) {
  if (pointer != nullptr) fail(argument, "given", rule);
}

void present(const char *argument, const void *pointer, const char *rule) {
  if (pointer == nullptr) fail(argument, "NULL", rule);
}

void aligned_arrays(Arrays<int32_t> arrays) {
  each_aligned(arrays);
}

void aligned_arrays(Arrays<int64_t> arrays) {
  each_aligned(arrays);
}

void aligned_arrays(Arrays<uint64_t> arrays) {
  each_aligned(arrays);
}

void tensor(const char *argument, const flashspark_tensor &t, int64_t batch, int64_t tokens, int64_t heads) {
  if (batch == 0 || tokens == 0 || heads == 0) return;
  if (t.data == nullptr) fail(std::string(argument) + ".data", "NULL", "must point to the tensor");
  aligned(argument, ".data", t.data, dtype_size(t.dtype));
  const std::pair<const char *, std::pair<int64_t, int64_t>> dims[] = {{".batch_stride", {t.batch_stride, batch}},
                                                                       {".token_stride", {t.token_stride, tokens}},
                                                                       {".head_stride", {t.head_stride, heads}}};
  for (const auto &[field, dim] : dims) {
    const auto [stride, extent] = dim;
    if (extent == 1) continue;  // never multiplied by anything but 0
    if (stride < -kMaxOffset || stride > kMaxOffset || std::abs(stride) > kMaxOffset / (extent - 1)) {
      fail(std::string(argument) + field, stride, "reaches beyond 2^58 elements for extent " + std::to_string(extent));
    }
  }
}

void distinct(const char *argument, const flashspark_tensor &t, int64_t batch, int64_t tokens, int64_t heads,
              int64_t width) {
  if (batch == 0 || tokens == 0 || heads == 0) return;
  struct Dim {
    const char *field;
    int64_t stride, extent;
  };
  // The stride of a single row is never used and may be any number.
  const auto step = [](int64_t stride, int64_t extent) { return extent == 1 ? 0 : std::abs(stride); };
  Dim dims[] = {{".batch_stride", step(t.batch_stride, batch), batch},
                {".token_stride", step(t.token_stride, tokens), tokens},
                {".head_stride", step(t.head_stride, heads), heads}};
  std::sort(std::begin(dims), std::end(dims), [](const Dim &a, const Dim &b) { return a.stride < b.stride; });
  int64_t inner = width;  // elements that the dimensions so far span
  for (const Dim &dim : dims) {
    if (dim.extent == 1) continue;
    if (dim.stride < inner) {
      fail(std::string(argument) + dim.field, dim.stride, "rows overlap: must be at least " + std::to_string(inner));
    }
    inner += (dim.extent - 1) * dim.stride;
  }
}

void scale(const char *argument, const flashspark_scale &s) {
  if (s.data == nullptr) return;
  aligned(argument, ".data", s.data, sizeof(float));
  constexpr int64_t kLimit = int64_t{1} << 40;
  if (s.batch_stride < -kLimit || s.batch_stride > kLimit)
    fail(std::string(argument) + ".batch_stride", s.batch_stride, "is too large");
  if (s.head_stride < -kLimit || s.head_stride > kLimit)
    fail(std::string(argument) + ".head_stride", s.head_stride, "is too large");
}

void paging(int64_t num_pages, int64_t page_size, int64_t num_page_slots, int64_t page_table_stride, int64_t num_rows) {
  in_range("num_pages", num_pages, 0, INT32_MAX);
  in_range("page_size", page_size, 1, 1 << 20);
  in_range("num_page_slots", num_page_slots, 0, INT32_MAX);
  if (num_rows > 1 && (page_table_stride < num_page_slots || page_table_stride > kMaxOffset / num_rows)) {
    fail("page_table_stride", page_table_stride, "must be at least num_page_slots = " + std::to_string(num_page_slots));
  }
}

}  // namespace flashspark::check
