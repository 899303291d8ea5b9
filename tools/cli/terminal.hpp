// Aligned tables, colours only where somebody looks, a progress bar.
#pragma once

#include <string>
#include <vector>

namespace flashspark::cli {

enum class Colour { kPlain, kBold, kDim, kGreen, kYellow, kRed };

// `text` in colour if stdout is a terminal, not a dumb one, and NO_COLOR is not set.
std::string paint(Colour colour, const std::string &text);

// Columns as wide as their widest cell. A header that starts with '>' aligns its column to the right.
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

// One line on stderr that overwrites itself; nothing if stderr is no terminal, a dumb one, or NO_COLOR is set.
class Progress {
 public:
  explicit Progress(size_t total);
  ~Progress();
  void step(const std::string &what);  // before each item

 private:
  size_t total_, done_ = 0;
  bool shown_;
};

std::string seconds_text(double seconds);  // "1.23 ms"
std::string error_text(double error);      // "3.1e-07"; "0"
std::string percent_text(double fraction);

}  // namespace flashspark::cli
