#include "cpu/function_gradients.hpp"

#include <algorithm>

namespace flashspark::cpu {
namespace {

int64_t num_elements(const flashspark_captured_tensor &tensor) {
  int64_t count = 1;
  for (int32_t d = 0; d < tensor.rank; ++d) count *= tensor.shape[d];
  return count;
}

bool is_wanted(const BackwardParams &p, int32_t tensor) {
  return p.dtensors != nullptr && p.dtensors[tensor].data != nullptr;
}

}  // namespace

FunctionGradients::FunctionGradients(const BackwardParams &p) : p_(&p) {
  for (int32_t n = 0; n < p.forward.score_mod.num_tensors; ++n)
    sums_.emplace_back(static_cast<size_t>(is_wanted(p, n) ? num_elements(p.forward.score_mod.tensors[n]) : 0));
}

int64_t FunctionGradients::num_sums(const BackwardParams &p) {
  int64_t count = 0;
  for (int32_t n = 0; p.forward.score_mod.mod != nullptr && n < p.forward.score_mod.num_tensors; ++n)
    count += is_wanted(p, n) ? num_elements(p.forward.score_mod.tensors[n]) : 0;
  return count;
}

void FunctionGradients::find_slopes(size_t result, const graph::Row *rows, int64_t num_rows, int64_t key, int64_t count,
                                    const float *scores, int64_t stride) {
  slopes_.resize(static_cast<size_t>(num_rows * count));
  for (int64_t r = 0; r < num_rows; ++r) std::copy_n(scores + r * stride, count, slopes_.data() + r * count);
  p_->forward.score_mod.mod->derivative().results[result].score_tile(
      bindings_, rows, static_cast<int32_t>(num_rows), static_cast<int32_t>(key), static_cast<int32_t>(count),
      slopes_.data(), count, 1, nullptr);
}

void FunctionGradients::apply(const TileFunctions &functions, int64_t first, int64_t rows, int64_t key, int64_t count,
                              const float *scores, float *ds, int64_t stride) {
  bindings_ = functions.functions().score_bindings();
  const graph::Row *of_rows = functions.rows() + first;
  const std::vector<graph::LoadGradient> &loads = p_->forward.score_mod.mod->derivative().function.loads;
  for (size_t n = 0; n < loads.size(); ++n) {
    if (is_wanted(*p_, loads[n].tensor)) add(n, of_rows, rows, key, count, scores, ds, stride);
  }
  find_slopes(0, of_rows, rows, key, count, scores, stride);
  for (int64_t r = 0; r < rows; ++r) {
    const float *slope = slopes_.data() + r * count;
    float *to = ds + r * stride;
    for (int64_t n = 0; n < count; ++n) to[n] = to[n] == 0 ? 0 : to[n] * slope[n];
  }
}

void FunctionGradients::add(size_t load, const graph::Row *rows, int64_t num_rows, int64_t key, int64_t count,
                            const float *scores, const float *ds, int64_t stride) {
  const ScoreDerivative &derivative = p_->forward.score_mod.mod->derivative();
  const int32_t number = derivative.function.loads[load].tensor;
  const flashspark_captured_tensor &tensor = p_->forward.score_mod.tensors[number];
  places_.assign(static_cast<size_t>(num_rows * count), 0);
  indices_.resize(places_.size());
  for (int32_t d = 0; d < tensor.rank; ++d) {
    derivative.indices[load][static_cast<size_t>(d)].index_tile(bindings_, rows, static_cast<int32_t>(num_rows),
                                                                static_cast<int32_t>(key), static_cast<int32_t>(count),
                                                                scores, stride, 1, indices_.data());
    const int64_t size = tensor.shape[d];
    for (size_t n = 0; n < places_.size(); ++n) {
      const int64_t from_start = indices_[n] < 0 ? indices_[n] + size : indices_[n];
      places_[n] = places_[n] * size + std::clamp<int64_t>(from_start, 0, size - 1);
    }
  }
  find_slopes(1 + load, rows, num_rows, key, count, scores, stride);
  double *sums = sums_[static_cast<size_t>(number)].data();
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t n = 0; n < count; ++n) {
      const float gradient = ds[r * stride + n];
      const auto at = static_cast<size_t>(r * count + n);
      if (gradient != 0) sums[places_[at]] += double{gradient} * slopes_[at];
    }
  }
}

void FunctionGradients::store(const BackwardParams &p, const std::vector<FunctionGradients> &parts) {
  for (int32_t number = 0; number < p.forward.score_mod.num_tensors; ++number) {
    if (!is_wanted(p, number)) continue;
    const flashspark_captured_tensor &tensor = p.forward.score_mod.tensors[number];
    const flashspark_captured_gradient &gradient = p.dtensors[number];
    for (int64_t n = 0; n < num_elements(tensor); ++n) {
      double sum = 0;
      for (const FunctionGradients &part : parts)
        sum += part.sums_[static_cast<size_t>(number)][static_cast<size_t>(n)];
      int64_t at = 0;
      for (int64_t d = tensor.rank - 1, left = n; d >= 0; left /= tensor.shape[d], --d)
        at += left % tensor.shape[d] * gradient.strides[d];
      gradient.data[at] = static_cast<float>(sum);
    }
  }
}

}  // namespace flashspark::cpu
