#include <array>
#include <string>

#include "graph/source_parser.hpp"

namespace flashspark::graph {
namespace {

struct Precedence {
  std::string_view symbol;
  int32_t level;  // higher ones bind closer
};
constexpr std::array kPrecedences = {Precedence{"||", 1}, Precedence{"&&", 2}, Precedence{"|", 3},  Precedence{"^", 4},
                                     Precedence{"&", 5},  Precedence{"==", 6}, Precedence{"!=", 6}, Precedence{"<", 7},
                                     Precedence{"<=", 7}, Precedence{">", 7},  Precedence{">=", 7}, Precedence{"<<", 8},
                                     Precedence{">>", 8}, Precedence{"+", 9},  Precedence{"-", 9},  Precedence{"*", 10},
                                     Precedence{"/", 10}, Precedence{"%", 10}};

int32_t level_of(const Token &token) {
  if (token.kind != Token::Kind::symbol) return 0;
  for (const Precedence &each : kPrecedences) {
    if (each.symbol == token.text) return each.level;
  }
  return 0;
}

}  // namespace

SourceVariable *SourceParser::find(std::string_view name) {
  for (size_t n = state_.variables.size(); n-- > 0;) {
    if (state_.variables[n].name == name) return &state_.variables[n];
  }
  return nullptr;
}

int32_t SourceParser::expression() {
  const int32_t condition = operation(1);
  if (!tokens_.take("?")) return condition;
  const int32_t a = expression();
  tokens_.expect(":");
  const int32_t b = expression();
  return values_.select(condition, a, b);
}

int32_t SourceParser::operation(int32_t lowest) {
  int32_t left = unary();
  while (level_of(tokens_.peek()) >= lowest) {
    const Token symbol = tokens_.next();
    const int32_t right = operation(level_of(symbol) + 1);
    left = values_.binary(symbol.text, left, right, symbol.line);
  }
  return left;
}

int32_t SourceParser::unary() {
  for (const std::string_view symbol : {"-", "+", "!", "~"}) {
    const int32_t line = tokens_.line();
    if (tokens_.take(symbol)) return values_.unary(symbol, unary(), line);
  }
  if (tokens_.is("++") || tokens_.is("--"))
    refuse_source(tokens_.line(), shown(tokens_.peek()) + " within an expression: make it a statement of its own");
  if (tokens_.is("(") && is_type(1)) {  // (float)x
    tokens_.next();
    const Written type = written_type();
    if (type.is_pointer || type.is_auto) refuse_source(tokens_.line(), "a cast to no type of numbers");
    tokens_.expect(")");
    return values_.converted(unary(), type_of(type.dtype));
  }
  return postfix();
}

int32_t SourceParser::postfix() {
  const int32_t value = primary();
  for (const std::string_view symbol : {"++", "--", "[", ".", "->", "="}) {
    if (tokens_.is(symbol)) refuse_source(tokens_.line(), shown(tokens_.peek()) + " behind a value");
  }
  return value;
}

int32_t SourceParser::primary() {
  const int32_t line = tokens_.line();
  if (tokens_.take("(")) {
    const int32_t value = expression();
    tokens_.expect(")");
    return value;
  }
  if (tokens_.peek().kind == Token::Kind::integer) return values_.integer_literal(tokens_.next());
  if (tokens_.peek().kind == Token::Kind::real) return values_.real_literal(tokens_.next());
  if (tokens_.take("static_cast")) {
    tokens_.expect("<");
    const Written type = written_type();
    tokens_.expect(">");
    tokens_.expect("(");
    const int32_t value = expression();
    tokens_.expect(")");
    return values_.converted(value, type_of(type.dtype));
  }
  if (is_type()) return converted_call(line);
  return named();
}

// float(x)
int32_t SourceParser::converted_call(int32_t line) {
  const Written type = written_type();
  if (type.is_pointer || type.is_auto) refuse_source(line, "a type where a value is wanted");
  tokens_.expect("(");
  const int32_t value = expression();
  tokens_.expect(")");
  return values_.converted(value, type_of(type.dtype));
}

int32_t SourceParser::named() {
  const int32_t line = tokens_.line();
  if (tokens_.take("std")) tokens_.expect("::");
  const std::string_view name = tokens_.name("a value");
  if (SourceVariable *variable = find(name)) {
    if (variable->kind == SourceVariable::Kind::tensor) return element(*variable, line);
    if (variable->node < 0) refuse_source(line, "`" + std::string(name) + "` has no value yet, or not on every path");
    return variable->node;
  }
  if (const int32_t constant = values_.constant(name); constant >= 0) return constant;
  if (!SourceValues::is_function(name)) {
    refuse_source(line, "`" + std::string(name) + "` is " +
                            (tokens_.is("(") ? "no function that can be called here" : "not declared"));
  }
  tokens_.expect("(");
  std::vector<int32_t> operands;
  while (!tokens_.is(")")) {
    if (!operands.empty()) tokens_.expect(",");
    operands.push_back(expression());
  }
  tokens_.expect(")");
  return values_.call(name, operands, line);
}

// slopes[h], table[h][q_idx - kv_idx]
int32_t SourceParser::element(const SourceVariable &tensor, int32_t line) {
  const std::string name = "`" + std::string(tensor.name) + "`";
  const int32_t number = tensor.tensor;
  const DataType dtype = tensor.dtype;
  std::vector<int32_t> indices;
  while (tokens_.take("[")) {
    int32_t index = expression();
    if (values_.type(index) == Type::f32) refuse_source(line, "an index of " + name + " is a float");
    if (values_.type(index) == Type::boolean) index = values_.converted(index, Type::i32);
    indices.push_back(index);
    tokens_.expect("]");
  }
  if (indices.empty()) refuse_source(line, "tensor " + name + " is used without an index");
  if (indices.size() > static_cast<size_t>(kMaxRank)) refuse_source(line, name + " has more than 8 indices");
  const int32_t rank = result_.graph.captures[static_cast<size_t>(number)].rank;
  if (rank >= 0 && static_cast<size_t>(rank) != indices.size()) {
    refuse_source(line, name + " has " + std::to_string(indices.size()) + " indices here and " + std::to_string(rank) +
                            " before");
  }
  return result_.graph.add_load(number, dtype, indices);
}

}  // namespace flashspark::graph
