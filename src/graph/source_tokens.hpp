// The words of a function written in C (graph/source.hpp).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace flashspark::graph {

// Throws, naming the line.
[[noreturn]] void refuse_source(int32_t line, const std::string &what);

struct Token {
  enum class Kind : uint8_t { end, name, integer, real, symbol };
  Kind kind;
  std::string_view text;  // of numbers with their suffixes
  int32_t line;
};

// Reads tokens from first to last. The text must outlive it.
class Tokens {
 public:
  explicit Tokens(std::string_view source);

  const Token &peek(size_t ahead = 0) const { return list_[std::min(at_ + ahead, list_.size() - 1)]; }
  const Token &next();
  int32_t line() const { return peek().line; }
  bool is(std::string_view text, size_t ahead = 0) const;
  // Takes the token if it is this one.
  bool take(std::string_view text);
  // Takes it, or throws.
  void expect(std::string_view text);
  // Takes a name that is no keyword; `what` is what it would be, in the error.
  std::string_view name(const char *what);

 private:
  std::vector<Token> list_;  // the last one is the end
  size_t at_ = 0;
};

// How an error shows a token.
std::string shown(const Token &token);

}  // namespace flashspark::graph
