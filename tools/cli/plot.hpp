// Charts as SVG, without a library.
#pragma once

#include <string>
#include <vector>

namespace flashspark::cli {

struct Bar {
  std::string label;
  std::string figure;   // "812 us · 95 GFLOP/s"
  double fraction = 0;  // of the limit, 0..1
  bool memory_bound = false;
};

// Throws std::runtime_error if the file cannot be written.
void write_bars(const std::string &path, const std::string &title, const std::string &subtitle,
                const std::vector<Bar> &bars);

struct Point {
  double x = 0;        // > 0
  double seconds = 0;  // > 0
  std::string text;    // shown by the pointer
};
struct Curve {
  std::string label;  // curves with the same have one colour
  std::vector<Point> points;
};

// Both axes are logarithms, x to the base 2.
void write_curves(const std::string &path, const std::string &title, const std::string &subtitle,
                  const std::vector<Curve> &curves);

}  // namespace flashspark::cli
