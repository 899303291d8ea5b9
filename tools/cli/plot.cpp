#include "cli/plot.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <stdexcept>

namespace flashspark::cli {
namespace {

std::string escape(const std::string &text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
      case '&':
        result += "&amp;";
        break;
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      default:
        result += c;
    }
  }
  return result;
}

constexpr int kLeft = 250, kBarWidth = 420, kRight = 190, kTop = 78, kRow = 26, kBar = 16;
constexpr char kCompute[] = "#3b6fb6", kMemory[] = "#d08a2e";

}  // namespace

void write_bars(const std::string &path, const std::string &title, const std::string &subtitle,
                const std::vector<Bar> &bars) {
  const int width = kLeft + kBarWidth + kRight;
  const int bottom = kTop + kRow * static_cast<int>(bars.size()), height = bottom + 52;
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" height=\"{1}\" "
      "font-family=\"system-ui, sans-serif\" font-size=\"12\">\n"
      "<rect width=\"{0}\" height=\"{1}\" fill=\"#fff\"/>\n"
      "<text x=\"16\" y=\"28\" font-size=\"17\" font-weight=\"600\" fill=\"#222\">{2}</text>\n"
      "<text x=\"16\" y=\"48\" fill=\"#666\">{3}</text>\n",
      width, height, escape(title), escape(subtitle));
  for (int tick = 0; tick <= 100; tick += 25) {
    const int x = kLeft + kBarWidth * tick / 100;
    svg += fmt::format("<line x1=\"{0}\" x2=\"{0}\" y1=\"{1}\" y2=\"{2}\" stroke=\"#e3e3e3\"/>\n", x, kTop - 6, bottom);
    svg += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"#888\" font-size=\"11\">{}%</text>\n", x,
                       kTop - 11, tick);
  }
  int y = kTop;
  for (const Bar &bar : bars) {
    const double length = kBarWidth * std::clamp(bar.fraction, 0.0, 1.0);
    svg += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#222\">{}</text>\n", kLeft - 10, y + 13,
                       escape(bar.label));
    svg += fmt::format("<rect x=\"{}\" y=\"{}\" width=\"{:.1f}\" height=\"{}\" rx=\"2\" fill=\"{}\"/>\n", kLeft, y,
                       length, kBar, bar.memory_bound ? kMemory : kCompute);
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{}\" fill=\"#444\">{:.0f}% · {}</text>\n", kLeft + length + 6, y + 13,
                       100 * bar.fraction, escape(bar.figure));
    y += kRow;
  }
  const char *names[] = {"limited by arithmetic (float32 multiply-add)", "limited by memory (copy bandwidth)"};
  const char *colours[] = {kCompute, kMemory};
  for (int n = 0; n < 2; ++n) {
    const int x = kLeft + n * 300;
    svg +=
        fmt::format("<rect x=\"{}\" y=\"{}\" width=\"11\" height=\"11\" fill=\"{}\"/>\n", x, bottom + 20, colours[n]);
    svg += fmt::format("<text x=\"{}\" y=\"{}\" fill=\"#666\">{}</text>\n", x + 17, bottom + 30, names[n]);
  }
  svg += "</svg>\n";
  std::ofstream file(path);
  file << svg;
  file.close();
  if (!file) throw std::runtime_error("cannot write " + path);
}

}  // namespace flashspark::cli
