#include <cmath>
#include <cstdio>

#include "graph/cuda_writer.hpp"

namespace flashspark::graph {
namespace {

constexpr double kExactFloat = 0x1p24;  // integers up to it are exact as floats

std::string literal(float x) {
  if (std::isnan(x)) return "fn::nan()";
  if (std::isinf(x)) return x > 0 ? "fn::infinity()" : "(-fn::infinity())";
  return std::signbit(x) ? "(" + hex_text(x) + "f)" : hex_text(x) + "f";
}

std::string literal(const Node &node, Form form) {
  const auto real = static_cast<double>(node.type == Type::f32 ? double{node.real()} : static_cast<double>(node.value));
  if (form == Form::scaled) return "(" + literal(static_cast<float>(real)) + " * inverse_scale)";
  if (form == Form::real || node.type == Type::f32) return literal(static_cast<float>(real));
  if (node.type == Type::boolean) return node.value != 0 ? "true" : "false";
  const std::string cast = node.type == Type::i64 ? "int64_t" : "int32_t";
  // The lowest number has no literal: its digits overflow before they are negated.
  if (node.value < -INT32_MAX) return cast + "(" + std::to_string(node.value + 1) + "ll - 1)";
  return cast + "(" + std::to_string(node.value) + (node.type == Type::i64 ? "ll)" : ")");
}

}  // namespace

// Worth computing once for all rows of a lane, rather than in every row.
bool CudaWriter::costs_much(int32_t n) const {
  const Node &x = node(n);
  if (x.op == Op::Load || x.op == Op::FloorDiv || x.op == Op::Mod || x.op == Op::Div) return true;
  if (x.num_operands == 1 && x.type == Type::f32 && x.op != Op::Neg && x.op != Op::Abs && x.op != Op::ToF32)
    return true;
  for (const int32_t m : x.inputs()) {
    if (of_key(m) && costs_much(m)) return true;
  }
  return false;
}

bool CudaWriter::exact_as_real(int32_t n) const {
  const Node &x = node(n);
  if (wide_ || x.type != Type::i32 || !ranges_[static_cast<size_t>(n)].within(kExactFloat)) return false;
  if (x.op == Op::KvIdx || x.op == Op::Const || of_row(n)) return true;
  constexpr Op kExact[] = {Op::Add, Op::Sub, Op::Mul, Op::Neg, Op::Abs, Op::Min, Op::Max};
  bool exact = false;
  for (const Op op : kExact) exact = exact || op == x.op;
  for (const int32_t m : x.inputs()) exact = exact && exact_as_real(m);
  return exact;
}

// A name or literal for the node's value in a part.
std::string CudaWriter::value(Part &part, int32_t n, Form form) {
  if (is_const(n)) return literal(node(n), form);
  const bool each = &part == &each_;
  if (each && of_row(n)) return word(n, form);
  if (each && of_key(n) && form == Form::plain && costs_much(n)) return key_member(n);
  if (const auto known = part.known.find({n, form}); known != part.known.end()) return known->second;
  const std::string text = expression(part, n, form);
  std::string name = "v" + std::to_string(part.statements++);
  part.body += std::string("      const ") + type_name(node(n).type, form) + " " + name + " = " + text + ";\n";
  part.known[{n, form}] = name;
  return name;
}

std::string CudaWriter::expression(Part &part, int32_t n, Form form) {
  if (form == Form::real) return real(part, n);
  if (form == Form::scaled) return scaled(part, n);
  return plain(part, node(n));
}

std::string CudaWriter::real(Part &part, int32_t n) {
  const Node &x = node(n);
  if (x.op == Op::KvIdx) return "kv.first + kv.step";
  // The constant part comes last: the rest is then the same for all keys of a lane.
  if (&part == &each_ && exact_as_real(n) && !of_row(n) && (x.op == Op::Add || x.op == Op::Sub)) {
    const int32_t first = input(x, 0), second = input(x, 1);
    if (node(first).op == Op::KvIdx && of_row(second))
      return "(kv.first " + std::string(x.op == Op::Add ? "+ " : "- ") + value(part, second, Form::real) +
             ") + kv.step";
    if (node(second).op == Op::KvIdx && of_row(first))
      return "(" + value(part, first, Form::real) +
             (x.op == Op::Add ? " + kv.first) + kv.step" : " - kv.first) - kv.step");
  }
  if (&part != &each_ || of_row(n) || !exact_as_real(n))
    return "static_cast<float>(" + value(part, n, Form::plain) + ")";
  const auto in = [&](int32_t m) { return value(part, input(x, m), Form::real); };
  Node as_float = x;
  as_float.type = Type::f32;
  return operation(as_float, in);
}

std::string CudaWriter::scaled(Part &part, int32_t n) {
  const Node &x = node(n);
  const auto in = [&](int32_t m, Form form) { return value(part, input(x, m), form); };
  switch (x.op) {
    case Op::Score:
      return "s";
    case Op::Add:
    case Op::Sub:
      return in(0, Form::scaled) + (x.op == Op::Add ? " + " : " - ") + in(1, Form::scaled);
    case Op::Neg:
      return "-" + in(0, Form::scaled);
    case Op::Where:
      return in(0, Form::plain) + " ? " + in(1, Form::scaled) + " : " + in(2, Form::scaled);
    case Op::Mul:
      // The factor that is there already takes it.
      if (of_row(input(x, 0))) return in(0, Form::scaled) + " * " + in(1, Form::plain);
      if (of_row(input(x, 1))) return in(0, Form::plain) + " * " + in(1, Form::scaled);
      break;
    default:
      break;
  }
  return value(part, n, Form::plain) + " * inverse_scale";
}

std::string CudaWriter::load(Part &part, const Node &x) {
  const std::string tensor = "f.tensors[" + std::to_string(first_tensor_ + x.number) + "]";
  std::string text = std::string("fn::load_") + (x.dtype == DataType::boolean ? "bool" : name(x.dtype)) + "(" + tensor +
                     ", fn::offset(" + tensor;
  for (int32_t d = 0; d < x.num_operands; ++d) text += ", " + index(part, input(x, d), tensor, d);
  return text + "))";
}

// Node `at` as an index of a tensor's dimension.
std::string CudaWriter::index(Part &part, int32_t at, const std::string &tensor, int32_t dimension) {
  const bool from_0 = node(at).type == Type::i32 && ranges_[static_cast<size_t>(at)].low >= 0;
  return std::string("fn::index") + (from_0 ? "_from_0" : "") + "(" + value(part, at, Form::plain) + ", " + tensor +
         ".shape[" + std::to_string(dimension) + "])";
}

// An integer by a constant above 0: a shift and a mask for a power of two, which are exact for negative numbers, too;
// an unsigned division for others where nothing is negative. "": neither.
std::string CudaWriter::division(Part &part, const Node &x) {
  const int32_t divisor = input(x, 1);
  if (x.type != Type::i32 || !is_const(divisor) || node(divisor).value <= 0) return {};
  const int64_t by = node(divisor).value;
  const std::string number = value(part, input(x, 0), Form::plain);
  const bool quotient = x.op == Op::FloorDiv;
  if ((by & (by - 1)) == 0) {
    int32_t shift = 0;
    while ((int64_t{1} << shift) < by) ++shift;
    return number + (quotient ? " >> " + std::to_string(shift) : " & " + std::to_string(by - 1));
  }
  if (ranges_[static_cast<size_t>(input(x, 0))].low < 0) return {};
  return "static_cast<int32_t>(static_cast<uint32_t>(" + number + (quotient ? ") / " : ") % ") + std::to_string(by) +
         "u)";
}

std::string CudaWriter::plain(Part &part, const Node &x) {
  switch (x.op) {
    case Op::Score:
      return "s * scale";
    case Op::KvIdx:
      return "kv.idx";
    case Op::B:
    case Op::H:
    case Op::QIdx:
    case Op::SeqlenQ:
    case Op::SeqlenK:
    case Op::OffsetQ:
    case Op::OffsetK:
      return std::string("r.") + name(x.op);
    case Op::Scalar: {
      const std::string scalar = "f.scalars[" + std::to_string(first_scalar_ + x.number) + "].";
      return std::string("static_cast<") + type_name(x.type, Form::plain) + ">(" + scalar +
             (x.type == Type::f32 ? "real)" : "integer)");
    }
    case Op::Load:
      return load(part, x);
    case Op::ToF32:
      if (exact_as_real(input(x, 0))) return value(part, input(x, 0), Form::real);
      break;
    case Op::FloorDiv:
    case Op::Mod:
      if (const std::string text = division(part, x); !text.empty()) return text;
      break;
    case Op::Div:
      // Within 1 ulp of the quotient, and one instruction.
      if (is_const(input(x, 1)) && std::isnormal(1.0f / node(input(x, 1)).real()))
        return value(part, input(x, 0), Form::plain) + " * " + literal(1.0f / node(input(x, 1)).real());
      break;
    default:
      break;
  }
  return operation(x, [&](int32_t m) { return value(part, input(x, m), Form::plain); });
}

std::string CudaWriter::operation(const Node &x, const std::function<std::string(int32_t)> &in) const {
  const bool is_bool = x.type == Type::boolean, is_float = x.type == Type::f32;
  const auto infix = [&](const char *sign) { return in(0) + " " + sign + " " + in(1); };
  switch (x.op) {
    case Op::Add:
      if (is_float) return infix("+");
      break;
    case Op::Sub:
      if (is_float) return infix("-");
      break;
    case Op::Mul:
      if (is_float) return infix("*");
      break;
    case Op::Neg:
      if (is_float) return "-" + in(0);
      break;
    case Op::And:
      return infix(is_bool ? "&&" : "&");
    case Op::Or:
      return infix(is_bool ? "||" : "|");
    case Op::Xor:
      return infix(is_bool ? "!=" : "^");
    case Op::Lt:
      return infix("<");
    case Op::Le:
      return infix("<=");
    case Op::Gt:
      return infix(">");
    case Op::Ge:
      return infix(">=");
    case Op::Eq:
      return infix("==");
    case Op::Ne:
      return infix("!=");
    case Op::Not:
      return (is_bool ? "!" : "~") + in(0);
    case Op::Where:
      return in(0) + " ? " + in(1) + " : " + in(2);
    case Op::ToBool:
      return in(0) + " != 0";
    case Op::ToF32:
      return "static_cast<float>(" + in(0) + ")";
    default:
      break;
  }
  std::string text = std::string("fn::") + name(x.op) + "(";
  for (int32_t m = 0; m < x.num_operands; ++m) text += (m > 0 ? ", " : "") + in(m);
  return text + ")";
}

}  // namespace flashspark::graph
