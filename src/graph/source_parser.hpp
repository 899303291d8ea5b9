// The parser of graph/source.hpp: a function's statements are carried out with nodes in place of numbers. Both branches
// of an `if` are, and what they assign is joined by `where`.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "graph/source.hpp"
#include "graph/source_tokens.hpp"
#include "graph/source_values.hpp"

namespace flashspark::graph {

struct SourceVariable {
  enum class Kind : uint8_t { value, constant, tensor };
  std::string_view name;
  Kind kind;
  Type type;
  int32_t node;    // of a value; -1: nothing was assigned to it
  int32_t tensor;  // its number
  DataType dtype;  // a tensor's elements
};

class SourceParser {
 public:
  SourceParser(std::string_view source, bool is_score) : tokens_(source), is_score_(is_score), values_(result_.graph) {}

  SourceFunction parse();

 private:
  // What is known once some statements have run: the variables in scope, and whether, and with what, they returned.
  struct State {
    std::vector<SourceVariable> variables;
    enum class Returned : uint8_t { never, maybe, always } returned = Returned::never;
    int32_t condition = -1;  // of maybe
    int32_t result = -1;     // but for never
  };
  // A type as it is written.
  struct Written {
    bool is_auto = false, is_const = false, is_pointer = false;
    DataType dtype = DataType::f32;
  };

  // source.cpp: the function's head
  bool is_type(size_t ahead = 0) const;
  Written written_type();
  DataType base_type();
  void skip_qualifiers(Written &type);
  void parameter(size_t place);
  void captured_parameter(const Written &type, std::string_view name, int32_t line);
  void declare(const SourceVariable &variable, int32_t line);

  // source_statements.cpp
  void block();
  void statement();
  void declaration();
  void branch();
  void give_back();
  void assignment();
  void store(SourceVariable &variable, int32_t node, int32_t line);
  SourceVariable &assigned(std::string_view name, int32_t line);
  State joined(int32_t condition, const State &then, const State &otherwise);
  int32_t condition_of(const State &state);

  // source_expressions.cpp
  int32_t expression();
  int32_t operation(int32_t lowest);
  int32_t unary();
  int32_t postfix();
  int32_t primary();
  int32_t named();
  int32_t element(const SourceVariable &tensor, int32_t line);
  int32_t converted_call(int32_t line);
  SourceVariable *find(std::string_view name);

  Tokens tokens_;
  bool is_score_;
  SourceFunction result_;
  SourceValues values_;
  State state_;
};

}  // namespace flashspark::graph
