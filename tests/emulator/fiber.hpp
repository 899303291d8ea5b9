// A stack of its own and the place where it stopped, on Boost.Context's bare switch (no system call). AddressSanitizer
// is told of each switch, so that exceptions and reports know the stack.
#pragma once

#include <boost/context/detail/fcontext.hpp>
#include <cstddef>

#ifdef FLASHSPARK_EMULATOR_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace flashspark::emulator {

class Fiber {
 public:
  Fiber() = default;  // stands for the stack that the caller already runs on
  explicit Fiber(void (*run)());
  ~Fiber();
  Fiber(const Fiber &) = delete;
  Fiber &operator=(const Fiber &) = delete;

  // Leaves this running fiber for `other`; returns when something switches back. A new fiber begins with run(), which
  // must not return.
  void switch_to(Fiber &other);

 private:
  static void first(boost::context::detail::transfer_t from);
  // On the stack just entered: what the switch brought, and the stack that was left.
  static void arrive(boost::context::detail::transfer_t from, void *fake_stack);

  void (*run_)() = nullptr;
  void *context_ = nullptr;
  void *mapping_ = nullptr;
  // The stack's usable bytes, from the lowest.
  const void *bottom_ = nullptr;
  size_t size_ = 0;
  void *fake_stack_ = nullptr;
};

// Inline, since a return address predicted before a switch is wrong after it: each frame around it costs 5 ns.
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
