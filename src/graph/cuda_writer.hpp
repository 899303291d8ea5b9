// How a graph's nodes become expressions in CUDA C++: cuda_source.cpp puts the parts of a function together, and
// cuda_expressions.cpp writes what they consist of.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "graph/derivative.hpp"
#include "graph/graph.hpp"
#include "graph/range.hpp"

namespace flashspark::graph {

// The form in which an expression wants a node's value.
enum class Form {
  plain,   // as the node's type
  real,    // an integer as the float of equal value: where kv_idx - q_idx becomes a float, it takes no conversion
  scaled,  // a float divided by softmax_scale, as Q K^T gives scores: sums hand the factor on to where it costs nothing
};

inline const char *type_name(Type type, Form form) {
  if (form != Form::plain || type == Type::f32) return "float";
  return type == Type::boolean ? "bool" : (type == Type::i32 ? "int32_t" : "int64_t");
}

// One function: its three parts, row(), key() and apply() or keep().
class CudaWriter {
 public:
  CudaWriter(const Graph &graph, int32_t first_tensor, int32_t first_scalar, bool wide_positions)
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
  bool is_bias() const { return is_bias_; }  // once members() has been called

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

}  // namespace flashspark::graph
