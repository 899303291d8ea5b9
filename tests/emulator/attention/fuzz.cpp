// Random serving-shaped batches through the kernels that the plan chooses, or any other that fits.
//   emulator_fuzz [--count 1000] [--seed 1] [--seconds 600]
// A failure prints its seed; --seed S --count 1 runs it again.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>

#include "attention/harness.hpp"

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

// Decode, verify, chunk, prefill and padded rows; short enough for the emulator.
std::vector<cases::SeqLen> lengths(Draw &draw) {
  std::vector<cases::SeqLen> lens(draw.from(1, draw.one_in(8) ? 40 : 5));
  int64_t budget = 260;  // query rows x keys / 256
  for (cases::SeqLen &len : lens) {
    const int64_t kind = draw.from(0, 9);
    len.q = kind == 0 ? 0 : kind < 4 ? 1 : kind < 6 ? draw.from(2, 16) : draw.from(1, 150);
    len.k = draw.one_in(6) ? len.q : draw.one_in(12) ? draw.from(0, 20) : draw.from(1, 400);
    const int64_t cost = (len.q / 16 + 1) * (len.k / 16 + 1);
    if (cost > budget) len.q = std::min<int64_t>(len.q, 1), len.k = std::min<int64_t>(len.k, 60);
    budget = std::max<int64_t>(0, budget - cost);
  }
  return lens;
}

void choose_mask(Draw &draw, cases::Case &c) {
  c.causal = !draw.one_in(3);
  c.causal_per_seq = draw.one_in(8);
  if (draw.one_in(4)) c.window_left = draw.from(0, draw.one_in(2) ? 20 : 200);
  if (draw.one_in(6)) c.window_right = draw.from(0, 60);
  c.sinks = draw.one_in(4);
  c.sinks_dtype = draw.of({FLASHSPARK_FLOAT32, FLASHSPARK_FLOAT16, FLASHSPARK_BFLOAT16});
  if (!draw.one_in(4)) return;
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
      c.window_left = c.window_right = -1, c.causal_per_seq = false;
      break;
    default:
      c.prefix_mode = draw.of<int32_t>({FLASHSPARK_PREFIX_PER_SEQ, FLASHSPARK_PREFIX_PER_TOKEN});
      c.prefix_clamp = draw.one_in(3);
      c.causal = true;
  }
}

cases::Case random_case(uint64_t seed) {
  Draw draw(seed);
  cases::Case c;
  c.name = "seed " + std::to_string(seed);
  c.seed = seed;
  c.lens = lengths(draw);
  const int64_t group = draw.of<int64_t>({1, 1, 2, 3, 4, 7, 8, 16});
  c.heads_kv = draw.from(1, 2);
  c.heads_q = group * c.heads_kv;
  if (group > 4) {
    for (cases::SeqLen &len : c.lens) len.q = std::min<int64_t>(len.q, 40);
  }
  c.head_dim = draw.of<int64_t>({64, 64, 80, 96, 128, 128, 128, 192, 256, 512, 8 * draw.from(1, 40)});
  c.head_dim_v = c.head_dim == 192 ? 128 : draw.one_in(8) ? 8 * draw.from(1, 32) : c.head_dim;
  // Of the kernels in fp16 a few are linked in, none for 512.
  const int32_t dtype = c.head_dim <= 256 && draw.one_in(4) ? FLASHSPARK_FLOAT16 : FLASHSPARK_BFLOAT16;
  c.q_dtype = c.kv_dtype = c.out_dtype = dtype;
  c.q_layout = draw.one_in(4) ? cases::Layout::kDense : cases::Layout::kVarlen;
  c.kv_layout = draw.of({cases::Layout::kPaged, cases::Layout::kPaged, cases::Layout::kPaged, cases::Layout::kVarlen,
                         cases::Layout::kDense});
  c.page_size = draw.of<int64_t>({16, 16, 32, 48, 64, 256, 784});
  c.cache_order = draw.of({cases::CacheOrder::kPageTokenHead, cases::CacheOrder::kPageHeadToken});
  c.packed_kv = draw.one_in(4);
  c.strided = draw.one_in(4);
  c.seqused_q = draw.one_in(4);
  c.seqused_k = draw.one_in(4);
  c.kv_batch_index = c.kv_layout == cases::Layout::kDense && draw.one_in(3);
  if (c.kv_layout != cases::Layout::kVarlen && draw.one_in(6)) c.leftpad = draw.from(1, 20);
  choose_mask(draw, c);
  c.num_splits = draw.of({0, 0, 1, 2, 3, 5});
  c.lse = !draw.one_in(4);
  c.input = draw.one_in(4) ? cases::Input::kPeaked : cases::Input::kNormal;
  return c;
}

// The plan's choice in half of the cases in bf16, else one of those that fit.
const Kernel *random_kernel(const cases::Problem &problem, uint64_t seed) {
  const bool bf16 = problem.params.q.dtype == FLASHSPARK_BFLOAT16;
  if (seed % 2 == 0 && bf16) return nullptr;
  std::vector<const Kernel *> fitting;
  for (const Kernel &kernel : kernels()) {
    // A head of 64 in a kernel of 512 tells nothing that one of 128 does not, at four times the cost.
    if (can_run(kernel, problem) && (!bf16 || kernel.instance->head_dim <= 2 * problem.params.head_dim + 64))
      fitting.push_back(&kernel);
  }
  return fitting.at(seed / 2 % fitting.size());
}

int fuzz(uint64_t first, int64_t count, double seconds) {
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  std::map<std::string, int> ran;
  int64_t done = 0, failed = 0;
  for (; done < count && elapsed() < seconds; ++done) {
    const uint64_t seed = first + static_cast<uint64_t>(done);
    const cases::Case spec = random_case(seed);
    const cases::Problem problem(spec);
    if (!can_run(problem)) {
      std::printf("seed %llu is not a problem for the kernels\n", static_cast<unsigned long long>(seed));
      ++failed;
      continue;
    }
    const Kernel *kernel = random_kernel(problem, seed);
    const std::string text = check(spec, kernel, seed);
    if (!text.empty()) {
      std::printf("FAILED %s\n", text.c_str());
      std::fflush(stdout);
      if (++failed == 10) break;
    }
    ran[kernel != nullptr ? name_of(*kernel) : "the plan's choice"] += 1;
  }
  for (const auto &[name, times] : ran) std::printf("%6d  %s\n", times, name.c_str());
  std::printf("%lld cases, %lld failed, %.1f s\n", static_cast<long long>(done), static_cast<long long>(failed),
              elapsed());
  return failed > 0 || done == 0 ? 1 : 0;
}

}  // namespace
}  // namespace flashspark::emulator

int main(int argc, char **argv) {
  uint64_t seed = 1;
  int64_t count = 1000;
  double seconds = 600;
  for (int n = 1; n + 1 < argc; n += 2) {
    if (std::strcmp(argv[n], "--count") == 0) count = std::atoll(argv[n + 1]);
    if (std::strcmp(argv[n], "--seed") == 0) seed = std::strtoull(argv[n + 1], nullptr, 10);
    if (std::strcmp(argv[n], "--seconds") == 0) seconds = std::atof(argv[n + 1]);
  }
  return flashspark::emulator::fuzz(seed, count, seconds);
}
