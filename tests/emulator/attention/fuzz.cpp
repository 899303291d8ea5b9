// Fuzzes the forward kernels with random serving-shaped batches: half of the cases run the kernel that the plan
// chooses, the others go through all kernels in turn.
//   emulator_fuzz [--count 1000] [--seed 1] [--seconds 600] [--failures 10] [--kernel d64_short_q_bf16_sm_120f ...]
// A failure prints its seed; --seed S --count 1 (with the same --kernel) reproduces it.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>

#include "attention/harness.hpp"
#include "guarded.hpp"
#if defined(FLASHSPARK_EMULATOR_POISON)
#include <sanitizer/common_interface_defs.h>
#endif

namespace flashspark::emulator {
namespace {

class Draw {
 public:
  explicit Draw(uint64_t seed) : rng_(seed) {}
  int64_t from(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng_); }
  bool one_in(int64_t n) { return from(1, n) == 1; }
  template <class T>
  T of(std::initializer_list<T> values) {
    return values.begin()[from(0, static_cast<int64_t>(values.size()) - 1)];
  }

 private:
  std::mt19937_64 rng_;
};

// What a case is drawn for: one kernel, or whichever the plan chooses (NULL).
struct Limits {
  const Kernel *kernel;
  bool score_mod() const { return kernel == nullptr || kernel->instance->score_mod == ScoreMod::native; }
};

void choose_heads(Draw &draw, const Limits &limits, cases::Case &c) {
  const int64_t group = draw.of<int64_t>({1, 1, 2, 3, 4, 7, 8, 16});
  c.heads_kv = draw.from(1, 2);
  c.heads_q = group * c.heads_kv;
  int32_t dtype = draw.one_in(4) ? FLASHSPARK_FLOAT8_E4M3 : FLASHSPARK_BFLOAT16;
  if (limits.kernel == nullptr) {
    c.head_dim = draw.of<int64_t>({64, 64, 80, 96, 128, 128, 128, 192, 256, 512, 8 * draw.from(1, 40)});
    c.head_dim_v = c.head_dim == 192 ? 128 : c.head_dim;
  } else {
    // Mostly the kernel's own head size, otherwise a smaller one whose last columns are zero fill.
    const Instance &instance = *limits.kernel->instance;
    c.head_dim = instance.head_dim - (draw.one_in(4) ? 8 * draw.from(1, instance.head_dim / 8 - 1) : 0);
    c.head_dim_v = instance.head_dim_v - (draw.one_in(4) ? 8 * draw.from(1, instance.head_dim_v / 8 - 1) : 0);
    dtype = limits.kernel->dtype;
  }
  if (draw.one_in(12)) c.head_dim_v = 8 * draw.from(1, 40);
  c.q_dtype = c.kv_dtype = c.out_dtype = dtype;
  if (draw.one_in(6)) c.out_dtype = FLASHSPARK_FLOAT8_E4M3;
  if (dtype != FLASHSPARK_FLOAT8_E4M3) return;
  for (int64_t *width : {&c.head_dim, &c.head_dim_v}) *width = std::min<int64_t>((*width + 15) / 16 * 16, 256);
  c.q_dtype = draw.of<int32_t>({FLASHSPARK_BFLOAT16, FLASHSPARK_FLOAT16, FLASHSPARK_FLOAT8_E4M3});
  c.out_dtype = draw.of<int32_t>({FLASHSPARK_BFLOAT16, FLASHSPARK_FLOAT16, FLASHSPARK_FLOAT8_E4M3});
  for (cases::Descale *scale : {&c.q_descale, &c.k_descale, &c.v_descale})
    *scale =
        draw.of({cases::Descale::kNone, cases::Descale::kPerTensor, cases::Descale::kPerHead, cases::Descale::kFull});
}

// Lengths of decode, verify, chunked prefill, prefill and padding rows, bounded so that the emulator finishes quickly.
void choose_lengths(Draw &draw, cases::Case &c) {
  c.lens.resize(draw.from(1, draw.one_in(8) ? 40 : 5));
  // The unit of cost is 16 rows x 16 keys x 64 columns of K and of V.
  constexpr int64_t kBudget = 2000;
  int64_t budget = kBudget;
  const int64_t group = c.heads_q / c.heads_kv;
  const auto cost = [&](const cases::SeqLen &len) {
    const int64_t columns = (c.head_dim + c.head_dim_v + 127) / 128;
    return c.heads_kv * ((len.q * group + 15) / 16) * (len.k / 16 + 1) * columns;
  };
  for (cases::SeqLen &len : c.lens) {
    const int64_t kind = draw.from(0, 9);
    len.q = kind == 0 ? 0 : kind < 4 ? 1 : kind < 6 ? draw.from(2, 16) : draw.from(1, 150);
    len.k = draw.one_in(6) ? len.q : draw.one_in(12) ? draw.from(0, 20) : draw.from(1, 400);
    // Over budget: halve the query rows first, then the keys.
    while (cost(len) > budget && len.q > 1) len.q /= 2;
    while (cost(len) > budget && len.k > 8) len.k /= 2;
    budget = std::max<int64_t>(kBudget / 16, budget - cost(len));
  }
}

void choose_cache(Draw &draw, const Limits &limits, cases::Case &c) {
  using cases::Layout;
  c.q_layout = draw.one_in(4) ? Layout::kDense : Layout::kVarlen;
  c.kv_layout = draw.of({Layout::kPaged, Layout::kPaged, Layout::kPaged, Layout::kVarlen, Layout::kDense});
  c.page_size = draw.of<int64_t>({16, 16, 32, 48, 64, 256, 784});
  if (limits.score_mod() && draw.one_in(5)) c.page_size = draw.of<int64_t>({1, draw.from(1, 100)});
  c.cache_order = draw.of({cases::CacheOrder::kPageTokenHead, cases::CacheOrder::kPageHeadToken});
  c.packed_kv = draw.one_in(4);
  c.strided = draw.one_in(4);
  c.seqused_q = draw.one_in(4);
  c.seqused_k = draw.one_in(4);
  c.kv_batch_index = c.kv_layout != Layout::kVarlen && draw.one_in(c.kv_layout == Layout::kDense ? 2 : 5);
  if (c.kv_layout != Layout::kVarlen && draw.one_in(6)) c.leftpad = draw.from(1, 20);
}

void choose_mask(Draw &draw, const Limits &limits, cases::Case &c) {
  c.causal = !draw.one_in(3);
  c.causal_per_seq = draw.one_in(8);
  if (draw.one_in(4)) c.window_left = draw.from(0, draw.one_in(2) ? 20 : 200);
  if (draw.one_in(6)) c.window_right = draw.from(0, 60);
  if (limits.score_mod() && draw.one_in(6)) c.attention_chunk = draw.from(1, 120);
  c.sinks = draw.one_in(4);
  c.sinks_dtype = draw.of({FLASHSPARK_FLOAT32, FLASHSPARK_FLOAT16, FLASHSPARK_BFLOAT16});
  if (!limits.score_mod() || draw.one_in(4) == (limits.kernel != nullptr)) return;
  switch (draw.from(0, 5)) {
    case 0:
      c.softcap = static_cast<float>(draw.from(1, 50));
      break;
    case 1:
      c.alibi = true, c.alibi_per_batch = draw.one_in(2);
      break;
    case 2:
      c.rel_extent = draw.from(1, 200);
      c.rel_dtype = draw.of({FLASHSPARK_FLOAT32, FLASHSPARK_FLOAT16, FLASHSPARK_BFLOAT16});
      break;
    case 3:
      c.rswa_window = static_cast<int32_t>(draw.from(1, 80)), c.causal = true;
      c.window_left = c.window_right = -1, c.causal_per_seq = false, c.attention_chunk = 0;
      break;
    default:
      c.prefix_mode = draw.of<int32_t>({FLASHSPARK_PREFIX_PER_SEQ, FLASHSPARK_PREFIX_PER_TOKEN});
      c.causal = true;
      // prefix_clamp needs a window to clamp to.
      c.prefix_clamp = draw.one_in(3);
      if (c.prefix_clamp && c.window_left < 0) c.window_left = draw.from(0, 40);
  }
}

cases::Case random_case(uint64_t seed, const Limits &limits) {
  Draw draw(seed);
  cases::Case c;
  c.name = "seed " + std::to_string(seed);
  c.seed = seed;
  choose_heads(draw, limits, c);
  if (c.out_dtype == FLASHSPARK_FLOAT8_E4M3 && draw.one_in(2)) c.output_scale = 0.02f;
  choose_lengths(draw, c);
  choose_cache(draw, limits, c);
  choose_mask(draw, limits, c);
  c.num_splits = draw.of({0, 0, 1, 2, 3, 5});
  c.lse = !draw.one_in(4);
  c.input = draw.one_in(4) ? cases::Input::kPeaked : cases::Input::kNormal;
  return c;
}

struct Options {
  uint64_t seed = 1;
  int64_t count = 1000;
  double seconds = 600;
  int64_t failures = 10;                // stop after this many failures
  std::vector<const Kernel *> kernels;  // empty: the plan's choice and every kernel in turn
};

uint64_t running_seed = 0;

// A sanitizer report ends the process before the failure is printed, so print the seed from its death callback.
void print_seed_at_death() {
#if defined(FLASHSPARK_EMULATOR_POISON)
  __sanitizer_set_death_callback([] {
    std::printf("FAILED seed %llu: a sanitizer's report\n", static_cast<unsigned long long>(running_seed));
    std::fflush(stdout);
  });
#endif
}

std::string check_case(const cases::Case &spec, const Kernel *kernel) {
  try {
    return check(spec, kernel, spec.seed);
  } catch (const std::exception &error) {
    return spec.name + ": " + error.what();
  }
}

int fuzz(const Options &options) {
  print_seed_at_death();
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  std::map<std::string, int> ran;
  int64_t done = 0, failed = 0;
  for (; done < options.count && elapsed() < options.seconds; ++done) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(done);
    Limits limits{nullptr};
    if (!options.kernels.empty()) {
      limits.kernel = options.kernels[seed % options.kernels.size()];
    } else if (seed % 2 != 0) {
      limits.kernel = &kernels()[seed / 2 % kernels().size()];
    }
    const cases::Case spec = random_case(seed, limits);
    running_seed = seed;
    const std::string text = check_case(spec, limits.kernel);
    if (!text.empty()) {
      std::printf("FAILED %s\n", text.c_str());
      std::fflush(stdout);
      if (++failed == options.failures) break;
    }
    ran[limits.kernel != nullptr ? name_of(*limits.kernel) : "the plan's choice"] += 1;
  }
  for (const auto &[name, times] : ran) std::printf("%6d  %s\n", times, name.c_str());
  std::printf("%lld cases, %lld failed, %.1f s\n", static_cast<long long>(done), static_cast<long long>(failed),
              elapsed());
  return failed > 0 || done == 0 ? 1 : 0;
}

}  // namespace
}  // namespace flashspark::emulator

int main(int argc, char **argv) {
  using namespace flashspark::emulator;
  Options options;
  for (int n = 1; n < argc; n += 2) {
    const std::string_view name = argv[n];
    const char *value = n + 1 < argc ? argv[n + 1] : "";
    if (name == "--count") {
      options.count = std::atoll(value);
    } else if (name == "--seed") {
      options.seed = std::strtoull(value, nullptr, 10);
    } else if (name == "--seconds") {
      options.seconds = std::atof(value);
    } else if (name == "--failures") {
      options.failures = std::atoll(value);
    } else {
      const size_t before = options.kernels.size();
      for (const Kernel &kernel : kernels()) {
        if (name == "--kernel" && name_of(kernel) == value) options.kernels.push_back(&kernel);
      }
      if (options.kernels.size() == before) {
        std::printf("no such option or kernel: %s %s\n", argv[n], value);
        return 2;
      }
    }
  }
  return fuzz(options);
}
