// Whether two tensors share memory. Every problem asks, so the usual answer, that their spans do not meet, comes first.
#include <algorithm>
#include <numeric>

#include "check.hpp"
#include "dtype.hpp"
#include "error.hpp"

namespace flashspark::check {
namespace {

struct Dim {
  int64_t stride, extent;  // bytes
};

// The addresses [low, high) that a tensor reaches, and its dimensions in bytes.
struct Span {
  int64_t low, high;
  Dim dims[3];
};

Span span_of(const View &view) {
  const flashspark_tensor &t = view.tensor;
  const auto size = static_cast<int64_t>(dtype_size(t.dtype));
  Span s{};
  s.low = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data));
  s.high = s.low + view.width * size;
  const Dim dims[] = {{t.batch_stride, view.batch}, {t.token_stride, view.tokens}, {t.head_stride, view.heads}};
  for (int n = 0; n < 3; ++n) {
    s.dims[n] = {dims[n].extent == 1 ? 0 : dims[n].stride * size, dims[n].extent};
    const int64_t reach = s.dims[n].stride * (dims[n].extent - 1);
    (reach < 0 ? s.low : s.high) += reach;
  }
  return s;
}

// The addresses of a tensor modulo `period`: [begin, begin + length), which may wrap around.
struct Residues {
  int64_t begin, length;
};

Residues residues_of(const Span &span, const View &view, int64_t period) {
  int64_t low = static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.tensor.data));
  int64_t length = view.width * static_cast<int64_t>(dtype_size(view.tensor.dtype));
  for (const Dim &dim : span.dims) {
    if (dim.stride % period == 0) continue;  // adds nothing modulo the period
    const int64_t reach = dim.stride * (dim.extent - 1);
    if (reach < 0) low += reach;
    length += std::abs(reach);
  }
  return {low % period, length};
}

// True if interleaved tensors certainly share no byte: modulo one of their strides, or the greatest common divisor of
// two, they lie side by side.
bool interleave(const Span &a, const View &view_a, const Span &b, const View &view_b) {
  int64_t strides[6];
  int count = 0;
  for (const Span *span : {&a, &b}) {
    for (const Dim &dim : span->dims) {
      if (dim.stride != 0) strides[count++] = std::abs(dim.stride);
    }
  }
  const auto apart = [&](int64_t period) {
    const Residues x = residues_of(a, view_a, period), y = residues_of(b, view_b, period);
    if (x.length + y.length > period) return false;
    const int64_t ahead = (y.begin - x.begin + period) % period;  // from x's begin forward to y's
    return ahead >= x.length && ahead + y.length <= period;
  };
  for (int n = 0; n < count; ++n) {
    for (int m = n; m < count; ++m) {
      if (apart(std::gcd(strides[n], strides[m]))) return true;
    }
  }
  return false;
}

bool is_empty(const View &v) {
  return v.tensor.data == nullptr || v.batch == 0 || v.tokens == 0 || v.heads == 0;
}

}  // namespace

bool same(const View &a, const View &b) {
  const auto equal = [](int64_t x, int64_t y, int64_t extent) { return extent == 1 || x == y; };
  return a.tensor.data == b.tensor.data && a.tensor.dtype == b.tensor.dtype && a.width == b.width &&
         equal(a.tensor.batch_stride, b.tensor.batch_stride, a.batch) &&
         equal(a.tensor.token_stride, b.tensor.token_stride, a.tokens) &&
         equal(a.tensor.head_stride, b.tensor.head_stride, a.heads);
}

void apart(const View &written, const View &other, const char *rule) {
  if (is_empty(written) || is_empty(other)) return;
  const Span a = span_of(written), b = span_of(other);
  if (a.high <= b.low || b.high <= a.low || interleave(a, written, b, other)) return;
  fail(written.name, "[" + std::to_string(a.low) + ", " + std::to_string(a.high) + ")",
       std::string("shares memory with ") + other.name + ", [" + std::to_string(b.low) + ", " + std::to_string(b.high) +
           "): " + rule);
}

}  // namespace flashspark::check
