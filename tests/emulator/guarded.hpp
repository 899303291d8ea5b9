// A heap array that ends exactly at its size, so that AddressSanitizer reports the first element beyond it. Elements
// that must not be read can be poisoned. Without the sanitizer it is a plain array.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#define FLASHSPARK_EMULATOR_POISON 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FLASHSPARK_EMULATOR_POISON 1
#endif
#endif
#ifdef FLASHSPARK_EMULATOR_POISON
#include <sanitizer/asan_interface.h>
#endif

namespace flashspark::emulator {

template <class T>
class Guarded {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Guarded() = default;
  // Contents are uninitialised. Aligned to 16 bytes, as cp.async requires.
  explicit Guarded(size_t count) : size_(count) {
    void *memory = nullptr;
    // An empty array still has an address, but no readable byte.
    if (posix_memalign(&memory, 16, count > 0 ? count * sizeof(T) : 1) != 0) throw std::bad_alloc();
    data_ = static_cast<T *>(memory);
    if (count == 0) mark(data_, 1, true);
  }
  Guarded(Guarded &&other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Guarded &operator=(Guarded &&other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Guarded() {
    mark(data_, size_ > 0 ? bytes() : 1, false);
    free(data_);
  }

  T *data() { return data_; }
  const T *data() const { return data_; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  T &operator[](size_t i) { return data_[i]; }
  const T &operator[](size_t i) const { return data_[i]; }
  T *begin() { return data_; }
  T *end() { return data_ + size_; }
  const T *begin() const { return data_; }
  const T *end() const { return data_ + size_; }

  // Marks elements [first, first + count) as unreadable, or readable again. Exact if both ends are multiples of 8
  // bytes. Within an 8-byte granule only a tail can be poisoned: a range that begins inside a granule takes effect from
  // the next one, and one that ends inside a granule leaves that granule readable.
  void poison(size_t first, size_t count) { mark(data_ + first, count * sizeof(T), true); }
  void unpoison(size_t first, size_t count) { mark(data_ + first, count * sizeof(T), false); }

 private:
  static void mark([[maybe_unused]] const void *at, [[maybe_unused]] size_t size, [[maybe_unused]] bool poisoned) {
#ifdef FLASHSPARK_EMULATOR_POISON
    if (at == nullptr || size == 0) return;
    if (poisoned) {
      __asan_poison_memory_region(at, size);
    } else {
      __asan_unpoison_memory_region(at, size);
    }
#endif
  }

  T *data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace flashspark::emulator
