// Gradients of attention from Python: BACKWARD's arguments of signature.def, then all of the forward call's, whose out
// and lse hold what that call gave, then a tensor or None for each tensor that score_mod captures.
#include <vector>

#include "attention.hpp"
#include "exports.hpp"

namespace flashspark::ffi {
namespace {

using A = attention::Argument;
using B = backward::Argument;

struct BackwardCall {
  Call forward;
  flashspark_attention_backward_params params;
  std::vector<flashspark_captured_gradient> captured;
};

void require_same_shape(const Tensor &x, const Tensor &as) {
  x.require_ndim({as.ndim()}, (std::string("of as many dimensions as ") + as.name()).c_str());
  const std::string theirs = std::string(as.name()) + "'s";
  for (int32_t i = 0; i < x.ndim(); ++i) x.require_size(i, as.size(i), theirs.c_str());
}

// Reads the arguments before and behind the forward call's, which have been read already.
class GradientReader {
 public:
  GradientReader(Reader &args, const Call &forward) : args_(args), forward_(forward) {
    args_.set_names(backward::kNames, backward::kCount, "captured tensor");
  }

  // dout or a gradient of q, k or v: of q's type and of the shape of the forward call's argument.
  flashspark_tensor rows(B index, A as, int stored) {
    const Tensor given = args_.optional_tensor(index, stored_type(forward_.stored_as, stored));
    if (!given) return {};
    const Tensor x = forward_.in_order(given);
    require_same_shape(x, forward_.in_order(of_forward(as)));
    return x.rows();
  }

  // A gradient in float32 that has the strides of the forward call's argument.
  float *floats(B index, A as) {
    const Tensor x = float32(index, as);
    if (!x) return nullptr;
    const Tensor theirs = of_forward(as);
    for (int32_t i = 0; i < x.ndim(); ++i) {
      if (x.size(i) > 1 && x.stride(i) != theirs.stride(i))
        fail_value(std::string(x.name()) + ".stride(" + std::to_string(i) + ")", std::to_string(x.stride(i)),
                   "must be " + std::string(theirs.name()) + "'s, " + std::to_string(theirs.stride(i)));
    }
    return static_cast<float *>(x.data());
  }

  // A contiguous gradient in float32 of an argument that has no element twice.
  float *dense_floats(B index, A as) {
    const Tensor x = float32(index, as);
    if (!x) return nullptr;
    x.require_dense();
    const Tensor theirs = of_forward(as);
    if (theirs.size(0) > 1 && theirs.stride(0) == 0)
      fail_value(std::string(theirs.name()) + ".stride(0)", "0", std::string("must not be 0 with ") + x.name());
    return static_cast<float *>(x.data());
  }

  std::vector<flashspark_captured_gradient> captured(const flashspark_function &function, int32_t at) {
    std::vector<flashspark_captured_gradient> gradients;
    if (!args_.has(at)) return gradients;
    for (int32_t n = 0; n < function.num_tensors; ++n)
      gradients.push_back(
          gradient_of(args_.optional_tensor(at + n, 0, "gradient of a captured tensor"), function.tensors[n]));
    return gradients;
  }

 private:
  Tensor float32(B index, A as) {
    const Tensor x = args_.optional_tensor(index), theirs = of_forward(as);
    if (!x) return {};
    if (!theirs) fail_value(x.name(), "given", std::string("must be None without ") + theirs_name(as));
    x.require_float32();
    require_same_shape(x, theirs);
    return x;
  }

  Tensor of_forward(A index) {
    return args_.optional_tensor(backward::kCount + static_cast<int32_t>(index), 0, theirs_name(index));
  }
  const char *theirs_name(A index) const { return attention::kNames[forward_.face][index]; }

  static flashspark_captured_gradient gradient_of(const Tensor &x, const flashspark_captured_tensor &of) {
    flashspark_captured_gradient gradient{};
    if (!x) return gradient;
    x.require_float32();
    x.require_ndim({of.rank}, "of as many dimensions as the tensor");
    for (int32_t i = 0; i < of.rank; ++i) {
      x.require_size(i, of.shape[i], "the tensor's");
      gradient.strides[i] = x.stride(i);
    }
    gradient.data = static_cast<float *>(x.data());
    return gradient;
  }

  Reader &args_;
  const Call &forward_;
};

void read_backward(Reader &args, BackwardCall &call) {
  flashspark_attention_backward_params &p = call.params;
  flashspark_attention_backward_params_init(&p);
  args.move(backward::kCount);
  read_call(args, call.forward);
  args.move(-backward::kCount);
  p.forward = call.forward.params;
  GradientReader gradients(args, call.forward);
  if (args.is_none(B::dout)) fail_type("dout", "None", "must be a tensor of out's shape");
  p.dout = gradients.rows(B::dout, A::out, kStoredQ);
  p.dlse = gradients.floats(B::dlse, A::lse);
  p.dq = gradients.rows(B::dq, A::q, kStoredQ);
  p.dk = gradients.rows(B::dk, A::k, kStoredQ);
  p.dv = gradients.rows(B::dv, A::v, kStoredQ);
  p.dsinks = gradients.dense_floats(B::dsinks, A::sinks);
  p.drel_logits = gradients.floats(B::drel_logits, A::rel_logits);
  p.dalibi_slopes = gradients.dense_floats(B::dalibi_slopes, A::alibi_slopes);
  call.captured = gradients.captured(p.forward.score_mod, backward::kCount + call.forward.functions.end());
  if (!call.captured.empty()) p.dtensors = call.captured.data();
}

}  // namespace

void attention_backward(Reader &args) {
  BackwardCall call;
  read_backward(args, call);
  Scratch scratch(call.params.forward.device_index);
  const flashspark_status status =
      flashspark_attention_backward_with_allocator(&call.params, scratch.allocator(), &scratch);
  if (scratch.failed()) throw AlreadyRaised{};
  require_ok(status, call.forward.face);
}

std::string attention_backward_explain(Reader &args) {
  BackwardCall call;
  read_backward(args, call);
  return explained(call.forward.face, flashspark_attention_backward_explain, call.params);
}

}  // namespace flashspark::ffi
