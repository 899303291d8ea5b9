#include "graph/source_tokens.hpp"

#include <algorithm>
#include <array>

#include "error.hpp"

namespace flashspark::graph {
namespace {

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}
bool begins_name(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}
bool continues_name(char c) {
  return begins_name(c) || is_digit(c);
}

// Longer ones first.
constexpr std::array<std::string_view, 46> kSymbols = {
    "<<=", ">>=", "...", "::", "->", "++", "--", "<<", ">>", "<=", ">=", "==", "!=", "&&", "||", "+=",
    "-=",  "*=",  "/=",  "%=", "&=", "|=", "^=", "+",  "-",  "*",  "/",  "%",  "<",  ">",  "=",  "!",
    "~",   "&",   "|",   "^",  "?",  ":",  ";",  ",",  "(",  ")",  "[",  "]",  "{",  "}"};

class Lexer {
 public:
  explicit Lexer(std::string_view source) : rest_(source) {}

  std::vector<Token> all() {
    std::vector<Token> list;
    while (skip_blanks(), !rest_.empty()) list.push_back(next());
    list.push_back({Token::Kind::end, {}, line_});
    return list;
  }

 private:
  char at(size_t n) const { return n < rest_.size() ? rest_[n] : '\0'; }

  void drop(size_t count) {
    line_ += static_cast<int32_t>(std::count(rest_.begin(), rest_.begin() + static_cast<std::ptrdiff_t>(count), '\n'));
    rest_.remove_prefix(count);
  }

  // Blanks, comments, and what means nothing here: #include and the language of linkage.
  void skip_blanks() {
    while (!rest_.empty()) {
      if (const size_t blanks = std::min(rest_.find_first_not_of(" \t\r\n"), rest_.size()); blanks > 0) {
        drop(blanks);
      } else if (rest_.starts_with("//") || rest_.starts_with("#include")) {
        drop(std::min(rest_.find('\n'), rest_.size()));
      } else if (rest_.starts_with("extern \"C\"")) {
        drop(std::string_view("extern \"C\"").size());
      } else if (rest_.starts_with("/*")) {
        const size_t end = rest_.find("*/", 2);
        if (end == std::string_view::npos) refuse_source(line_, "a comment does not end");
        drop(end + 2);
      } else {
        return;
      }
    }
  }

  Token taken(Token::Kind kind, size_t length) {
    const Token token{kind, rest_.substr(0, length), line_};
    rest_.remove_prefix(length);
    return token;
  }

  Token next() {
    if (begins_name(at(0))) {
      size_t length = 1;
      while (continues_name(at(length))) ++length;
      return taken(Token::Kind::name, length);
    }
    if (is_digit(at(0)) || (at(0) == '.' && is_digit(at(1)))) return number();
    for (const std::string_view symbol : kSymbols) {
      if (rest_.starts_with(symbol)) return taken(Token::Kind::symbol, symbol.size());
    }
    const char c = at(0);
    refuse_source(line_, c == '#' ? "of the preprocessor there is #include alone, which is ignored"
                                  : "a character that C does not have here: " +
                                        (c > ' ' && c <= '~' ? "'" + std::string(1, c) + "'"
                                                             : std::to_string(static_cast<unsigned char>(c))));
  }

  Token number() {
    const bool hex = at(0) == '0' && (at(1) == 'x' || at(1) == 'X');
    bool real = false;
    size_t length = hex ? 2 : 0;
    while (continues_name(at(length)) || at(length) == '.') {
      const char c = at(length++);
      const bool exponent = hex ? c == 'p' || c == 'P' : c == 'e' || c == 'E';
      real = real || c == '.' || exponent;
      if (exponent && (at(length) == '+' || at(length) == '-')) ++length;
    }
    return taken(real ? Token::Kind::real : Token::Kind::integer, length);
  }

  std::string_view rest_;
  int32_t line_ = 1;
};

}  // namespace

void refuse_source(int32_t line, const std::string &what) {
  throw Error(FLASHSPARK_INVALID_ARGUMENT, "source, line " + std::to_string(line) + ": " + what);
}

std::string shown(const Token &token) {
  constexpr size_t kLongest = 60;
  if (token.kind == Token::Kind::end) return "the end";
  return "`" + std::string(token.text.substr(0, kLongest)) + (token.text.size() > kLongest ? "..`" : "`");
}

Tokens::Tokens(std::string_view source) : list_(Lexer(source).all()) {}

const Token &Tokens::next() {
  const Token &token = peek();
  at_ = std::min(at_ + 1, list_.size() - 1);
  return token;
}

bool Tokens::is(std::string_view text, size_t ahead) const {
  return peek(ahead).kind != Token::Kind::end && peek(ahead).text == text;
}

bool Tokens::take(std::string_view text) {
  if (!is(text)) return false;
  next();
  return true;
}

void Tokens::expect(std::string_view text) {
  if (!take(text)) refuse_source(line(), "`" + std::string(text) + "` is missing before " + shown(peek()));
}

std::string_view Tokens::name(const char *what) {
  if (peek().kind != Token::Kind::name) refuse_source(line(), shown(peek()) + ": must be " + what);
  return next().text;
}

}  // namespace flashspark::graph
