#include "attention/harness.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "forward/merge.cuh"
#include "guarded.hpp"
#include "validate.hpp"

namespace flashspark::emulator {
namespace {

std::vector<Kernel> &registered() {
  static std::vector<Kernel> list;
  return list;
}

const char *tiles_name(Architecture arch) {
  return arch == Architecture::sm_120f ? "sm_120f" : "sm_90";
}

const Kernel &find(const Instance &instance, int32_t dtype, Architecture tiles) {
  const Kernel *any = nullptr;
  for (const Kernel &kernel : registered()) {
    if (kernel.instance != &instance || kernel.dtype != dtype) continue;
    if (kernel.tiles == tiles) return kernel;
    any = &kernel;
  }
  if (any == nullptr) throw std::logic_error(std::string("not linked in: ") + instance.name);
  return *any;
}

Counters launch_one(const cuda::Launch &launch_as, uint64_t seed, const std::function<void()> &kernel) {
  LaunchOptions options;
  std::copy_n(launch_as.grid, 3, options.grid);
  options.threads = launch_as.threads;
  options.shared_bytes = launch_as.shared_bytes;
  options.seed = seed;
  return launch(options, kernel);
}

void add(Counters &sum, const Counters &more) {
  sum.mma += more.mma;
  sum.ldmatrix += more.ldmatrix;
  sum.bank_conflicts += more.bank_conflicts;
  sum.shuffles += more.shuffles;
  sum.barriers += more.barriers;
  sum.cp_async += more.cp_async;
  sum.cp_async_zero += more.cp_async_zero;
}

}  // namespace

Registration::Registration(const Kernel &kernel) {
  registered().push_back(kernel);
}

std::string name_of(const Kernel &kernel) {
  return std::string(kernel.instance->name) + (kernel.dtype == FLASHSPARK_BFLOAT16 ? "_bf16_" : "_fp16_") +
         tiles_name(kernel.tiles);
}

std::span<const Kernel> kernels() {
  std::sort(registered().begin(), registered().end(), [](const Kernel &a, const Kernel &b) {
    return std::make_tuple(a.instance, a.dtype, a.tiles) < std::make_tuple(b.instance, b.dtype, b.tiles);
  });
  return registered();
}

bool can_run(const cases::Problem &problem) {
  const Params &p = problem.params;
  const bool dtype = p.q.dtype == FLASHSPARK_BFLOAT16 || p.q.dtype == FLASHSPARK_FLOAT16;
  return dtype && p.k.dtype == p.q.dtype && p.v.dtype == p.q.dtype && p.out.dtype == p.q.dtype &&
         cuda::unsupported(p).empty();
}
bool can_run(const Kernel &kernel, const cases::Problem &problem) {
  return can_run(problem) && kernel.dtype == problem.params.q.dtype && cuda::fits(*kernel.instance, problem.params);
}

Run run(cases::Problem &problem, const Kernel *kernel, uint64_t seed) {
  const Params &p = problem.params;
  problem.poison();
  // A small GPU, so that small problems make several waves, splits and sections; which one depends on the seed.
  const cuda::Machine machine{
      kernel != nullptr ? kernel->tiles : (seed % 2 != 0 ? Architecture::sm_120f : Architecture::sm_90),
      static_cast<int32_t>(1 + seed % 7), static_cast<int64_t>(1024) << seed % 12, 100 * 1024};
  const Instance *instance = kernel != nullptr ? kernel->instance : nullptr;
  const size_t bytes = cuda::make_plan(p, machine, nullptr, instance).workspace;
  Guarded<float> workspace(bytes / sizeof(float));
  std::fill(workspace.begin(), workspace.end(), std::numeric_limits<float>::quiet_NaN());
  // On the heap: one copy for all threads, as the constant bank of a GPU.
  const auto plan = std::make_unique<cuda::Plan>(cuda::make_plan(p, machine, workspace.data(), instance));
  Run result;
  if (plan->forward.grid[0] > 0) {
    const Kernel &chosen = kernel != nullptr ? *kernel : find(*plan->instance, p.q.dtype, machine.arch);
    if (kernel == nullptr && chosen.tiles != machine.arch)
      return run(problem, &chosen, seed);  // the same instance has the same tile on both, or is not linked in twice
    result.kernel = name_of(chosen);
    add(result.counters, launch_one(plan->forward, seed, [&plan, &chosen] { chosen.run(plan->arguments); }));
    if (plan->merge.grid[0] > 0) {
      const bool bf16 = p.q.dtype == FLASHSPARK_BFLOAT16;
      add(result.counters, launch_one(plan->merge, seed + 1, [&plan, bf16] {
            bf16 ? merge<ptx::Bfloat16>(plan->merge_arguments) : merge<ptx::Float16>(plan->merge_arguments);
          }));
    }
  }
  result.result = problem.result();
  return result;
}

std::string check(const cases::Case &spec, const Kernel *kernel, uint64_t seed) {
  cases::Problem problem(spec);
  validate(problem.params);
  const cases::Result expected = cases::reference(problem);
  const std::vector<float> magnitudes = cases::magnitudes(problem);
  std::string who = kernel != nullptr ? name_of(*kernel) : "";
  const auto text = [&](const std::string &what) { return spec.name + ", " + who + ": " + what; };
  try {
    const Run got = run(problem, kernel, seed);
    who = got.kernel;
    const cases::Comparison c = cases::compare(problem, got.result, expected, &magnitudes);
    if (!c.passed()) {
      return text("max error " + std::to_string(c.max_error) + ", " + std::to_string(c.ratio) + " of the bound" +
                  (c.untouched ? "" : ", wrote outside the rows in use") +
                  (c.nonfinite_match ? "" : ", NaN or infinity where the oracle has none"));
    }
    if (got.counters.bank_conflicts > 0) return text(std::to_string(got.counters.bank_conflicts) + " bank conflicts");
  } catch (const Fault &fault) {
    return text(fault.what());
  }
  return {};
}

}  // namespace flashspark::emulator
