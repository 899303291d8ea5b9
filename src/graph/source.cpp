#include "graph/source.hpp"

#include <algorithm>
#include <array>
#include <optional>

#include "graph/source_parser.hpp"

namespace flashspark::graph {
namespace {

struct NamedType {
  std::string_view name;
  DataType dtype;
};
// Of one word. `double` values are computed as floats, as on a GPU.
constexpr std::array kTypes = {NamedType{"bool", DataType::boolean},  NamedType{"_Bool", DataType::boolean},
                               NamedType{"uint8_t", DataType::u8},    NamedType{"int8_t", DataType::i8},
                               NamedType{"int16_t", DataType::i16},   NamedType{"int", DataType::i32},
                               NamedType{"int32_t", DataType::i32},   NamedType{"int64_t", DataType::i64},
                               NamedType{"__half", DataType::f16},    NamedType{"half", DataType::f16},
                               NamedType{"_Float16", DataType::f16},  NamedType{"__nv_bfloat16", DataType::bf16},
                               NamedType{"bfloat16", DataType::bf16}, NamedType{"__bf16", DataType::bf16},
                               NamedType{"float", DataType::f32},     NamedType{"double", DataType::f64}};
constexpr std::array<std::string_view, 11> kQualifiers = {"const",    "constexpr",    "static",    "inline",
                                                          "extern",   "__device__",   "__host__",  "__forceinline__",
                                                          "restrict", "__restrict__", "__restrict"};
constexpr std::array<std::string_view, 3> kIntegerWords = {"long", "short", "signed"};

struct NamedInput {
  std::string_view name;
  Op op;
};
constexpr std::array kFurtherInputs = {NamedInput{"seqlen_q", Op::SeqlenQ}, NamedInput{"seqlen_k", Op::SeqlenK},
                                       NamedInput{"offset_q", Op::OffsetQ}, NamedInput{"offset_k", Op::OffsetK}};

template <class List>
bool has(const List &list, std::string_view word) {
  return std::find(list.begin(), list.end(), word) != list.end();
}

std::optional<DataType> type_named(std::string_view name) {
  for (const NamedType &type : kTypes) {
    if (type.name == name) return type.dtype;
  }
  return std::nullopt;
}

}  // namespace

bool SourceParser::is_type(size_t ahead) const {
  const Token &token = tokens_.peek(ahead);
  if (token.kind != Token::Kind::name) return false;
  return type_named(token.text) || has(kQualifiers, token.text) || has(kIntegerWords, token.text) ||
         token.text == "auto" || token.text == "unsigned" || (token.text == "std" && is_type(ahead + 2));
}

void SourceParser::skip_qualifiers(Written &type) {
  while (has(kQualifiers, tokens_.peek().text)) {
    const std::string_view word = tokens_.next().text;
    type.is_const = type.is_const || word == "const" || word == "constexpr";
  }
}

DataType SourceParser::base_type() {
  const int32_t line = tokens_.line();
  if (tokens_.take("std")) tokens_.expect("::");
  const Token &first = tokens_.next();
  if (const auto named = type_named(first.text)) return *named;
  if (first.text == "unsigned") {
    if (tokens_.take("char")) return DataType::u8;
    refuse_source(line, "unsigned integers are not supported, but for tensors of unsigned char");
  }
  if (!has(kIntegerWords, first.text)) refuse_source(line, shown(first) + ": must be a type");
  if (first.text == "signed" && tokens_.take("char")) return DataType::i8;
  DataType dtype = first.text == "short" ? DataType::i16 : first.text == "long" ? DataType::i64 : DataType::i32;
  while (has(kIntegerWords, tokens_.peek().text)) {
    if (tokens_.next().text == "long") dtype = DataType::i64;
  }
  tokens_.take("int");
  return dtype;
}

SourceParser::Written SourceParser::written_type() {
  Written type;
  skip_qualifiers(type);
  if (tokens_.take("auto")) {
    type.is_auto = true;
  } else {
    type.dtype = base_type();
  }
  skip_qualifiers(type);
  type.is_pointer = tokens_.take("*");
  skip_qualifiers(type);
  return type;
}

void SourceParser::declare(const SourceVariable &variable, int32_t line) {
  if (SourceValues::is_function(variable.name) || values_.constant(variable.name) >= 0)
    refuse_source(line, "`" + std::string(variable.name) + "` has a meaning already");
  state_.variables.push_back(variable);
}

// A parameter behind the positions: a tensor, a number that calls give, or a length by its name.
void SourceParser::captured_parameter(const Written &type, std::string_view name, int32_t line) {
  const bool is_tensor = type.is_pointer || tokens_.take("[");
  if (is_tensor && !type.is_pointer) tokens_.expect("]");
  SourceVariable variable{name, SourceVariable::Kind::value, type_of(type.dtype), -1, -1, type.dtype};
  std::vector<std::string> &names = is_tensor ? result_.tensors : result_.scalars;
  const auto input = std::find_if(kFurtherInputs.begin(), kFurtherInputs.end(),
                                  [&](const NamedInput &each) { return each.name == name; });
  if (!is_tensor && input != kFurtherInputs.end()) {
    if (variable.type != Type::i32) refuse_source(line, "`" + std::string(name) + "` must be an int");
    variable.node = result_.graph.add(input->op, {});
    return declare(variable, line);
  }
  const auto number = static_cast<int32_t>(names.size());
  if (number >= (is_tensor ? kMaxTensors : kMaxScalars))
    refuse_source(line, is_tensor ? "more than 16 tensors" : "more than 16 numbers");
  if (is_tensor) {
    variable.kind = SourceVariable::Kind::tensor;
    variable.tensor = number;
  } else {
    if (variable.type == Type::boolean) refuse_source(line, "a bool parameter: make it an int");
    variable.node = result_.graph.add_scalar(number, variable.type);
  }
  names.emplace_back(name);
  declare(variable, line);
}

void SourceParser::parameter(size_t place) {
  constexpr std::array kInputs = {Op::Score, Op::B, Op::H, Op::QIdx, Op::KvIdx};
  const int32_t line = tokens_.line();
  const Written type = written_type();
  const std::string_view name = tokens_.name("a parameter's name");
  for (const SourceVariable &other : state_.variables) {
    if (other.name == name) refuse_source(line, "two parameters are called `" + std::string(name) + "`");
  }
  if (!is_score_) ++place;
  if (place >= kInputs.size()) return captured_parameter(type, name, line);
  const bool is_score = kInputs[place] == Op::Score;
  if (type.is_pointer || type.is_auto || type_of(type.dtype) != (is_score ? Type::f32 : Type::i32))
    refuse_source(line, "`" + std::string(name) + "` must be " + (is_score ? "a float" : "an int"));
  declare({name, SourceVariable::Kind::value, is_score ? Type::f32 : Type::i32, result_.graph.add(kInputs[place], {}),
           -1, DataType::f32},
          line);
}

SourceFunction SourceParser::parse() {
  const int32_t line = tokens_.line();
  const Written type = written_type();
  const Type wanted = is_score_ ? Type::f32 : Type::boolean;
  if (type.is_pointer || type.is_auto || type_of(type.dtype) != wanted)
    refuse_source(line, is_score_ ? "a score function returns float" : "a mask function returns bool");
  tokens_.name("the function's name");
  tokens_.expect("(");
  size_t count = 0;
  while (!tokens_.is(")")) {
    if (count > 0) tokens_.expect(",");
    parameter(count++);
  }
  if (count < (is_score_ ? 5u : 4u)) {
    refuse_source(
        line, is_score_ ? "a score function has the parameters (float score, int b, int h, int q_idx, int kv_idx, ..)"
                        : "a mask function has the parameters (int b, int h, int q_idx, int kv_idx, ..)");
  }
  tokens_.expect(")");
  if (!tokens_.is("{")) refuse_source(tokens_.line(), "`{` is missing before " + shown(tokens_.peek()));
  block();
  if (tokens_.peek().kind != Token::Kind::end)
    refuse_source(tokens_.line(), shown(tokens_.peek()) + " behind the function: the text is one function");
  if (state_.returned != State::Returned::always) refuse_source(line, "the function may end without a value");
  for (size_t n = 0; n < result_.tensors.size(); ++n) {
    if (result_.graph.captures[n].rank < 0) refuse_source(line, "tensor `" + result_.tensors[n] + "` is never read");
  }
  result_.graph.results = {state_.result};
  return std::move(result_);
}

SourceFunction parse_source(std::string_view source, bool is_score) {
  return SourceParser(source, is_score).parse();
}

}  // namespace flashspark::graph
