#include "graph/cuda_source.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "graph/range.hpp"

namespace flashspark::graph {
namespace {

constexpr double kExactFloat = 0x1p24;  // integers up to it are exact as floats

// The form in which an expression wants a node's value.
enum class Form {
  plain,   // as the node's type
  real,    // an integer as the float of equal value: where kv_idx - q_idx becomes a float, it takes no conversion
  scaled,  // a float divided by softmax_scale, as Q K^T gives scores: sums hand the factor on to where it costs nothing
};

const char *type_name(Type type, Form form) {
  if (form != Form::plain || type == Type::f32) return "float";
  return type == Type::boolean ? "bool" : (type == Type::i32 ? "int32_t" : "int64_t");
}

std::string literal(float x) {
  if (std::isnan(x)) return "fn::nan()";
  if (std::isinf(x)) return x > 0 ? "fn::infinity()" : "(-fn::infinity())";
  char text[48];
  std::snprintf(text, sizeof text, std::signbit(x) ? "(%af)" : "%af", static_cast<double>(x));
  return text;
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

// Parameters of the functions that are written.
constexpr const char *kArguments = "[[maybe_unused]] const FunctionArguments &f",
                     *kPosition = "[[maybe_unused]] const FunctionKey &kv",
                     *kRowAndKey = "[[maybe_unused]] const uint32_t *w, [[maybe_unused]] const Key &at",
                     *kScore =
                         "[[maybe_unused]] float s, [[maybe_unused]] float scale, [[maybe_unused]] float inverse_scale";

// One function: its three parts, row(), key() and apply() or keep().
class Writer {
 public:
  Writer(const Graph &graph, int32_t first_tensor, int32_t first_scalar, bool wide_positions)
      : g_(graph),
        first_tensor_(first_tensor),
        first_scalar_(first_scalar),
        wide_(wide_positions),
        ranges_(ranges(graph, wide_positions ? 0x1p30 : 0x1p23)) {}

  // The members of struct Score or Mask.
  std::string members(bool is_score);
  // The members of struct Score of a backward kernel; the graph is that of `score`.
  std::string gradient_members(const ScoreGradients &score);
  int32_t words() const { return words_; }

 private:
  // Where statements go. A value is computed once in each part.
  struct Part {
    std::string body;
    std::map<std::pair<int32_t, Form>, std::string> known;
    int32_t statements = 0;
  };

  const Node &node(int32_t n) const { return g_.nodes[static_cast<size_t>(n)]; }
  int32_t input(const Node &x, int32_t n) const { return x.operands[static_cast<size_t>(n)]; }
  bool is_const(int32_t n) const { return node(n).op == Op::Const; }
  bool of_row(int32_t n) const { return (node(n).depends & (kDependsScore | kDependsKv)) == 0; }
  bool of_key(int32_t n) const { return node(n).depends == kDependsKv; }
  bool costs_much(int32_t n) const;
  bool exact_as_real(int32_t n) const;

  std::string value(Part &part, int32_t n, Form form);
  std::string expression(Part &part, int32_t n, Form form);
  std::string plain(Part &part, const Node &x);
  std::string real(Part &part, int32_t n);
  std::string scaled(Part &part, int32_t n);
  std::string load(Part &part, const Node &x);
  std::string index(Part &part, int32_t at, const std::string &tensor, int32_t dimension);
  std::string division(Part &part, const Node &x);
  std::string operation(const Node &x, const std::function<std::string(int32_t)> &in) const;
  std::string word(int32_t n, Form form);
  std::string key_member(int32_t n);
  struct Linear {
    std::string first, step;
  };
  std::string first_members() const;
  std::string sum(int32_t n);
  void add_terms(int32_t n, bool negative, std::vector<std::pair<int32_t, bool>> &terms) const;
  std::optional<Linear> linear_in_key(int32_t n, Form form);

  const Graph &g_;
  int32_t first_tensor_, first_scalar_;
  bool wide_;
  std::vector<Range> ranges_;
  Part row_, key_, each_;
  std::string key_fields_, key_names_, offset_;
  bool is_bias_ = false;  // whether the function adds to the score what does not depend on it
  int32_t words_ = 0;
};

// Worth computing once for all rows of a lane, rather than in every row.
bool Writer::costs_much(int32_t n) const {
  const Node &x = node(n);
  if (x.op == Op::Load || x.op == Op::FloorDiv || x.op == Op::Mod || x.op == Op::Div) return true;
  if (x.num_operands == 1 && x.type == Type::f32 && x.op != Op::Neg && x.op != Op::Abs && x.op != Op::ToF32)
    return true;
  for (const int32_t m : x.inputs()) {
    if (of_key(m) && costs_much(m)) return true;
  }
  return false;
}

bool Writer::exact_as_real(int32_t n) const {
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
std::string Writer::value(Part &part, int32_t n, Form form) {
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

std::string Writer::expression(Part &part, int32_t n, Form form) {
  if (form == Form::real) return real(part, n);
  if (form == Form::scaled) return scaled(part, n);
  return plain(part, node(n));
}

std::string Writer::real(Part &part, int32_t n) {
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

std::string Writer::scaled(Part &part, int32_t n) {
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

std::string Writer::load(Part &part, const Node &x) {
  const std::string tensor = "f.tensors[" + std::to_string(first_tensor_ + x.number) + "]";
  std::string text = std::string("fn::load_") + (x.dtype == DataType::boolean ? "bool" : name(x.dtype)) + "(" + tensor +
                     ", fn::offset(" + tensor;
  for (int32_t d = 0; d < x.num_operands; ++d) text += ", " + index(part, input(x, d), tensor, d);
  return text + "))";
}

// Node `at` as an index of a tensor's dimension.
std::string Writer::index(Part &part, int32_t at, const std::string &tensor, int32_t dimension) {
  const bool from_0 = node(at).type == Type::i32 && ranges_[static_cast<size_t>(at)].low >= 0;
  return std::string("fn::index") + (from_0 ? "_from_0" : "") + "(" + value(part, at, Form::plain) + ", " + tensor +
         ".shape[" + std::to_string(dimension) + "])";
}

// An integer by a constant above 0: a shift and a mask for a power of two, which are exact for negative numbers, too;
// an unsigned division for others where nothing is negative. "": neither.
std::string Writer::division(Part &part, const Node &x) {
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

std::string Writer::plain(Part &part, const Node &x) {
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

std::string Writer::operation(const Node &x, const std::function<std::string(int32_t)> &in) const {
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

// A value of the row, through its words.
std::string Writer::word(int32_t n, Form form) {
  if (const auto known = each_.known.find({n, form}); known != each_.known.end()) return known->second;
  const bool is_float = form != Form::plain || node(n).type == Type::f32,
             is_long = !is_float && node(n).type == Type::i64;
  const std::string first = std::to_string(words_), second = std::to_string(words_ + 1);
  const std::string source = value(row_, n, form);
  std::string use;
  if (is_float) {
    row_.body += "      w[" + first + "] = ptx::as_word(" + source + ");\n";
    use = "ptx::as_float(w[" + first + "])";
  } else if (is_long) {
    row_.body += "      w[" + first + "] = static_cast<uint32_t>(" + source + ");\n";
    row_.body += "      w[" + second + "] = static_cast<uint32_t>(" + source + " >> 32);\n";
    use = "static_cast<int64_t>(static_cast<uint64_t>(w[" + second + "]) << 32 | w[" + first + "])";
  } else {
    row_.body += "      w[" + first + "] = static_cast<uint32_t>(" + source + ");\n";
    use = node(n).type == Type::boolean ? "(w[" + first + "] != 0)" : "static_cast<int32_t>(w[" + first + "])";
  }
  words_ += is_long ? 2 : 1;
  return each_.known[{n, form}] = use;
}

// A value of the key, through Key.
std::string Writer::key_member(int32_t n) {
  if (const auto known = each_.known.find({n, Form::plain}); known != each_.known.end()) return known->second;
  const std::string field = "k" + std::to_string(n);
  const std::string source = value(key_, n, Form::plain);
  key_fields_ += std::string(" ") + type_name(node(n).type, Form::plain) + " " + field + ";";
  key_names_ += (key_names_.empty() ? "" : ", ") + source;
  return each_.known[{n, Form::plain}] = "at." + field;
}

// The function as a sum. Its terms go where they cost least: into offset_, what is the same for all of a lane's scores
// of a row; kv_idx times a number of the row goes into both, since a lane's keys are a first one plus constants.
std::string Writer::sum(int32_t n) {
  std::vector<std::pair<int32_t, bool>> terms;
  add_terms(n, false, terms);
  std::string rest;
  std::vector<std::pair<std::string, bool>> steps;
  const auto is_score = [&](const std::pair<int32_t, bool> &term) {
    return node(term.first).op == Op::Score && !term.second;
  };
  const auto score = std::find_if(terms.begin(), terms.end(), is_score);
  if (score != terms.end()) {
    const int32_t added = score->first;
    terms.erase(score);
    is_bias_ = std::none_of(terms.begin(), terms.end(),
                            [&](const auto &term) { return (node(term.first).depends & kDependsScore) != 0; });
    if (!is_bias_) terms.emplace(terms.begin(), added, false);
  }
  const auto add = [](std::string &to, bool negative, const std::string &text) {
    to += (negative ? " - " : (to.empty() ? "" : " + ")) + text;
  };
  for (const auto &[term, negative] : terms) {
    if (of_row(term)) {
      add(offset_, negative, value(each_, term, Form::scaled));
    } else if (const auto linear = linear_in_key(term, Form::scaled)) {
      add(offset_, negative, linear->first);
      steps.emplace_back(linear->step, negative);
    } else {
      add(rest, negative, value(each_, term, Form::scaled));
    }
  }
  for (const auto &[step, negative] : steps) add(rest, negative, step);
  return rest.empty() ? "0.0f" : rest;
}

// A float's terms and whether they are subtracted.
void Writer::add_terms(int32_t n, bool negative, std::vector<std::pair<int32_t, bool>> &terms) const {
  const Node &x = node(n);
  const bool is_sum = x.op == Op::Add || x.op == Op::Sub;
  if (of_row(n) || x.type != Type::f32 || !(is_sum || x.op == Op::Neg)) {
    terms.emplace_back(n, negative);
    return;
  }
  add_terms(input(x, 0), negative != (x.op == Op::Neg), terms);
  if (is_sum) add_terms(input(x, 1), negative != (x.op == Op::Sub), terms);
}

// A float that is a number of the row times kv_idx plus another one, by its value at the lane's first key, and by what
// a further key adds.
std::optional<Writer::Linear> Writer::linear_in_key(int32_t n, Form form) {
  const Node &x = node(n);
  if (x.op == Op::Mul && x.type == Type::f32) {
    for (const int32_t m : {0, 1}) {
      if (!of_row(input(x, m))) continue;
      const auto other = linear_in_key(input(x, 1 - m), Form::plain);
      if (!other) return std::nullopt;
      const std::string factor = value(each_, input(x, m), form);
      return Linear{factor + " * (" + other->first + ")", factor + " * (" + other->step + ")"};
    }
    return std::nullopt;
  }
  if (x.op != Op::ToF32 || !exact_as_real(input(x, 0))) return std::nullopt;
  const std::string factor = form == Form::scaled ? " * inverse_scale" : "";
  const Node &key = node(input(x, 0));
  if (key.op == Op::KvIdx) return Linear{"first" + factor, "kv.step" + factor};
  if (key.op != Op::Add && key.op != Op::Sub) return std::nullopt;
  const int32_t a = input(key, 0), b = input(key, 1);
  const std::string sign = key.op == Op::Add ? " + " : " - ";
  if (node(a).op == Op::KvIdx && of_row(b))
    return Linear{"(first" + sign + value(each_, b, Form::real) + ")" + factor, "kv.step" + factor};
  if (node(b).op == Op::KvIdx && of_row(a))
    return Linear{"(" + value(each_, a, Form::real) + sign + "first)" + factor,
                  (key.op == Op::Add ? "kv.step" : "-kv.step") + factor};
  return std::nullopt;
}

// What comes before the function itself, whose own part is written.
std::string Writer::first_members() const {
  return "    static constexpr bool kExists = true, kUsesKeys = " +
         std::string(key_fields_.empty() ? "false" : "true") +
         ", kHasOffset = " + (offset_.empty() ? "false" : "true") + ", kIsBias = " + (is_bias_ ? "true" : "false") +
         ";\n    static constexpr int32_t kOperations = " + std::to_string(each_.statements) +
         ";\n    static constexpr int32_t kWords = " + std::to_string(words_) +
         ";\n    static FLASHSPARK_DEVICE void row(" + kArguments +
         ", [[maybe_unused]] const FunctionRow &r, [[maybe_unused]] float inverse_scale, [[maybe_unused]] uint32_t *w) "
         "{\n" +
         row_.body + "    }\n" + "    struct Key {" + key_fields_ + " };\n    static FLASHSPARK_DEVICE Key key(" +
         kArguments + ", " + kPosition + ") {\n" + key_.body + "      return {" + key_names_ + "};\n    }\n";
}

std::string Writer::members(bool is_score) {
  const std::string result = is_score ? sum(g_.results[0]) : value(each_, g_.results[0], Form::plain);
  const std::string each = std::string(kArguments) + ", " + kRowAndKey + ", ";
  return first_members() + "    static FLASHSPARK_DEVICE " +
         (is_score ? "float apply(" + each + kScore + ", " : "bool keep(" + each) + kPosition + ") {\n" + each_.body +
         "      return " + result + ";\n    }\n" +
         (offset_.empty() ? ""
                          : "    static FLASHSPARK_DEVICE float offset(" + std::string(kArguments) +
                                ", [[maybe_unused]] const uint32_t *w, [[maybe_unused]] float inverse_scale, "
                                "[[maybe_unused]] float first) {\n      return " +
                                offset_ + ";\n    }\n");
}

std::string Writer::gradient_members(const ScoreGradients &score) {
  const std::string loads = std::to_string(score.loads.size());
  std::string results, places = "PlaceBy::head";
  size_t next = 0;
  const auto result = [&] { return g_.results[next++]; };
  const auto assign = [&](const std::string &to, const std::string &text) {
    results += "      y." + to + " = " + text + ";\n";
  };
  assign("value", value(each_, result(), Form::plain));
  assign("by_score", value(each_, result(), Form::plain));
  for (size_t n = 0; n < score.loads.size(); ++n) {
    const std::string at = "[" + std::to_string(n) + "]", to = "g[" + std::to_string(score.loads[n].tensor) + "]";
    const std::string tensor = "f.tensors[" + std::to_string(first_tensor_ + score.loads[n].tensor) + "]";
    assign("slopes" + at, value(each_, result(), Form::plain));
    std::string offset = "fn::offset(" + to;
    uint8_t depends = 0;
    for (int32_t d = 0; d < score.loads[n].rank; ++d) {
      const int32_t node_of_index = result();
      depends |= node(node_of_index).depends;
      offset += ", " + index(each_, node_of_index, tensor, d);
    }
    assign("places" + at, to + ".data + " + offset + ")");
    const bool of_row = (depends & kDependsQ) != 0, of_key = (depends & kDependsKv) != 0;
    const char *by = (depends & kDependsScore) != 0 || (of_row && of_key) ? "score"
                     : of_row                                             ? "row"
                     : of_key                                             ? "key"
                                                                          : "head";
    places = "n == " + std::to_string(n) + " ? PlaceBy::" + by + " : " + places;
  }
  return first_members() + "    static constexpr int32_t kLoads = " + loads +
         ";\n    static FLASHSPARK_DEVICE constexpr PlaceBy place_by([[maybe_unused]] int32_t n) { return " + places +
         "; }\n    static FLASHSPARK_DEVICE ScoreGradients<kLoads> apply(" + kArguments +
         ", [[maybe_unused]] const CapturedGradient *g, " + kRowAndKey + ", " + kScore + ", " + kPosition + ") {\n" +
         each_.body + "      ScoreGradients<kLoads> y;\n" + results + "      return y;\n    }\n";
}

constexpr const char *kNoMembers =
    "    static constexpr bool kExists = false, kUsesKeys = false, kHasOffset = false, kIsBias = false;\n"
    "    static constexpr int32_t kOperations = 0, kWords = 0, kLoads = 0;\n"
    "    static FLASHSPARK_DEVICE void row(const FunctionArguments &, const FunctionRow &, float, uint32_t *) {}\n"
    "    struct Key {};\n"
    "    static FLASHSPARK_DEVICE Key key(const FunctionArguments &, const FunctionKey &) { return {}; }\n";

// The functions of a kernel, one after the other: captured tensors and scalars of the second follow those of the first.
class SourceWriter {
 public:
  explicit SourceWriter(const CudaSourceOptions &options) : options_(options) {
    source_.text = "namespace flashspark {\n\nstruct UserFunctions {\n";
  }

  // graph: NULL where there is no such function. members(writer): what the type has.
  template <class Members>
  void add(const char *type, const Graph *graph, Members members, const char *also_without = "") {
    source_.text += std::string("  struct ") + type + " {\n";
    if (graph == nullptr) {
      source_.text += std::string(kNoMembers) + also_without;
    } else {
      Writer writer(*graph, tensors_, scalars_, options_.wide_positions);
      source_.text += members(writer);
      source_.row_words += writer.words();
      tensors_ += graph->num_tensors;
      scalars_ += graph->num_scalars;
    }
    source_.text += "  };\n";
  }

  CudaSource finish() {
    source_.text += "};\n\n}  // namespace flashspark\n";
    return std::move(source_);
  }

 private:
  CudaSourceOptions options_;
  CudaSource source_;
  int32_t tensors_ = 0, scalars_ = 0;
};

}  // namespace

CudaSource cuda_source(const Graph *score, const Graph *mask, const CudaSourceOptions &options) {
  SourceWriter source(options);
  source.add("Score", score, [](Writer &writer) { return writer.members(true); });
  source.add("Mask", mask, [](Writer &writer) { return writer.members(false); });
  return source.finish();
}

CudaSource cuda_gradient_source(const ScoreGradients *score, const Graph *mask, const CudaSourceOptions &options) {
  SourceWriter source(options);
  source.add(
      "Score", score != nullptr ? &score->graph : nullptr,
      [&](Writer &writer) { return writer.gradient_members(*score); },
      "    static FLASHSPARK_DEVICE constexpr PlaceBy place_by(int32_t) { return PlaceBy::head; }\n");
  source.add("Mask", mask, [](Writer &writer) { return writer.members(false); });
  return source.finish();
}

}  // namespace flashspark::graph
