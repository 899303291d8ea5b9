#include <array>
#include <string>

#include "graph/source_parser.hpp"

namespace flashspark::graph {
namespace {

constexpr std::array<std::string_view, 8> kUnsupported = {"for",  "while", "do",       "switch",
                                                          "goto", "break", "continue", "case"};
constexpr std::array<std::string_view, 10> kAssignments = {
    "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>="};

}  // namespace

void SourceParser::block() {
  const size_t outside = state_.variables.size();
  tokens_.expect("{");
  while (!tokens_.take("}")) {
    if (tokens_.peek().kind == Token::Kind::end) refuse_source(tokens_.line(), "`}` is missing before the end");
    statement();
  }
  state_.variables.resize(outside);
}

void SourceParser::statement() {
  for (const std::string_view word : kUnsupported) {
    if (tokens_.is(word))
      refuse_source(tokens_.line(), shown(tokens_.peek()) + " is not supported: write the steps out, or use ?: and if");
  }
  if (tokens_.take(";")) return;
  if (tokens_.is("{")) return block();
  if (tokens_.take("if")) return branch();
  if (tokens_.take("return")) return give_back();
  // `float(x)` begins an expression.
  if (is_type() && !tokens_.is("(", 1)) return declaration();
  assignment();
}

void SourceParser::declaration() {
  const Written type = written_type();
  if (type.is_pointer) refuse_source(tokens_.line(), "a local pointer: read the tensor by all its indices at once");
  do {
    const int32_t line = tokens_.line();
    SourceVariable variable{
        tokens_.name("a variable's name"), SourceVariable::Kind::value, type_of(type.dtype), -1, -1, type.dtype};
    if (tokens_.is("[")) refuse_source(line, "local arrays are not supported");
    if (tokens_.take("=")) {
      const int32_t value = expression();
      if (type.is_auto) variable.type = values_.type(value);
      store(variable, value, line);
    } else if (type.is_auto || type.is_const) {
      refuse_source(line, "`" + std::string(variable.name) + "` has no value");
    }
    if (type.is_const) variable.kind = SourceVariable::Kind::constant;
    declare(variable, line);
  } while (tokens_.take(","));
  tokens_.expect(";");
}

SourceVariable &SourceParser::assigned(std::string_view name, int32_t line) {
  SourceVariable *variable = find(name);
  if (variable == nullptr) refuse_source(line, "`" + std::string(name) + "` is not declared");
  if (variable->kind != SourceVariable::Kind::value)
    refuse_source(line, "`" + std::string(name) + "` is constant: functions change nothing but their own variables");
  return *variable;
}

void SourceParser::store(SourceVariable &variable, int32_t node, int32_t line) {
  if (variable.dtype == DataType::f16 || variable.dtype == DataType::bf16 || variable.dtype == DataType::u8 ||
      variable.dtype == DataType::i8 || variable.dtype == DataType::i16) {
    refuse_source(line, "`" + std::string(variable.name) + "` must be a float, an int, an int64_t or a bool");
  }
  variable.node = values_.converted(node, variable.type);
}

// `x = ..;`, `x += ..;`, `++x;`, `x++;`
void SourceParser::assignment() {
  const int32_t line = tokens_.line();
  const bool before = tokens_.is("++") || tokens_.is("--");
  std::string_view symbol = before ? tokens_.next().text : std::string_view();
  SourceVariable &variable = assigned(tokens_.name("a statement"), line);
  if (!before) symbol = tokens_.next().text;
  int32_t value = -1;
  if (symbol == "=") {
    value = expression();
  } else {
    if (variable.node < 0) refuse_source(line, "`" + std::string(variable.name) + "` has no value yet");
    if (symbol == "++" || symbol == "--") {
      const int32_t one = result_.graph.add_const(Type::i32, 1);
      value = values_.binary(symbol.substr(0, 1), variable.node, one, line);
    } else {
      bool known = false;
      for (const std::string_view each : kAssignments) known = known || each == symbol;
      if (!known)
        refuse_source(
            line, "`" + std::string(symbol) + "` behind `" + std::string(variable.name) + "`: must be an assignment");
      const int32_t right = expression();
      value = values_.binary(symbol.substr(0, symbol.size() - 1), variable.node, right, line);
    }
  }
  store(variable, value, line);
  tokens_.expect(";");
}

void SourceParser::give_back() {
  const int32_t value = values_.converted(expression(), is_score_ ? Type::f32 : Type::boolean);
  tokens_.expect(";");
  if (state_.returned == State::Returned::always) return;  // what stands behind a return does nothing
  const bool maybe = state_.returned == State::Returned::maybe;
  state_.result = maybe ? values_.select(state_.condition, state_.result, value) : value;
  state_.returned = State::Returned::always;
}

void SourceParser::branch() {
  tokens_.expect("(");
  const int32_t condition = values_.converted(expression(), Type::boolean);
  tokens_.expect(")");
  const State before = state_;
  const auto one_way = [&] {
    statement();
    state_.variables.resize(before.variables.size());  // a declaration is no statement of its own there
  };
  one_way();
  const State then = state_;
  state_ = before;
  if (tokens_.take("else")) one_way();
  state_ = joined(condition, then, state_);
}

// Whether it has returned, as a node.
int32_t SourceParser::condition_of(const State &state) {
  if (state.returned == State::Returned::maybe) return state.condition;
  return result_.graph.add_const(Type::boolean, state.returned == State::Returned::always ? 1 : 0);
}

SourceParser::State SourceParser::joined(int32_t condition, const State &then, const State &otherwise) {
  State both = then;
  for (size_t n = 0; n < both.variables.size(); ++n) {
    const int32_t a = then.variables[n].node, b = otherwise.variables[n].node;
    if (a == b) continue;
    both.variables[n].node = a < 0 || b < 0 ? -1 : result_.graph.add(Op::Where, {condition, a, b});
  }
  if (then.returned == otherwise.returned && then.returned != State::Returned::maybe) {
    if (then.returned == State::Returned::always)
      both.result = values_.select(condition, then.result, otherwise.result);
    return both;
  }
  both.returned = State::Returned::maybe;
  both.condition = values_.select(condition, condition_of(then), condition_of(otherwise));
  const bool has_both = then.result >= 0 && otherwise.result >= 0;
  both.result =
      has_both ? values_.select(condition, then.result, otherwise.result) : std::max(then.result, otherwise.result);
  return both;
}

}  // namespace flashspark::graph
