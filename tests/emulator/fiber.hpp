// A fiber: a stack of its own, switched by Boost.Context's assembly without a system call. AddressSanitizer is told
// about every switch, so that exceptions and reports work on the right stack.
#pragma once

#include <boost/context/detail/fcontext.hpp>
#include <cstddef>

#ifdef FLASHSPARK_EMULATOR_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace flashspark::emulator {

class Fiber {
 public:
  Fiber() = default;  // represents the stack that the caller is already running on
  explicit Fiber(void (*run)());
  ~Fiber();
  Fiber(const Fiber &) = delete;
  Fiber &operator=(const Fiber &) = delete;

  // Suspends this running fiber and resumes `other`; returns when some fiber switches back. A new fiber starts in
  // run(), which must not return.
  void switch_to(Fiber &other);

 private:
  static void first(boost::context::detail::transfer_t from);
  // Runs on the stack just entered: records the context and bounds of the stack that was left.
  static void arrive(boost::context::detail::transfer_t from, void *fake_stack);

  void (*run_)() = nullptr;
  void *context_ = nullptr;
  void *mapping_ = nullptr;
  // The usable bytes of the stack, from the lowest address.
  const void *bottom_ = nullptr;
  size_t size_ = 0;
  void *fake_stack_ = nullptr;
};

// Inline: a switch makes the CPU's return-address prediction wrong for every enclosing frame, so keep the frames few.
inline void Fiber::switch_to(Fiber &other) {
#ifdef FLASHSPARK_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&fake_stack_, other.bottom_, other.size_);
#endif
  Fiber *pair[2] = {this, &other};
  arrive(boost::context::detail::jump_fcontext(other.context_, pair), fake_stack_);
}

inline void Fiber::arrive(boost::context::detail::transfer_t from, [[maybe_unused]] void *fake_stack) {
  Fiber &left = **static_cast<Fiber **>(from.data);
  left.context_ = from.fctx;
#ifdef FLASHSPARK_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, &left.bottom_, &left.size_);
#endif
}

}  // namespace flashspark::emulator
