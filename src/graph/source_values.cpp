#include "graph/source_values.hpp"

#include <array>
#include <charconv>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numbers>
#include <string>

#include "graph/range.hpp"

namespace flashspark::graph {
namespace {

struct Function {
  std::string_view name;
  int32_t operands;
  Op op;  // of all floats; else one of those below
};
constexpr Op kComposed = Op::Score;  // no operation of its own
constexpr std::array kFunctions = {
    Function{"exp", 1, Op::Exp},     Function{"exp2", 1, Op::Exp2},   Function{"expm1", 1, Op::Expm1},
    Function{"log", 1, Op::Log},     Function{"log2", 1, Op::Log2},   Function{"log1p", 1, Op::Log1p},
    Function{"sqrt", 1, Op::Sqrt},   Function{"rsqrt", 1, Op::Rsqrt}, Function{"sin", 1, Op::Sin},
    Function{"cos", 1, Op::Cos},     Function{"tan", 1, Op::Tan},     Function{"asin", 1, Op::Asin},
    Function{"acos", 1, Op::Acos},   Function{"atan", 1, Op::Atan},   Function{"sinh", 1, Op::Sinh},
    Function{"cosh", 1, Op::Cosh},   Function{"tanh", 1, Op::Tanh},   Function{"sigmoid", 1, Op::Sigmoid},
    Function{"erf", 1, Op::Erf},     Function{"floor", 1, Op::Floor}, Function{"ceil", 1, Op::Ceil},
    Function{"trunc", 1, Op::Trunc}, Function{"rint", 1, Op::Round},  Function{"nearbyint", 1, Op::Round},
    Function{"isnan", 1, Op::IsNan}, Function{"isinf", 1, Op::IsInf}, Function{"fabs", 1, Op::Abs},
    Function{"pow", 2, Op::Pow},     Function{"atan2", 2, Op::Atan2}, Function{"fdivide", 2, Op::Div},
    Function{"abs", 1, kComposed},   Function{"round", 1, kComposed}, Function{"isfinite", 1, kComposed},
    Function{"min", 2, kComposed},   Function{"max", 2, kComposed},   Function{"fmin", 2, kComposed},
    Function{"fmax", 2, kComposed},  Function{"fmod", 2, kComposed},  Function{"fma", 3, kComposed},
    Function{"clamp", 3, kComposed}};

const Function *find(std::string_view name) {
  if (name.starts_with("__")) name.remove_prefix(2);
  for (const bool single : {false, true}) {
    if (single && !name.ends_with('f')) break;
    if (single) name.remove_suffix(1);
    for (const Function &function : kFunctions) {
      if (function.name == name) return &function;
    }
  }
  return nullptr;
}

struct Operator {
  std::string_view symbol;
  Op op;
};
constexpr std::array kOperators = {Operator{"+", Op::Add},  Operator{"-", Op::Sub},  Operator{"*", Op::Mul},
                                   Operator{"/", Op::Div},  Operator{"%", Op::Mod},  Operator{"<", Op::Lt},
                                   Operator{"<=", Op::Le},  Operator{">", Op::Gt},   Operator{">=", Op::Ge},
                                   Operator{"==", Op::Eq},  Operator{"!=", Op::Ne},  Operator{"<<", Op::Shl},
                                   Operator{">>", Op::Shr}, Operator{"&", Op::And},  Operator{"|", Op::Or},
                                   Operator{"^", Op::Xor},  Operator{"&&", Op::And}, Operator{"||", Op::Or}};

}  // namespace

int32_t SourceValues::number(Type type, int32_t value) {
  return type == Type::f32 ? graph_.add_const(static_cast<float>(value)) : graph_.add_const(type, value);
}

int32_t SourceValues::converted(int32_t node, Type to) {
  if (type(node) == to) return node;
  constexpr std::array kOps = {Op::ToBool, Op::ToI32, Op::ToI64, Op::ToF32};
  return graph_.add(kOps[static_cast<size_t>(to)], {node});
}

// In arithmetic a bool is an int.
int32_t SourceValues::promoted(int32_t node) {
  return type(node) == Type::boolean ? converted(node, Type::i32) : node;
}

Type SourceValues::common(int32_t a, int32_t b) const {
  const Type wider = std::max(type(a), type(b));  // bool, i32, i64, f32
  return wider == Type::boolean ? Type::i32 : wider;
}

int32_t SourceValues::integer_literal(const Token &token) {
  std::string_view digits = token.text;
  const bool hex = digits.starts_with("0x") || digits.starts_with("0X");
  if (hex) digits.remove_prefix(2);
  int64_t value = 0;
  const char *begin = std::to_address(digits.begin()), *end = std::to_address(digits.end());
  const auto [stop, failure] = std::from_chars(begin, end, value, hex ? 16 : 10);
  const std::string_view suffix(stop, static_cast<size_t>(end - stop));
  const bool is_long = suffix == "l" || suffix == "L" || suffix == "ll" || suffix == "LL";
  if (failure != std::errc() || (!suffix.empty() && !is_long))
    refuse_source(token.line, shown(token) + " is no signed integer of at most 64 bits");
  if (!hex && digits.size() > 1 && digits[0] == '0' && stop - begin > 1)
    refuse_source(token.line, shown(token) + ": octal numbers are not supported");
  const bool wide = is_long || value > std::numeric_limits<int32_t>::max();
  return graph_.add_const(wide ? Type::i64 : Type::i32, value);
}

int32_t SourceValues::real_literal(const Token &token) {
  const std::string text(token.text);
  char *stop = nullptr;
  const float value = std::strtof(text.c_str(), &stop);
  const std::string_view suffix(stop);
  if (stop == text.c_str() || (!suffix.empty() && suffix != "f" && suffix != "F"))
    refuse_source(token.line, shown(token) + " is no number");
  return graph_.add_const(value);
}

int32_t SourceValues::constant(std::string_view name) {
  if (name == "true" || name == "false") return graph_.add_const(Type::boolean, name == "true" ? 1 : 0);
  if (name == "INFINITY" || name == "CUDART_INF_F") return graph_.add_const(std::numeric_limits<float>::infinity());
  if (name == "NAN" || name == "CUDART_NAN_F") return graph_.add_const(std::numeric_limits<float>::quiet_NaN());
  if (name == "FLT_MAX") return graph_.add_const(std::numeric_limits<float>::max());
  if (name == "M_PI") return graph_.add_const(std::numbers::pi_v<float>);
  if (name == "M_E") return graph_.add_const(std::numbers::e_v<float>);
  return -1;
}

int32_t SourceValues::unary(std::string_view symbol, int32_t operand, int32_t line) {
  if (symbol == "!") return graph_.add(Op::Not, {converted(operand, Type::boolean)});
  const int32_t x = promoted(operand);
  if (symbol == "+") return x;
  if (symbol == "-") return graph_.add(Op::Neg, {x});
  if (type(x) == Type::f32) refuse_source(line, "`~` of a float");
  return graph_.add(Op::Not, {x});
}

int32_t SourceValues::arithmetic(Op op, int32_t a, int32_t b) {
  const Type type = common(a, b);
  return graph_.add(op, {converted(a, type), converted(b, type)});
}

int32_t SourceValues::binary(std::string_view symbol, int32_t a, int32_t b, int32_t line) {
  Op op = Op::Const;
  for (const Operator &each : kOperators) {
    if (each.symbol == symbol) op = each.op;
  }
  const bool floats = type(a) == Type::f32 || type(b) == Type::f32;
  const bool both_bool = type(a) == Type::boolean && type(b) == Type::boolean;
  if (symbol == "&&" || symbol == "||")
    return graph_.add(op, {converted(a, Type::boolean), converted(b, Type::boolean)});
  if (both_bool && (op == Op::And || op == Op::Or || op == Op::Xor || op == Op::Eq || op == Op::Ne))
    return graph_.add(op, {a, b});
  const bool needs_integers = op == Op::Mod || (op >= Op::And && op <= Op::Shr);
  if (floats && needs_integers)
    refuse_source(line, "`" + std::string(symbol) + "` of a float" + (op == Op::Mod ? ": write fmodf(a, b)" : ""));
  if (op == Op::Shl || op == Op::Shr) return shift(op, promoted(a), promoted(b));
  if (!floats && (op == Op::Div || op == Op::Mod)) return whole_division(op, a, b);
  return arithmetic(op, a, b);
}

// The result has the type of the left operand.
int32_t SourceValues::shift(Op op, int32_t a, int32_t b) {
  return graph_.add(op, {a, converted(b, type(a))});
}

bool SourceValues::never_negative(int32_t a, int32_t b) const {
  const std::vector<Range> known = ranges(graph_, std::numeric_limits<int32_t>::max());
  return known[static_cast<size_t>(a)].low >= 0 && known[static_cast<size_t>(b)].low >= 0;
}

// Towards 0, as C divides; the graph's operations round down. Of numbers that are never negative both do the same.
int32_t SourceValues::whole_division(Op op, int32_t a, int32_t b) {
  const Type type = common(a, b);
  a = converted(a, type), b = converted(b, type);
  const int32_t quotient = op == Op::Div ? graph_.add(Op::FloorDiv, {a, b}) : -1;
  const int32_t rest = graph_.add(Op::Mod, {a, b});
  if (never_negative(a, b)) return op == Op::Div ? quotient : rest;
  const int32_t zero = number(type, 0);
  const int32_t signs_differ = graph_.add(Op::Xor, {graph_.add(Op::Lt, {a, zero}), graph_.add(Op::Lt, {b, zero})});
  const int32_t off = graph_.add(Op::And, {graph_.add(Op::Ne, {rest, zero}), signs_differ});
  if (op == Op::Div) return graph_.add(Op::Add, {quotient, converted(off, type)});
  return graph_.add(Op::Sub, {rest, graph_.add(Op::Where, {off, b, zero})});
}

int32_t SourceValues::select(int32_t condition, int32_t a, int32_t b) {
  const bool both_bool = type(a) == Type::boolean && type(b) == Type::boolean;
  const Type to = both_bool ? Type::boolean : common(a, b);
  return graph_.add(Op::Where, {converted(condition, Type::boolean), converted(a, to), converted(b, to)});
}

bool SourceValues::is_function(std::string_view name) {
  return find(name) != nullptr;
}

// C's round(): halves away from 0.
int32_t SourceValues::rounded_from_zero(int32_t x) {
  const int32_t whole = graph_.add(Op::Trunc, {x});
  const int32_t rest = graph_.add(Op::Abs, {graph_.add(Op::Sub, {x, whole})});
  const int32_t away = graph_.add(Op::Add, {whole, graph_.add(Op::Sign, {x})});
  return graph_.add(Op::Where, {graph_.add(Op::Ge, {rest, graph_.add_const(0.5f)}), away, whole});
}

// With the sign of the dividend; the graph's `mod` has that of the divisor. An infinite divisor changes nothing.
int32_t SourceValues::floating_remainder(int32_t a, int32_t b) {
  const int32_t size = graph_.add(Op::Mod, {graph_.add(Op::Abs, {a}), graph_.add(Op::Abs, {b})});
  const int32_t negative = graph_.add(Op::Lt, {a, number(Type::f32, 0)});
  const int32_t rest = graph_.add(Op::Where, {negative, graph_.add(Op::Neg, {size}), size});
  return graph_.add(Op::Where, {graph_.add(Op::IsInf, {b}), a, rest});
}

// fminf, fmaxf: a NaN gives way to a number.
int32_t SourceValues::number_of_both(Op op, int32_t a, int32_t b) {
  const int32_t either = graph_.add(op, {a, b});
  const int32_t without_b = graph_.add(Op::Where, {graph_.add(Op::IsNan, {b}), a, either});
  return graph_.add(Op::Where, {graph_.add(Op::IsNan, {a}), b, without_b});
}

int32_t SourceValues::call(std::string_view name, Operands operands, int32_t line) {
  const Function &function = *find(name);
  if (operands.size() != static_cast<size_t>(function.operands)) {
    refuse_source(line, "`" + std::string(name) + "` takes " + std::to_string(function.operands) + " arguments, not " +
                            std::to_string(operands.size()));
  }
  std::array<int32_t, 3> x = {-1, -1, -1};
  const bool keeps_integers =
      function.name == "abs" || function.name == "min" || function.name == "max" || function.name == "clamp";
  Type to = keeps_integers ? Type::i32 : Type::f32;
  for (const int32_t operand : operands) to = std::max(to, type(operand));
  for (size_t n = 0; n < operands.size(); ++n) x[n] = converted(operands[n], to);
  if (function.op != kComposed) return graph_.add(function.op, std::span(x).first(operands.size()));
  if (function.name == "abs") return graph_.add(Op::Abs, {x[0]});
  if (function.name == "min") return graph_.add(Op::Min, {x[0], x[1]});
  if (function.name == "max") return graph_.add(Op::Max, {x[0], x[1]});
  if (function.name == "clamp") return graph_.add(Op::Min, {graph_.add(Op::Max, {x[0], x[1]}), x[2]});
  if (function.name == "fmin") return number_of_both(Op::Min, x[0], x[1]);
  if (function.name == "fmax") return number_of_both(Op::Max, x[0], x[1]);
  if (function.name == "fmod") return floating_remainder(x[0], x[1]);
  if (function.name == "fma") return graph_.add(Op::Add, {graph_.add(Op::Mul, {x[0], x[1]}), x[2]});
  if (function.name == "round") return rounded_from_zero(x[0]);
  const int32_t special = graph_.add(Op::Or, {graph_.add(Op::IsNan, {x[0]}), graph_.add(Op::IsInf, {x[0]})});
  return graph_.add(Op::Not, {special});  // isfinite
}

}  // namespace flashspark::graph
