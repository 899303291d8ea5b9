// flashspark bench decode: decode and verification over paged caches, and whether the time grows in proportion to the
// work.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <numeric>
#include <optional>
#include <span>
#include <tuple>

#include "cases/random.hpp"
#include "cli/bench.hpp"
#include "cli/plot.hpp"
#include "dispatch.hpp"
#include "error.hpp"

namespace flashspark::cli {
namespace {

constexpr int64_t kCpuCaches = 64 << 20;  // limit of the CPU caches' total size
// duration of the calls between two events, long enough to hide the events' own cost
constexpr double kRunSeconds = 3e-4;
constexpr double kMostCalls = 32;    // limit of the calls between two events
constexpr double kMostGrowth = 2.1;  // largest growth of time for twice the work; beyond it the tool reports a cliff

// Normal random keys and values, reused for one cell after the other.
class Cache {
 public:
  std::byte *get(size_t bytes, int32_t dtype, bool gpu) {
    if (memory_ && bytes <= bytes_ && dtype == dtype_) return memory_->data();
    constexpr int64_t kNumbers = 1 << 18;
    const cases::Buffer numbers(kNumbers * flashspark_dtype_size(dtype));
    cases::Random random(1);
    for (int64_t n = 0; n < kNumbers; ++n) cases::store(dtype, numbers.data(), n, static_cast<float>(random.normal()));
    memory_.reset();
    memory_.emplace(gpu, bytes, std::span(numbers.data(), numbers.size()));
    bytes_ = bytes, dtype_ = dtype;
    return memory_->data();
  }

 private:
  std::optional<Memory> memory_;
  size_t bytes_ = 0;
  int32_t dtype_ = 0;
};

int64_t page_count(const cases::Case &c, const cases::SeqLen &len) {
  return (len.k + c.page_size - 1) / c.page_size;
}
size_t page_bytes(const cases::Case &c) {  // of K or of V
  return c.page_size * c.heads_kv * c.head_dim * flashspark_dtype_size(c.kv_dtype);
}

Work work(const cases::Case &c) {
  int64_t pairs = 0, keys = 0, rows = 0;
  for (const auto &[q, k] : c.lens) pairs += q * k - q * (q - 1) / 2, keys += k, rows += q;
  const size_t cache = keys * c.heads_kv * flashspark_dtype_size(c.kv_dtype);
  const size_t queries = rows * c.heads_q * flashspark_dtype_size(c.q_dtype);  // out has as many
  return {4.0 * pairs * c.heads_q * c.head_dim, 2.0 * c.head_dim * (cache + queries)};
}

// The lengths of all sequences, then `sets` page tables of `slots` columns over `pages` pages, in random order.
std::vector<int32_t> lengths_and_page_tables(const cases::Case &spec, int64_t sets, int64_t pages, int64_t slots) {
  std::vector<int32_t> order(pages), numbers;
  std::iota(order.begin(), order.end(), 0);
  cases::Random(spec.seed, 'c').shuffle(order);
  for (const cases::SeqLen &len : spec.lens) numbers.push_back(static_cast<int32_t>(len.k));
  for (int64_t set = 0, next = 0; set < sets; ++set) {
    for (const cases::SeqLen &len : spec.lens) {
      const int64_t n = page_count(spec, len);
      numbers.insert(numbers.end(), order.begin() + next, order.begin() + next + n);
      numbers.resize(numbers.size() + slots - n, -1);
      next += n;
    }
  }
  return numbers;
}

// `sets` page tables over as many caches, used in turn.
void measure(Timing &t, int64_t sets, const Target &target, Cache &cache, const BenchOptions &options) {
  const cases::Case &spec = *t.spec;
  const auto num_seqs = static_cast<int64_t>(spec.lens.size());
  int64_t slots = 0, pages = 0;
  for (const cases::SeqLen &len : spec.lens)
    slots = std::max(slots, page_count(spec, len)), pages += page_count(spec, len);
  pages *= sets;
  const bool gpu = target.gpu != nullptr;
  std::byte *keys = cache.get(2 * pages * page_bytes(spec), spec.kv_dtype, gpu);

  // q, out and everything but the cache.
  cases::Case small = spec;
  for (cases::SeqLen &len : small.lens) len.k = len.q;
  cases::Problem problem(small);
  std::optional<GpuProblem<cases::Problem>> copy;
  if (gpu) copy.emplace(problem, 0);
  flashspark_attention_params p = gpu ? copy->params() : problem.params;

  const std::vector<int32_t> numbers = lengths_and_page_tables(spec, sets, pages, slots);
  const Memory lengths_and_tables(gpu, numbers.size() * sizeof(int32_t), std::as_bytes(std::span(numbers)));
  p.seqused_k = reinterpret_cast<const int32_t *>(lengths_and_tables.data());
  p.page_table = p.seqused_k + num_seqs;
  p.max_seqlen_k = spec.lens[0].k;
  p.num_pages = pages;
  p.num_page_slots = p.page_table_stride = slots;
  p.k.data = keys;
  p.v.data = keys + pages * page_bytes(spec);
  p.num_threads = options.threads;
  if (!options.implementation.empty()) p.implementation = options.implementation.c_str();
  flashspark_status status = flashspark_attention_workspace_size(&p, &p.workspace_size);
  if (status != FLASHSPARK_OK) return t.refuse(status, options);
  const Memory workspace(gpu, p.workspace_size);
  p.workspace = workspace.data();
  t.implementation = choose(p).name;
  // Made once, as an engine does once per step for all layers.
  status = flashspark_attention_schedule_size(&p, &p.scheduler_metadata_size);
  const Memory schedule(gpu, p.scheduler_metadata_size * sizeof(int32_t));
  p.scheduler_metadata = reinterpret_cast<int32_t *>(schedule.data());
  if (status == FLASHSPARK_OK) status = flashspark_attention_schedule(&p);
  if (status != FLASHSPARK_OK) return t.refuse(status, options);

  const int32_t *tables = p.page_table;
  int64_t next = 0;
  const auto seconds = [&](size_t) {
    const auto calls = [&] {
      for (size_t n = 0; n < t.calls && status == FLASHSPARK_OK; ++n) {
        p.page_table = tables + next++ % sets * num_seqs * slots;
        status = flashspark_attention_forward(&p);
      }
    };
    if (gpu) return target.gpu->time(calls) / static_cast<double>(t.calls);
    const auto start = std::chrono::steady_clock::now();
    calls();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  for (size_t n = 0; n < 3; ++n) seconds(n);  // load kernels, start threads
  if (gpu) t.calls = static_cast<size_t>(std::clamp(kRunSeconds / seconds(3), 1.0, kMostCalls));
  if (status == FLASHSPARK_OK) t.take(options.seconds / t.calls, seconds);
  if (status != FLASHSPARK_OK) t.refuse(status, options);
}

Timing measure(const cases::Case &spec, const Target &target, Cache &cache, const BenchOptions &options) {
  Timing t;
  t.spec = &spec;
  t.work = work(spec);
  t.roof = roofline(t.work, target.limits);
  const int64_t l2 = target.gpu ? target.gpu->facts().machine.l2_bytes : kCpuCaches;
  // By the time a cache is used again, more than twice L2 has been read. If memory is short, a single cache larger than
  // that.
  const auto needed = static_cast<int64_t>(t.work.bytes);
  for (int64_t sets = 2 + 2 * l2 / needed; sets > 0; sets = sets > 1 && needed > 2 * l2 ? 1 : 0) {
    try {
      measure(t, sets, target, cache, options);
      return t;
    } catch (const Error &e) {
      if (e.status() != FLASHSPARK_OUT_OF_MEMORY) throw;
    }
  }
  t.error = fmt::format("{:.1f} GB of keys and values: not so much memory is free", t.work.bytes / 1e9);
  t.left_out = "does not fit";
  return t;
}

// The largest growth of time per doubling of (query row, key) pairs between neighbouring cells of batch, context or
// rows.
struct Growth {
  double factor = 0;
  const Timing *from = nullptr, *to = nullptr;
};
Growth largest_growth(const std::vector<Timing> &timings) {
  using Key = std::array<int64_t, 9>;
  const auto pairs = [](const Timing &t) {
    double sum = 0;
    for (const auto &[q, k] : t.spec->lens) sum += q * k;
    return sum;
  };
  Growth most;
  for (size_t axis = 6; axis < 9; ++axis) {
    std::vector<std::pair<Key, const Timing *>> order;
    for (const Timing &t : timings) {
      if (!t.error.empty()) continue;
      const cases::Case &c = *t.spec;
      const auto &first = c.lens.front(), &last = c.lens.back();
      Key key{c.heads_q,         c.heads_kv,         c.head_dim, c.page_size, c.kv_dtype,
              first.k == last.k, std::ssize(c.lens), first.k,    first.q};
      std::swap(key[axis], key.back());
      order.emplace_back(key, &t);
    }
    std::sort(order.begin(), order.end());
    for (size_t n = 1; n < order.size(); ++n) {
      const auto &[key, from] = order[n - 1];
      const auto &[next_key, to] = order[n];
      const double doublings = std::log2(pairs(*to) / pairs(*from));
      // Skipped for one long sequence among short ones, where more sequences hardly add work.
      if (!std::equal(key.begin(), key.end() - 1, next_key.begin()) || doublings < 1) continue;
      const double factor = std::pow(to->median() / from->median(), 1 / doublings);
      if (factor > most.factor) most = {factor, from, to};
    }
  }
  return most;
}

// Cells that differ from the first only in heads, batch and context; one curve per batch.
void plot(const std::string &path, const std::string &where, const std::vector<Timing> &timings) {
  const auto kind = [](const cases::Case &c) {
    return std::tuple(c.lens.back().q, c.page_size, c.kv_dtype, c.lens.front().k == c.lens.back().k);
  };
  std::vector<Curve> curves;
  const cases::Case *before = nullptr, *one = nullptr;
  for (const Timing &t : timings) {
    if (!t.error.empty()) continue;
    const cases::Case &c = *t.spec;
    if (one == nullptr) one = &c;
    if (kind(c) != kind(*one)) continue;
    const std::string label = fmt::format("{}/{} D{}", c.heads_q, c.heads_kv, c.head_dim);
    if (curves.empty() || curves.back().label != label || before->lens.size() != c.lens.size())
      curves.push_back({label, {}});
    before = &c;
    double keys = 0;
    for (const cases::SeqLen &len : c.lens) keys += len.k;
    curves.back().points.push_back({keys, t.median(), c.name + ": " + seconds_text(t.median())});
  }
  std::string title = "flashspark: time of a call against the keys of the batch";
  if (one != nullptr) title += fmt::format(", q {}, {}", one->lens[0].q, cases::dtype_name(one->kv_dtype));
  write_curves(path, title, where, curves);
}

}  // namespace

int bench_decode(const BenchOptions &options) {
  const bool on_gpu = !options.cpu && gpu_unavailable_reason().empty() &&
                      (options.implementation.empty() || options.implementation == kGpuImplementation);
  using cases::DecodeGrid;
  const DecodeGrid grid = options.full ? DecodeGrid::kFull : on_gpu ? DecodeGrid::kShort : DecodeGrid::kCpu;
  const std::vector<cases::Case> all = select(cases::decode_cases(grid), options.filter, options.seed);
  if (options.list) return print_list(all, options.json), kOk;
  if (!options.plot.empty()) require_writable(options.plot);
  const Target target(options);
  Cache cache;
  const std::vector<Timing> timings =
      time_all(all, [&](const cases::Case &spec) { return measure(spec, target, cache, options); });
  const Growth growth = largest_growth(timings);
  const auto of_copy_bandwidth = [&](const Timing &t) { return t.work.bytes / t.median() / target.limits.bytes; };
  if (options.json) {
    Json json = report(target, timings);
    for (size_t n = 0; n < timings.size(); ++n) {
      if (timings[n].error.empty()) json["results"][n]["of_copy_bandwidth"] = of_copy_bandwidth(timings[n]);
    }
    json["largest_growth"] = Json();
    if (growth.to != nullptr)
      json["largest_growth"] = {
          {"factor", growth.factor}, {"from", growth.from->spec->name}, {"to", growth.to->spec->name}};
    print_json(json);
  } else {
    Table table({"case", ">us", ">p90", ">calls", ">GB/s", ">of copy"});
    for (const Timing &t : timings) {
      if (!t.error.empty()) {
        add_untimed(table, t);
        continue;
      }
      table.row({t.spec->name, fmt::format("{:.1f}", 1e6 * t.median()), fmt::format("{:.1f}", 1e6 * t.at(0.9)),
                 std::to_string(t.calls * t.seconds.size()), fmt::format("{:.1f}", t.work.bytes / t.median() / 1e9),
                 percent_text(of_copy_bandwidth(t))});
    }
    table.print();
    print_failures(timings);
    if (growth.to != nullptr) {
      fmt::print(
          "\nlargest growth of time for twice the work: {} (above {}: a cliff), from {} to {}\n",
          paint(growth.factor > kMostGrowth ? Colour::kRed : Colour::kGreen, fmt::format("{:.2f}", growth.factor)),
          kMostGrowth, growth.from->spec->name, growth.to->spec->name);
    }
    fmt::print("\n{}\n", paint(Colour::kDim, target.text()));
  }
  if (!options.plot.empty()) {
    plot(options.plot, target.text(), timings);
    if (!options.json) fmt::print("plot: {}\n", options.plot);
  }
  return exit_status(timings);
}

}  // namespace flashspark::cli
