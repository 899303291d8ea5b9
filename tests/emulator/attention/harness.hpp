// Attention problems (src/cases) run by the GPU kernels on the emulator.
#pragma once

#include <functional>
#include <span>
#include <string>

#include "cases/cases.hpp"
#include "cuda/plan.hpp"
#include "emulator.hpp"

namespace flashspark::emulator {

struct Kernel {
  const Instance *instance;
  int32_t dtype;  // of q, k, v and out; float8_e4m3: of k and v alone
  Architecture tiles;
  void (*run)(const ForwardArguments &);
};

// Every kernel that was linked in, ordered by instance, dtype and tiles.
std::span<const Kernel> kernels();
std::string name_of(const Kernel &kernel);

struct Registration {
  explicit Registration(const Kernel &kernel);
};

// NULL for the kernel: the one that the plan chooses.
struct Run {
  cases::Result result;
  std::string kernel;  // name of the one that ran, empty if nothing had to
  Counters counters;
};
bool can_run(const cases::Problem &problem);
bool can_run(const Kernel &kernel, const cases::Problem &problem);
Run run(cases::Problem &problem, const Kernel *kernel, uint64_t seed);

// The kernels alone: no lengths are read here, and `result` stays empty. `spoil`, where given, may change what a
// schedule of the problem's own lengths holds; without it the seed says of which lengths the schedule is.
using SpoilMetadata = std::function<void(std::span<int32_t> lines)>;
Run execute(Params p, const Kernel *kernel, uint64_t seed, const SpoilMetadata &spoil = {});

// Runs and compares with the oracle: empty if all is well. Faults of the emulator come back as text.
std::string check(const cases::Case &spec, const Kernel *kernel, uint64_t seed);

}  // namespace flashspark::emulator
