#include "cli/plot.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>

#include "cli/machine.hpp"
#include "cli/terminal.hpp"

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

std::string begin(int width, int height, const std::string &title, const std::string &subtitle) {
  return fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" height=\"{1}\" "
      "font-family=\"system-ui, sans-serif\" font-size=\"12\">\n"
      "<rect width=\"{0}\" height=\"{1}\" fill=\"#fff\"/>\n"
      "<text x=\"16\" y=\"28\" font-size=\"17\" font-weight=\"600\" fill=\"#222\">{2}</text>\n"
      "<text x=\"16\" y=\"48\" fill=\"#666\">{3}</text>\n",
      width, height, escape(title), escape(subtitle));
}

}  // namespace

void write_bars(const std::string &path, const std::string &title, const std::string &subtitle,
                const std::vector<Bar> &bars) {
  const int width = kLeft + kBarWidth + kRight;
  const int bottom = kTop + kRow * static_cast<int>(bars.size());
  std::string svg = begin(width, bottom + 52, title, subtitle);
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
  write_text(path, svg + "</svg>\n");
}

void write_curves(const std::string &path, const std::string &title, const std::string &subtitle,
                  const std::vector<Curve> &curves) {
  constexpr int kLow = 80, kHigh = 740, kBottom = 470, kWidth = 880;
  constexpr const char *kColours[] = {"#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c", "#1864ab", "#868e96"};
  // The axes end at powers of the base, and span at least one.
  double x_low = 1e9, x_high = -1e9, y_low = 1e9, y_high = -1e9;
  for (const Curve &curve : curves) {
    for (const Point &p : curve.points) {
      x_low = std::min(x_low, std::floor(std::log2(p.x))), x_high = std::max(x_high, std::floor(std::log2(p.x)) + 1);
      y_low = std::min(y_low, std::floor(std::log10(p.seconds)));
      y_high = std::max(y_high, std::floor(std::log10(p.seconds)) + 1);
    }
  }
  const auto at_x = [&](double power) { return kLow + (power - x_low) / (x_high - x_low) * (kHigh - kLow); };
  const auto at_y = [&](double power) { return kBottom - (power - y_low) / (y_high - y_low) * (kBottom - kTop); };
  std::string svg = begin(kWidth, kBottom + 40, title, subtitle);
  static constexpr char kGrid[] = "<line x1=\"{}\" x2=\"{}\" y1=\"{}\" y2=\"{}\" stroke=\"#e3e3e3\"/>\n";
  static constexpr char kTick[] =
      "<text x=\"{}\" y=\"{}\" text-anchor=\"{}\" fill=\"#888\" font-size=\"11\">{}</text>\n";
  for (double power = x_low; power <= x_high; ++power) {
    svg += fmt::format(kGrid, at_x(power), at_x(power), kTop, kBottom);
    svg += fmt::format(kTick, at_x(power), kBottom + 18, "middle", fmt::format("2^{}", power));
  }
  for (double power = y_low; power <= y_high; ++power) {
    svg += fmt::format(kGrid, kLow, kHigh, at_y(power), at_y(power));
    svg += fmt::format(kTick, kLow - 8, at_y(power) + 4, "end", seconds_text(std::pow(10, power)));
  }
  std::vector<std::string> labels;
  for (const Curve &curve : curves) {
    const size_t number = std::find(labels.begin(), labels.end(), curve.label) - labels.begin();
    const char *colour = kColours[number % std::size(kColours)];
    if (number == labels.size()) {
      svg += fmt::format("<text x=\"{}\" y=\"{}\" fill=\"{}\">{}</text>\n", kHigh + 16, kTop + 12 + 18 * number, colour,
                         escape(curve.label));
      labels.push_back(curve.label);
    }
    std::string line, dots;
    for (const Point &p : curve.points) {
      const double x = at_x(std::log2(p.x)), y = at_y(std::log10(p.seconds));
      line += fmt::format("{:.1f},{:.1f} ", x, y);
      dots += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\" fill=\"{}\"><title>{}</title></circle>\n", x, y,
                          colour, escape(p.text));
    }
    svg += fmt::format("<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-opacity=\"0.4\"/>\n", line, colour);
    svg += dots;
  }
  write_text(path, svg + "</svg>\n");
}

}  // namespace flashspark::cli
