// Memory for vectors: aligned to 64 bytes.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace flashspark::cpu {

struct FreeDeleter {
  void operator()(void *pointer) const { std::free(pointer); }
};
using Floats = std::unique_ptr<float, FreeDeleter>;

inline Floats allocate_floats(size_t count) {
  Floats memory(static_cast<float *>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// Scratch memory of the calling thread, kept between calls.
inline float *thread_scratch(size_t floats) {
  thread_local Floats memory;
  thread_local size_t size = 0;
  if (size < floats) {
    memory.reset();
    size = 0;
    memory = allocate_floats(floats);
    size = floats;
  }
  return memory.get();
}

}  // namespace flashspark::cpu
