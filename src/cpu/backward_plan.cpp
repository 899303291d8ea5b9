#include "cpu/backward_plan.hpp"

#include <utility>

#include "cpu/function_gradients.hpp"
#include "cpu/thread_pool.hpp"
#include "cpu/tile_mask.hpp"

namespace flashspark::cpu {
namespace {

// Below this many multiply-adds waking another thread costs more than it does.
constexpr int64_t kSerialWork = 400'000;

// Memory that all shares' sums of dq, and all parts' sums of captured tensors, may take. Beyond it there are fewer.
constexpr int64_t kMostSums = int64_t{256} << 20;

// With `deterministic` sums are cut without regard to the number of threads: so often at most.
constexpr int64_t kDeterministicParts = 16;

}  // namespace

BackwardPlan::BackwardPlan(const BackwardParams &p)
    : threads(p.forward.num_threads > 0 ? p.forward.num_threads : default_threads()),
      p_(p),
      f_(p.forward),
      group_(f_.num_heads_q / f_.num_heads_kv) {
  find_heads();
  int64_t work = 0;
  for (const BackwardJob &job : jobs) work += job.cost * (3 * f_.head_dim + 2 * f_.head_dim_v);
  if (work < kSerialWork) threads = 1;
  cut_into_jobs();
  const int64_t affordable = kMostSums / std::max<int64_t>(8 * FunctionGradients::num_sums(p_), 1);
  parts =
      std::clamp<int64_t>(f_.deterministic != 0 ? kDeterministicParts : threads, 1, std::max<int64_t>(affordable, 1));
}

int64_t BackwardPlan::dq_floats(const BackwardHead &head) const {
  return (head.rows + kRowGroup - 1) / kRowGroup * kRowGroup * backward_width(f_.head_dim);
}

std::vector<BackwardRowTile> BackwardPlan::cut_rows(const Sequence &s, int64_t h_kv) const {
  std::vector<BackwardRowTile> tiles;
  TileMask &mask = thread_mask();
  const int64_t most = backward_rows(f_.head_dim, f_.head_dim_v), packed = s.seqlen_q * group_;
  for (int64_t row0 = 0; row0 < packed; row0 += most) {
    const int64_t rows = std::min(most, packed - row0);
    mask.set_tokens(f_, s, h_kv, row0 / group_, (row0 + rows - 1) / group_);
    tiles.push_back({row0, static_cast<int32_t>(rows), mask.spans});
  }
  return tiles;
}

// Each head as one job.
void BackwardPlan::find_heads() {
  for (int64_t b = 0; b < f_.num_seqs; ++b) {
    const Sequence s = sequence(f_, b);
    if (s.seqlen_q == 0) continue;
    for (int64_t h_kv = 0; h_kv < f_.num_heads_kv; ++h_kv) {
      if (h_kv == 0 || (has_block_lists(f_) && f_.block_heads > 1)) row_tiles.push_back(cut_rows(s, h_kv));
      Interval keys{s.seqlen_k, 0};
      int64_t pairs = 0;
      for (const BackwardRowTile &tile : row_tiles.back()) {
        for (const Interval &span : tile.spans) {
          keys = {std::min(keys.begin, span.begin), std::max(keys.end, std::min(span.end, s.seqlen_k))};
          pairs += tile.rows * (span.end - span.begin);
        }
      }
      jobs.push_back({heads.size(), 0, pairs});
      heads.push_back(
          {s, h_kv, s.seqlen_q * group_, keys.empty() ? Interval{} : keys, row_tiles.size() - 1, common_rows});
      common_rows += heads.back().rows;
    }
  }
}

// Into how many shares a head's keys are cut: with too few heads for the threads, or always alike if the sums of dq
// must not depend on these.
int64_t BackwardPlan::shares_of(const BackwardHead &head) const {
  const auto num_heads = static_cast<int64_t>(heads.size());
  const int64_t most = std::max<int64_t>(head.key_tiles(), 1);
  if (f_.deterministic != 0) return std::clamp<int64_t>(kDeterministicParts / f_.num_heads_kv, 1, most);
  if (threads == 1 || num_heads >= 4 * threads) return 1;
  return std::clamp<int64_t>((4 * threads + num_heads - 1) / num_heads, 1, most);
}

void BackwardPlan::cut_into_jobs() {
  int64_t floats = 0;
  for (const BackwardHead &head : heads) floats += dq_floats(head);
  const bool with_dq = p_.dq.data != nullptr;
  const int64_t affordable = with_dq ? std::max<int64_t>(kMostSums / std::max<int64_t>(4 * floats, 1), 1) : INT64_MAX;
  const std::vector<BackwardJob> whole = std::exchange(jobs, {});
  for (const BackwardJob &job : whole) {
    BackwardHead &head = heads[job.head];
    head.shares = static_cast<int32_t>(std::min(shares_of(head), affordable));
    head.first_job = static_cast<int64_t>(jobs.size());
    for (int32_t share = 0; share < head.shares; ++share) jobs.push_back({job.head, share, job.cost / head.shares});
    if (head.shares == 1 || !with_dq) continue;
    head.first_partial = partial_floats;
    partial_floats += head.shares * dq_floats(head);
  }
}

}  // namespace flashspark::cpu
