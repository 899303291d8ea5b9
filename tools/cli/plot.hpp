// Charts as SVG, without a library.
#pragma once

#include <string>
#include <vector>

namespace flashspark::cli {

struct Bar {
  std::string label;
  std::string figure;   // "812 us · 95 GFLOP/s"
  double fraction = 0;  // of the limit, 0 to 1
  bool memory_bound = false;
};

// Throws std::runtime_error if the file cannot be written.
void write_bars(const std::string &path, const std::string &title, const std::string &subtitle,
                const std::vector<Bar> &bars);

struct Point {
  double x = 0;        // > 0
  double seconds = 0;  // > 0
  std::string text;    // tooltip
};
struct Curve {
  std::string label;  // curves with the same label have the same colour
  std::vector<Point> points;
};

// Both axes are logarithmic; x to the base 2.
void write_curves(const std::string &path, const std::string &title, const std::string &subtitle,
                  const std::vector<Curve> &curves);

}  // namespace flashspark::cli
