#include "fiber.hpp"

#include <sys/mman.h>

#include <new>

#ifdef FLASHSPARK_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace flashspark::emulator {

namespace {
constexpr size_t kPage = 4096;
constexpr size_t kStack = 256 * 1024;
}  // namespace

void Fiber::first(boost::context::detail::transfer_t from) {
  Fiber &self = *static_cast<Fiber **>(from.data)[1];
  arrive(from, nullptr);
  self.run_();
}

Fiber::Fiber(void (*run)()) : run_(run) {
  // The lowest page stays inaccessible as a guard against stack overflow.
  mapping_ = mmap(nullptr, kPage + kStack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  char *bottom = static_cast<char *>(mapping_) + kPage;
  if (mprotect(bottom, kStack, PROT_READ | PROT_WRITE) != 0) {
    munmap(mapping_, kPage + kStack);
    throw std::bad_alloc();
  }
  bottom_ = bottom;
  size_ = kStack;
  context_ = boost::context::detail::make_fcontext(bottom + kStack, kStack, first);
}

Fiber::~Fiber() {
  if (mapping_ == nullptr) return;
#ifdef FLASHSPARK_EMULATOR_ASAN
  // A fiber abandoned inside a kernel leaves its frames' red zones behind, and a later mapping may reuse this memory.
  __asan_unpoison_memory_region(bottom_, size_);
#endif
  munmap(mapping_, kPage + kStack);
}

}  // namespace flashspark::emulator
