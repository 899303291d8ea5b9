#include "cli/terminal.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "cli/system.hpp"

namespace flashspark::cli {
namespace {

bool wanted_on(Stream stream) {
  const char *no_color = std::getenv("NO_COLOR");
  return !(no_color && *no_color) && takes_escapes(stream);
}

bool colours() {
  static const bool on = wanted_on(Stream::kOut);
  return on;
}

const char *code(Colour colour) {
  switch (colour) {
    case Colour::kPlain:
      return "";
    case Colour::kBold:
      return "\033[1m";
    case Colour::kDim:
      return "\033[2m";
    case Colour::kGreen:
      return "\033[32m";
    case Colour::kYellow:
      return "\033[33m";
    case Colour::kRed:
      return "\033[31m";
  }
  return "";
}

}  // namespace

std::string paint(Colour colour, const std::string &text) {
  if (!colours() || colour == Colour::kPlain) return text;
  return code(colour) + text + "\033[0m";
}

Table::Table(std::vector<std::string> headers) : headers_(std::move(headers)) {
  for (std::string &header : headers_) {
    right_.push_back(header.starts_with('>'));
    if (right_.back()) header.erase(0, 1);
  }
}

void Table::row(std::vector<std::string> cells, Colour colour) {
  cells.resize(headers_.size());
  rows_.push_back(std::move(cells));
  colours_.push_back(colour);
}

void Table::print() const {
  std::vector<size_t> widths;
  for (size_t c = 0; c < headers_.size(); ++c) {
    size_t width = headers_[c].size();
    for (const auto &row : rows_) width = std::max(width, row[c].size());
    widths.push_back(width);
  }
  const auto line = [&](const std::vector<std::string> &cells, Colour first, Colour rest) {
    std::string text;
    for (size_t c = 0; c < cells.size(); ++c) {
      // No trailing blanks after the last column.
      const size_t width = c + 1 == cells.size() && !right_[c] ? 0 : widths[c];
      std::string cell = right_[c] ? fmt::format("{:>{}}", cells[c], width) : fmt::format("{:<{}}", cells[c], width);
      text += "  " + paint(c == 0 ? first : rest, cell);
    }
    fmt::print("{}\n", text);
  };
  line(headers_, Colour::kDim, Colour::kDim);
  for (size_t r = 0; r < rows_.size(); ++r) line(rows_[r], colours_[r], Colour::kPlain);
}

Progress::Progress(size_t total) : total_(total), shown_(wanted_on(Stream::kErr) && total > 1) {}

Progress::~Progress() {
  if (shown_) fmt::print(stderr, "\r\033[K");
}

void Progress::step(const std::string &what) {
  ++done_;
  if (!shown_) return;
  constexpr size_t kWidth = 24;
  const size_t filled = kWidth * done_ / std::max<size_t>(total_, 1);
  std::string bar;
  for (size_t n = 0; n < kWidth; ++n) bar += n < filled ? "━" : "─";
  fmt::print(stderr, "\r\033[K{} {}/{}  {:.40}", bar, done_, total_, what);
  std::fflush(stderr);
}

std::string seconds_text(double seconds) {
  if (seconds < 1e-3) return fmt::format("{:.1f} us", seconds * 1e6);
  if (seconds < 1) return fmt::format("{:.2f} ms", seconds * 1e3);
  return fmt::format("{:.2f} s", seconds);
}

std::string error_text(double error) {
  return error == 0 ? "0" : fmt::format("{:.1e}", error);
}

std::string percent_text(double fraction) {
  return fraction > 0 ? fmt::format("{:.0f}%", fraction * 100) : "";
}

}  // namespace flashspark::cli
