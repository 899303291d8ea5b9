// The text of a graph: reading it, strictly, and writing it.
#include <charconv>
#include <cmath>
#include <iterator>
#include <limits>
#include <memory>

#include "error.hpp"
#include "graph/graph.hpp"

namespace flashspark::graph {
namespace {

constexpr std::string_view kHeader = "flashspark-graph 1";

[[noreturn]] void refuse(const std::string &what) {
  throw Error(FLASHSPARK_INVALID_ARGUMENT, what);
}

// A piece of a wrong text, fit for a message.
std::string quoted(std::string_view text) {
  constexpr size_t kLongest = 80;
  std::string shown = "\"";
  for (const char c : text.substr(0, kLongest)) shown += c >= ' ' && c <= '~' ? c : '?';
  return shown + (text.size() > kLongest ? "...\"" : "\"");
}

// Takes the fields of one line from left to right.
class Fields {
 public:
  explicit Fields(std::string_view line) : rest_(line), at_end_(false) {}

  bool at_end() const { return at_end_; }

  std::string_view next(const char *what) {
    if (at_end_) refuse(std::string("the line ends before ") + what);
    const size_t space = rest_.find(' ');
    const std::string_view field = rest_.substr(0, space);
    if (field.empty()) refuse("fields are separated by single spaces");
    at_end_ = space == std::string_view::npos;
    rest_.remove_prefix(at_end_ ? rest_.size() : space + 1);
    return field;
  }

  template <class Integer>
  Integer integer(const char *what) {
    const std::string_view field = next(what);
    Integer value{};
    const char *begin = std::to_address(field.begin()), *end = std::to_address(field.end());
    const auto [stop, failure] = std::from_chars(begin, end, value);
    if (failure != std::errc() || stop != end) refuse(quoted(field) + " is not " + what);
    return value;
  }

  int32_t operand(size_t num_nodes) {
    const int32_t value = integer<int32_t>("the number of an earlier line");
    if (value < 0 || static_cast<size_t>(value) >= num_nodes)
      refuse("operand " + std::to_string(value) + " is not the number of an earlier line");
    return value;
  }

  // One of an enumeration's names.
  template <class Enum>
  Enum named(int32_t count, const char *what) {
    const std::string_view field = next(what);
    for (int32_t n = 0; n < count; ++n) {
      if (field == name(static_cast<Enum>(n))) return static_cast<Enum>(n);
    }
    refuse(quoted(field) + " is not " + what);
  }

 private:
  std::string_view rest_;
  bool at_end_;
};

// C's hexadecimal form, inf, -inf or nan. A number that no float equals is refused, not rounded.
float parse_float(std::string_view field) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  if (field == "nan") return std::numeric_limits<float>::quiet_NaN();
  if (field == "inf") return kInfinity;
  if (field == "-inf") return -kInfinity;
  const bool negative = field.starts_with('-');
  std::string_view digits = field.substr(negative ? 1 : 0);
  double value = 0;
  const bool starts_well = digits.starts_with("0x") && digits.find('n') == std::string_view::npos &&
                           digits.find('N') == std::string_view::npos;
  if (starts_well) digits.remove_prefix(2);
  const char *begin = std::to_address(digits.begin()), *end = std::to_address(digits.end());
  const auto [stop, failure] = std::from_chars(begin, end, value, std::chars_format::hex);
  const bool whole = starts_well && !digits.starts_with('-') && failure == std::errc() && stop == end;
  if (!whole || std::fabs(value) > double{std::numeric_limits<float>::max()} ||
      double{static_cast<float>(value)} != value) {
    refuse(quoted(field) + " is not a single-precision number in C's hexadecimal form");
  }
  return static_cast<float>(negative ? -value : value);
}

void parse_const(Fields &fields, Graph &graph) {
  const Type type = fields.named<Type>(kNumTypes, "a type");
  if (type == Type::f32) {
    graph.add_const(parse_float(fields.next("a constant")));
  } else {
    graph.add_const(type, fields.integer<int64_t>("an integer constant"));
  }
}

void parse_load(Fields &fields, Graph &graph) {
  const int32_t tensor = fields.integer<int32_t>("a tensor's number");
  const DataType dtype = fields.named<DataType>(kNumDataTypes, "a data type");
  const int32_t rank = fields.integer<int32_t>("a rank");
  if (rank < 0 || rank > kMaxRank) refuse("a rank must be from 0 to " + std::to_string(kMaxRank));
  int32_t indices[kMaxRank];
  for (int32_t n = 0; n < rank; ++n) indices[n] = fields.operand(graph.nodes.size());
  graph.add_load(tensor, dtype, std::span(indices, static_cast<size_t>(rank)));
}

// One line behind the header; true if it is the last.
bool parse_line(std::string_view line, Graph &graph) {
  Fields fields(line);
  if (line == "return" || line.starts_with("return ")) {
    fields.next("return");
    do {
      if (graph.results.size() >= static_cast<size_t>(kMaxNodes)) refuse("too many results");
      graph.results.push_back(fields.operand(graph.nodes.size()));
    } while (!fields.at_end());
    return true;
  }
  const Op op = fields.named<Op>(kNumOps, "an operation");
  if (op == Op::Const) {
    parse_const(fields, graph);
  } else if (op == Op::Load) {
    parse_load(fields, graph);
  } else if (op == Op::Scalar) {
    const int32_t number = fields.integer<int32_t>("a scalar's number");
    graph.add_scalar(number, fields.named<Type>(kNumTypes, "a type"));
  } else {
    int32_t operands[3];
    size_t count = 0;
    while (!fields.at_end() && count < 3) operands[count++] = fields.operand(graph.nodes.size());
    graph.add(op, std::span(operands, count));
  }
  if (!fields.at_end()) refuse("more fields than the operation has");
  return false;
}

std::string float_text(float value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  return hex_text(value);
}

}  // namespace

std::string hex_text(float value) {
  char digits[64];
  // As a double every float is normalised.
  const double magnitude = std::fabs(static_cast<double>(value));
  const auto [end, failure] = std::to_chars(std::begin(digits), std::end(digits), magnitude, std::chars_format::hex);
  return (std::signbit(value) ? "-0x" : "0x") + std::string(digits, end);
}

Graph parse(std::string_view text) {
  Graph graph;
  bool has_header = false, returned = false;
  while (!text.empty()) {
    const size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    const std::string where = "graph line " + std::to_string(graph.nodes.size()) + " (" + quoted(line) + "): ";
    if (!has_header && (line != kHeader || end == std::string_view::npos))
      refuse("a graph starts with the line \"" + std::string(kHeader) + "\", not with " + quoted(line));
    if (returned) refuse(where + "nothing follows the return line");
    if (end == std::string_view::npos) refuse(where + "the line does not end with a line feed");
    text.remove_prefix(end + 1);
    if (!has_header) {
      has_header = true;
      continue;
    }
    try {
      returned = parse_line(line, graph);
    } catch (const Error &error) {
      refuse(where + error.what());
    }
  }
  if (!has_header) refuse("a graph starts with the line \"" + std::string(kHeader) + "\"; this one is empty");
  if (!returned) refuse("graph line " + std::to_string(graph.nodes.size()) + ": a graph ends with a return line");
  return graph;
}

std::string to_text(const Graph &graph) {
  std::string text = std::string(kHeader) + "\n";
  for (const Node &node : graph.nodes) {
    text += name(node.op);
    if (node.op == Op::Const) {
      text += std::string(" ") + name(node.type) + " ";
      text += node.type == Type::f32 ? float_text(node.real()) : std::to_string(node.value);
    } else if (node.op == Op::Scalar) {
      text += " " + std::to_string(node.number) + " " + name(node.type);
    } else if (node.op == Op::Load) {
      text += " " + std::to_string(node.number) + " " + name(node.dtype) + " " + std::to_string(node.num_operands);
    }
    for (const int32_t operand : node.inputs()) text += " " + std::to_string(operand);
    text += "\n";
  }
  text += "return";
  for (const int32_t result : graph.results) text += " " + std::to_string(result);
  return text + "\n";
}

}  // namespace flashspark::graph
