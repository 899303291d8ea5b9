// Aligned tables, colours on terminals only, and a progress bar.
#pragma once

#include <string>
#include <vector>

namespace flashspark::cli {

enum class Colour { kPlain, kBold, kDim, kGreen, kYellow, kRed };

// `text` in colour if stdout is a terminal, TERM is not dumb and NO_COLOR is not set.
std::string paint(Colour colour, const std::string &text);

// Each column is as wide as its widest cell. A header that starts with '>' aligns its column to the right.
class Table {
 public:
  explicit Table(std::vector<std::string> headers);
  void row(std::vector<std::string> cells, Colour colour = Colour::kPlain);  // colours the first cell
  void print() const;

 private:
  std::vector<std::string> headers_;
  std::vector<bool> right_;
  std::vector<std::vector<std::string>> rows_;
  std::vector<Colour> colours_;
};

// A line on stderr that overwrites itself. Prints nothing unless stderr is a terminal, TERM is not dumb and NO_COLOR is
// not set.
class Progress {
 public:
  explicit Progress(size_t total);
  ~Progress();
  void step(const std::string &what);  // call before each item

 private:
  size_t total_, done_ = 0;
  bool shown_;
};

std::string seconds_text(double seconds);  // "1.23 ms"
std::string error_text(double error);      // "3.1e-07"; "0"
std::string percent_text(double fraction);

}  // namespace flashspark::cli
