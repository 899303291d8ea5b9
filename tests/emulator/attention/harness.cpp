#include "attention/harness.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "attention/block_tiles.cuh"
#include "cuda/arguments.hpp"
#include "cuda/quantize.hpp"
#include "forward/combine.cuh"
#include "forward/quantize.cuh"
#include "forward/scheduler/metadata.cuh"
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

// Fills the metadata of sequences without query rows with stale values, as a padded CUDA graph batch has them.
void make_padding_stale(cases::Problem &problem) {
  const Params &p = problem.params;
  const auto set = [](const int32_t *numbers, int64_t n, int32_t value) {
    if (numbers != nullptr) const_cast<int32_t *>(numbers)[n] = value;
  };
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    if (problem.seqlen_q(b) > 0) continue;
    set(p.seqused_k, b, 1 << 28);
    set(p.leftpad_k, b, 1 << 20);
    const int64_t row = p.kv_batch_index != nullptr ? p.kv_batch_index[b] : b;
    for (int64_t n = 0; p.page_table != nullptr && n < p.num_page_slots; ++n)
      set(p.page_table, row * p.page_table_stride + n, -7);
    set(p.kv_batch_index, b, 1 << 20);
  }
}

// Sets K and V to NaN for all keys that the mask hides from every row: a page that has left the window may hold
// anything.
void spoil_unkept_keys(cases::Problem &problem) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (int64_t b = 0; b < problem.params.num_seqs; ++b) {
    for (int64_t j = 0; j < problem.seqlen_k(b); ++j) {
      bool kept = false;
      for (int64_t i = problem.seqlen_q(b); i > 0 && !kept; --i) kept = problem.keeps(b, i - 1, j);
      if (kept) continue;
      for (int64_t h = 0; h < problem.params.num_heads_kv; ++h) {
        for (int64_t d = 0; d < problem.params.head_dim; ++d) problem.set(cases::Role::kK, b, j, h, d, nan);
        for (int64_t d = 0; d < problem.params.head_dim_v; ++d) problem.set(cases::Role::kV, b, j, h, d, nan);
      }
    }
  }
}

// The scheduler metadata a forward kernel is given: none, or metadata made for this problem, for other lengths, or for
// other arguments.
enum class MetadataOf : uint64_t { nothing, these_lengths, other_lengths, other_problem };

Counters run_forward(const cuda::Plan &plan, const Kernel &kernel, uint64_t seed) {
  if (kernel.functions == nullptr)
    return launch_one(plan.forward, seed, [&plan, &kernel] { kernel.run(plan.arguments); });
  const auto arguments = std::make_unique<FunctionForwardArguments>(
      FunctionForwardArguments{plan.arguments, plan.functions->arguments, plan.functions->dropout_arguments});
  return launch_one(plan.forward, seed, [&arguments, &kernel] { kernel.run_functions(*arguments); });
}

// cases::magnitudes() of a problem that `prepare` completes.
std::vector<float> magnitudes_of(const cases::Problem &problem, const Prepare &prepare) {
  if (!prepare) return cases::magnitudes(problem);
  cases::Problem positive(problem.spec());
  prepare(positive);
  const cases::Case &spec = positive.spec();
  for (int64_t b = 0; b < positive.params.num_seqs; ++b) {
    for (int64_t j = 0; j < positive.seqlen_k(b); ++j) {
      for (int64_t h = 0; h < spec.heads_kv; ++h) {
        for (int64_t d = 0; d < spec.head_dim_v; ++d)
          positive.set(cases::Role::kV, b, j, h, d, std::fabs(positive.get(cases::Role::kV, b, j, h, d)));
      }
    }
  }
  return cases::reference(positive).out;
}

// Runs the metadata kernel. Empty if the plan does not use scheduler metadata.
Guarded<int32_t> make_scheduler_metadata(const Params &p, const cuda::Machine &machine, const Instance *instance,
                                         MetadataOf of, uint64_t seed, Counters &counters) {
  auto plan = std::make_unique<cuda::Plan>(cuda::make_plan(p, machine, instance));
  if (of == MetadataOf::nothing || plan->schedule_size() == 0) return {};
  Guarded<int32_t> metadata(static_cast<size_t>(plan->schedule_size()));
  std::fill(metadata.begin(), metadata.end(), -1);
  plan->arguments.scheduler_metadata = metadata.data();
  if (of == MetadataOf::other_problem) {
    StreamKLimits &limits = plan->arguments.stream_k;
    limits.min_tiles_shift += 1, limits.small_problem_tiles = 0, limits.tile_start_cost += 3;
    plan->arguments.metadata_fingerprint += 1;
  }
  // "Other lengths" halves the keys of every sequence.
  std::vector<int32_t> used(p.seqused_k, p.seqused_k + (p.seqused_k != nullptr ? p.num_seqs : 0));
  for (int32_t &keys : used) keys /= 2;
  if (of == MetadataOf::other_lengths && p.seqused_k != nullptr) plan->arguments.seqused_k = used.data();
  const auto arguments = std::make_unique<ScheduleArguments>(plan->schedule_arguments());
  add(counters, launch_one(plan->schedule(), seed, [&arguments] { write_scheduler_metadata(*arguments); }));
  if (of == MetadataOf::other_lengths && p.seqused_k == nullptr) {
    for (size_t n = kLengthsChecksum; n < metadata.size(); n += kRecordWords) metadata[n] += 1;
  }
  return metadata;
}

}  // namespace

Registration::Registration(const Kernel &kernel) {
  registered().push_back(kernel);
}

std::string name_of(const Kernel &kernel) {
  const char *dtype = kernel.dtype == FLASHSPARK_BFLOAT16  ? "_bf16_"
                      : kernel.dtype == FLASHSPARK_FLOAT16 ? "_fp16_"
                                                           : "_e4m3_";
  std::string name = kernel.instance->name + std::string(dtype) + tiles_name(kernel.tiles);
  if (kernel.functions != nullptr) name += std::string("_") + kernel.functions;
  return name +
         (kernel.block_tiles    ? "_block_tiles"
          : kernel.block_sparse ? "_lists"
                                : "") +
         (kernel.dropout ? "_dropout" : "") + (kernel.contiguous ? "_contiguous" : "");
}

std::span<const Kernel> kernels() {
  std::sort(registered().begin(), registered().end(), [](const Kernel &a, const Kernel &b) {
    return std::make_tuple(a.instance, a.dtype, a.tiles, name_of(a)) <
           std::make_tuple(b.instance, b.dtype, b.tiles, name_of(b));
  });
  return registered();
}

bool kernels_take(const cases::Problem &problem) {
  const Params &p = problem.params;
  const auto is_16_bit = [](int32_t dtype) { return dtype == FLASHSPARK_BFLOAT16 || dtype == FLASHSPARK_FLOAT16; };
  const bool q = is_16_bit(p.q.dtype) || (p.q.dtype == FLASHSPARK_FLOAT8_E4M3 && p.k.dtype == FLASHSPARK_FLOAT8_E4M3);
  return q && p.out.dtype != FLASHSPARK_FLOAT32 && cuda::unsupported(p).empty();
}
bool can_run(const cases::Problem &problem) {
  return kernels_take(problem) && problem.params.dropout_p == 0;
}
bool can_run(const Kernel &kernel, const cases::Problem &problem) {
  return kernels_take(problem) && kernel.dropout == (problem.params.dropout_p > 0) &&
         !(kernel.contiguous && is_paged(problem.params)) && kernel.dtype == problem.params.k.dtype &&
         cuda::fits(*kernel.instance, problem.params);
}

Run run(cases::Problem &problem, const Kernel *kernel, uint64_t seed) {
  problem.poison();
  Run result = execute(problem.params, kernel, seed);
  result.result = problem.result();
  return result;
}

// Mirrors the host path for e4m3 output (src/cuda/forward.cpp).
Run execute_quantized(const Params &p, const Kernel *kernel, uint64_t seed, const SpoilMetadata &spoil) {
  Guarded<char> memory(cuda::wide_out_bytes(p));
  const Params wide = cuda::with_wide_out(p, memory.data());
  Run result = execute(wide, kernel, seed, spoil);
  const auto plan = std::make_unique<cuda::QuantizePlan>(cuda::make_quantize_plan(p, wide));
  if (plan->launch.grid[0] > 0)
    add(result.counters, launch_one(plan->launch, seed + 3, [&plan] { quantize(plan->arguments); }));
  return result;
}

Run execute(Params p, const Kernel *kernel, uint64_t seed, const SpoilMetadata &spoil) {
  if (cuda::is_quantized(p)) return execute_quantized(p, kernel, seed, spoil);
  // A small GPU, so that small problems already need several waves, splits and L2 sections. Its size depends on the
  // seed.
  const cuda::Machine machine{
      kernel != nullptr ? kernel->tiles : (seed % 2 != 0 ? Architecture::sm_120f : Architecture::sm_90),
      static_cast<int32_t>(1 + seed % 7), static_cast<int64_t>(1024) << seed % 12, 100 * 1024};
  const Instance *instance = kernel != nullptr ? kernel->instance : nullptr;
  Guarded<char> workspace(cuda::make_plan(p, machine, instance).workspace);
  std::fill(workspace.begin(), workspace.end(), '\xff');  // NaN, as numbers
  Run result;
  const MetadataOf of = spoil ? MetadataOf::these_lengths : static_cast<MetadataOf>(seed / 2 % 4);
  Guarded<int32_t> metadata = make_scheduler_metadata(p, machine, instance, of, seed + 2, result.counters);
  if (spoil) spoil({metadata.data(), metadata.size()});
  p.scheduler_metadata = metadata.data();
  p.scheduler_metadata_size = static_cast<int64_t>(metadata.size());
  // On the heap: all threads share one copy, like the constant bank of a GPU.
  const auto plan = std::make_unique<cuda::Plan>(cuda::make_plan(p, machine, instance));
  plan->bind(workspace.data());
  if (plan->forward.grid[0] > 0) {
    const Kernel &chosen = kernel != nullptr ? *kernel : find(*plan->instance, p.k.dtype, machine.arch);
    if (kernel == nullptr && chosen.tiles != machine.arch)
      return execute(p, &chosen, seed,
                     spoil);  // the tile is the same on both architectures, or this one is not linked in
    result.kernel = name_of(chosen);
    if (const cuda::BlockTilePlan *tiles = plan->block_tiles())
      add(result.counters,
          launch_one(plan->block_tiles_launch(), seed + 4, [tiles] { derive_block_tiles(tiles->arguments); }));
    add(result.counters, run_forward(*plan, chosen, seed));
    if (plan->combine.grid[0] > 0) {
      const bool bf16 = plan->out_dtype == cuda::KernelDType::bf16;
      const auto arguments = std::make_unique<CombineArguments>(plan->combine_arguments());
      add(result.counters, launch_one(plan->combine, seed + 1, [&arguments, bf16] {
            bf16 ? combine<ptx::Bfloat16>(*arguments) : combine<ptx::Float16>(*arguments);
          }));
    }
  }
  return result;
}

std::string check(const cases::Case &spec, const Kernel *kernel, uint64_t seed, const Prepare &prepare) {
  cases::Problem problem(spec);
  if (prepare) prepare(problem);
  // The kernels copy q, k and v in 16-byte chunks; out need not be aligned.
  if (seed % 4 == 3) problem.params.out.data = static_cast<uint16_t *>(problem.params.out.data) + 1;
  validate(problem.params);
  const cases::Result expected = cases::reference(problem);
  const std::vector<float> magnitudes = magnitudes_of(problem, prepare);
  spoil_unkept_keys(problem);
  make_padding_stale(problem);
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
