// The interface between ptx/ptx.cuh and the emulator: each instruction, with the kernel source line that issues it. Not
// for use by kernels or tests.
#pragma once

#include <cstdint>

namespace flashspark::emulator {

// A location in the kernel's source.
struct Site {
  int line = 0;
  const char *file = "";
};

// The thread and CTA of the running fiber.
struct Position {
  uint32_t thread;
  uint32_t cta[3];
};
extern Position position;

// Shared memory starts above zero, as on the device, so that address 0 is always an error.
inline constexpr uint32_t kSharedBase = 0x400;

// The operations at which lanes of a warp meet.
enum class Operation : uint8_t {
  none,
  cta_barrier,
  pair_arrive,
  pair_wait,
  mbarrier_arrive,
  mbarrier_wait,
  warp_barrier,
  ldmatrix,
  ldmatrix_trans,
  mma_bfloat16,
  mma_float16,
  shuffle_xor,
  shuffle,
  shuffle_up,
  ballot,
  any,
  reduce_min,
  reduce_max,
  reduce_add,
  uniform,
};

void barrier(Operation operation, Site site);
// pair: of warps 2 pair and 2 pair + 1.
void pair(Operation operation, int32_t pair, int32_t number, Site site);
// An mbarrier at a shared address: one thread begins it, for so many arrivals a phase; a warp arrives, or waits for the
// end of the phase of a parity (0: the first one).
void mbarrier_init(uint32_t address, uint32_t count, Site site);
void mbarrier_invalidate(uint32_t address, Site site);
void mbarrier(Operation operation, uint32_t address, uint32_t parity, Site site);

void copy_async(uint32_t to, const void *from, bool valid, Site site);
void copy_commit(Site site);
void copy_wait(uint32_t pending, Site site);

void load_matrices(Operation operation, uint32_t (&part)[4], uint32_t row, Site site);
void multiply(Operation operation, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);
uint32_t exchange(Operation operation, uint32_t value, uint32_t argument, Site site);

// bytes: 4, 8 or 16.
void load_shared(void *to, uint32_t from, uint32_t bytes, Site site);
void store_shared(uint32_t to, const void *from, uint32_t bytes, Site site);

[[noreturn]] void fail(const char *text, Site site);

}  // namespace flashspark::emulator
