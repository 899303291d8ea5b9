// Memory for vectors: aligned to 64 bytes.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace flashspark::cpu {

constexpr std::align_val_t kVectorAlignment{64};

struct DeletesAligned {
  void operator()(float *memory) const { ::operator delete(memory, kVectorAlignment); }
};
using Floats = std::unique_ptr<float, DeletesAligned>;

inline Floats allocate_floats(size_t count) {
  return Floats(static_cast<float *>(::operator new(count * sizeof(float), kVectorAlignment)));
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
