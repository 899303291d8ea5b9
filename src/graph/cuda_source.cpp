#include "graph/cuda_source.hpp"

#include <algorithm>
#include <utility>

#include "graph/cuda_writer.hpp"

namespace flashspark::graph {
namespace {

// Parameters of the functions that are written.
constexpr const char *kArguments = "[[maybe_unused]] const FunctionArguments &f",
                     *kPosition = "[[maybe_unused]] const FunctionKey &kv",
                     *kRowAndKey = "[[maybe_unused]] const uint32_t *w, [[maybe_unused]] const Key &at",
                     *kScore =
                         "[[maybe_unused]] float s, [[maybe_unused]] float scale, [[maybe_unused]] float inverse_scale";

}  // namespace

// A value of the row, through its words.
std::string CudaWriter::word(int32_t n, Form form) {
  if (const auto known = each_.known.find({n, form}); known != each_.known.end()) return known->second;
  const bool is_float = form != Form::plain || node(n).type == Type::f32,
             is_long = !is_float && node(n).type == Type::i64;
  const std::string first = std::to_string(words_), second = std::to_string(words_ + 1);
  const std::string source = value(row_, n, form);
  std::string use;
  if (is_float) {
    row_.body += "      w[" + first + "] = ptx::as_word(" + source + ");\n";
    use = "ptx::as_float(w[" + first + "])";
  } else if (is_long) {
    row_.body += "      w[" + first + "] = static_cast<uint32_t>(" + source + ");\n";
    row_.body += "      w[" + second + "] = static_cast<uint32_t>(" + source + " >> 32);\n";
    use = "static_cast<int64_t>(static_cast<uint64_t>(w[" + second + "]) << 32 | w[" + first + "])";
  } else {
    row_.body += "      w[" + first + "] = static_cast<uint32_t>(" + source + ");\n";
    use = node(n).type == Type::boolean ? "(w[" + first + "] != 0)" : "static_cast<int32_t>(w[" + first + "])";
  }
  words_ += is_long ? 2 : 1;
  return each_.known[{n, form}] = use;
}

// A value of the key, through Key.
std::string CudaWriter::key_member(int32_t n) {
  if (const auto known = each_.known.find({n, Form::plain}); known != each_.known.end()) return known->second;
  const std::string field = "k" + std::to_string(n);
  const std::string source = value(key_, n, Form::plain);
  key_fields_ += std::string(" ") + type_name(node(n).type, Form::plain) + " " + field + ";";
  key_names_ += (key_names_.empty() ? "" : ", ") + source;
  return each_.known[{n, Form::plain}] = "at." + field;
}

// The function as a sum. Its terms go where they cost least: into offset_, what is the same for all of a lane's scores
// of a row; kv_idx times a number of the row goes into both, since a lane's keys are a first one plus constants.
std::string CudaWriter::sum(int32_t n) {
  std::vector<std::pair<int32_t, bool>> terms;
  add_terms(n, false, terms);
  std::string rest;
  std::vector<std::pair<std::string, bool>> steps;
  const auto is_score = [&](const std::pair<int32_t, bool> &term) {
    return node(term.first).op == Op::Score && !term.second;
  };
  const auto score = std::find_if(terms.begin(), terms.end(), is_score);
  if (score != terms.end()) {
    const int32_t added = score->first;
    terms.erase(score);
    is_bias_ = std::none_of(terms.begin(), terms.end(),
                            [&](const auto &term) { return (node(term.first).depends & kDependsScore) != 0; });
    if (!is_bias_) terms.emplace(terms.begin(), added, false);
  }
  const auto add = [](std::string &to, bool negative, const std::string &text) {
    to += (negative ? " - " : (to.empty() ? "" : " + ")) + text;
  };
  for (const auto &[term, negative] : terms) {
    if (of_row(term)) {
      add(offset_, negative, value(each_, term, Form::scaled));
    } else if (const auto linear = linear_in_key(term, Form::scaled)) {
      add(offset_, negative, linear->first);
      steps.emplace_back(linear->step, negative);
    } else {
      add(rest, negative, value(each_, term, Form::scaled));
    }
  }
  for (const auto &[step, negative] : steps) add(rest, negative, step);
  return rest.empty() ? "0.0f" : rest;
}

// A float's terms and whether they are subtracted.
void CudaWriter::add_terms(int32_t n, bool negative, std::vector<std::pair<int32_t, bool>> &terms) const {
  const Node &x = node(n);
  const bool is_sum = x.op == Op::Add || x.op == Op::Sub;
  if (of_row(n) || x.type != Type::f32 || !(is_sum || x.op == Op::Neg)) {
    terms.emplace_back(n, negative);
    return;
  }
  add_terms(input(x, 0), negative != (x.op == Op::Neg), terms);
  if (is_sum) add_terms(input(x, 1), negative != (x.op == Op::Sub), terms);
}

// A float that is a number of the row times kv_idx plus another one, by its value at the lane's first key, and by what
// a further key adds.
std::optional<CudaWriter::Linear> CudaWriter::linear_in_key(int32_t n, Form form) {
  const Node &x = node(n);
  if (x.op == Op::Mul && x.type == Type::f32) {
    for (const int32_t m : {0, 1}) {
      if (!of_row(input(x, m))) continue;
      const auto other = linear_in_key(input(x, 1 - m), Form::plain);
      if (!other) return std::nullopt;
      const std::string factor = value(each_, input(x, m), form);
      return Linear{factor + " * (" + other->first + ")", factor + " * (" + other->step + ")"};
    }
    return std::nullopt;
  }
  if (x.op != Op::ToF32 || !exact_as_real(input(x, 0))) return std::nullopt;
  const std::string factor = form == Form::scaled ? " * inverse_scale" : "";
  const Node &key = node(input(x, 0));
  if (key.op == Op::KvIdx) return Linear{"first" + factor, "kv.step" + factor};
  if (key.op != Op::Add && key.op != Op::Sub) return std::nullopt;
  const int32_t a = input(key, 0), b = input(key, 1);
  const std::string sign = key.op == Op::Add ? " + " : " - ";
  if (node(a).op == Op::KvIdx && of_row(b))
    return Linear{"(first" + sign + value(each_, b, Form::real) + ")" + factor, "kv.step" + factor};
  if (node(b).op == Op::KvIdx && of_row(a))
    return Linear{"(" + value(each_, a, Form::real) + sign + "first)" + factor,
                  (key.op == Op::Add ? "kv.step" : "-kv.step") + factor};
  return std::nullopt;
}

// What comes before the function itself, whose own part is written.
std::string CudaWriter::first_members() const {
  return "    static constexpr bool kExists = true, kUsesKeys = " +
         std::string(key_fields_.empty() ? "false" : "true") +
         ", kHasOffset = " + (offset_.empty() ? "false" : "true") + ", kIsBias = " + (is_bias_ ? "true" : "false") +
         ";\n    static constexpr int32_t kOperations = " + std::to_string(each_.statements) +
         ";\n    static constexpr int32_t kWords = " + std::to_string(words_) +
         ";\n    static FLASHSPARK_DEVICE void row(" + kArguments +
         ", [[maybe_unused]] const FunctionRow &r, [[maybe_unused]] float inverse_scale, [[maybe_unused]] uint32_t *w) "
         "{\n" +
         row_.body + "    }\n" + "    struct Key {" + key_fields_ + " };\n    static FLASHSPARK_DEVICE Key key(" +
         kArguments + ", " + kPosition + ") {\n" + key_.body + "      return {" + key_names_ + "};\n    }\n";
}

std::string CudaWriter::members(bool is_score) {
  const std::string result = is_score ? sum(g_.results[0]) : value(each_, g_.results[0], Form::plain);
  const std::string each = std::string(kArguments) + ", " + kRowAndKey + ", ";
  return first_members() + "    static FLASHSPARK_DEVICE " +
         (is_score ? "float apply(" + each + kScore + ", " : "bool keep(" + each) + kPosition + ") {\n" + each_.body +
         "      return " + result + ";\n    }\n" +
         (offset_.empty() ? ""
                          : "    static FLASHSPARK_DEVICE float offset(" + std::string(kArguments) +
                                ", [[maybe_unused]] const uint32_t *w, [[maybe_unused]] float inverse_scale, "
                                "[[maybe_unused]] float first) {\n      return " +
                                offset_ + ";\n    }\n");
}

std::string CudaWriter::gradient_members(const ScoreGradients &score) {
  const std::string loads = std::to_string(score.loads.size());
  std::string results, places = "PlaceBy::head";
  size_t next = 0;
  const auto result = [&] { return g_.results[next++]; };
  const auto assign = [&](const std::string &to, const std::string &text) {
    results += "      y." + to + " = " + text + ";\n";
  };
  assign("value", value(each_, result(), Form::plain));
  assign("by_score", value(each_, result(), Form::plain));
  for (size_t n = 0; n < score.loads.size(); ++n) {
    const std::string at = "[" + std::to_string(n) + "]", to = "g[" + std::to_string(score.loads[n].tensor) + "]";
    const std::string tensor = "f.tensors[" + std::to_string(first_tensor_ + score.loads[n].tensor) + "]";
    assign("slopes" + at, value(each_, result(), Form::plain));
    std::string offset = "fn::offset(" + to;
    uint8_t depends = 0;
    for (int32_t d = 0; d < score.loads[n].rank; ++d) {
      const int32_t node_of_index = result();
      depends |= node(node_of_index).depends;
      offset.append(", ").append(index(each_, node_of_index, tensor, d));
    }
    assign("places" + at, std::string(to).append(".data + ").append(offset).append(")"));
    const bool of_row = (depends & kDependsQ) != 0, of_key = (depends & kDependsKv) != 0;
    const char *by = (depends & kDependsScore) != 0 || (of_row && of_key) ? "score"
                     : of_row                                             ? "row"
                     : of_key                                             ? "key"
                                                                          : "head";
    places.insert(0, "n == " + std::to_string(n) + " ? PlaceBy::" + by + " : ");
  }
  return first_members() + "    static constexpr int32_t kLoads = " + loads +
         ";\n    static FLASHSPARK_DEVICE constexpr PlaceBy place_by([[maybe_unused]] int32_t n) { return " + places +
         "; }\n    static FLASHSPARK_DEVICE ScoreGradients<kLoads> apply(" + kArguments +
         ", [[maybe_unused]] const CapturedGradient *g, " + kRowAndKey + ", " + kScore + ", " + kPosition + ") {\n" +
         each_.body + "      ScoreGradients<kLoads> y;\n" + results + "      return y;\n    }\n";
}

namespace {

constexpr const char *kNoPlaces =
    "    static FLASHSPARK_DEVICE constexpr PlaceBy place_by(int32_t) { return PlaceBy::head; }\n";
constexpr const char *kNoMembers =
    "    static constexpr bool kExists = false, kUsesKeys = false, kHasOffset = false, kIsBias = false;\n"
    "    static constexpr int32_t kOperations = 0, kWords = 0, kLoads = 0;\n"
    "    static FLASHSPARK_DEVICE void row(const FunctionArguments &, const FunctionRow &, float, uint32_t *) {}\n"
    "    struct Key {};\n"
    "    static FLASHSPARK_DEVICE Key key(const FunctionArguments &, const FunctionKey &) { return {}; }\n";

// The functions of a kernel, one after the other: captured tensors and scalars of the second follow those of the first.
class SourceWriter {
 public:
  explicit SourceWriter(const CudaSourceOptions &options) : options_(options) {
    source_.text = "namespace flashspark {\n\nstruct UserFunctions {\n";
  }

  // The score function in the form of forward kernels, if it is a bias.
  bool add_bias(const Graph &graph) {
    CudaWriter trial(graph, tensors_, scalars_, options_.wide_positions);
    trial.members(true);
    if (!trial.is_bias()) return false;
    add("Score", &graph, [](CudaWriter &writer) {
      return writer.members(true) + "    static constexpr int32_t kLoads = 0;\n" + kNoPlaces;
    });
    return true;
  }

  // graph: NULL where there is no such function. members(writer): what the type has.
  template <class Members>
  void add(const char *type, const Graph *graph, Members members, const char *also_without = "") {
    source_.text += std::string("  struct ") + type + " {\n";
    if (graph == nullptr) {
      source_.text += std::string(kNoMembers) + also_without;
    } else {
      CudaWriter writer(*graph, tensors_, scalars_, options_.wide_positions);
      source_.text += members(writer);
      source_.row_words += writer.words();
      tensors_ += graph->num_tensors;
      scalars_ += graph->num_scalars;
    }
    source_.text += "  };\n";
  }

  CudaSource finish() {
    source_.text += "};\n\n}  // namespace flashspark\n";
    return std::move(source_);
  }

 private:
  CudaSourceOptions options_;
  CudaSource source_;
  int32_t tensors_ = 0, scalars_ = 0;
};

}  // namespace

CudaSource cuda_source(const Graph *score, const Graph *mask, const CudaSourceOptions &options) {
  SourceWriter source(options);
  source.add("Score", score, [](CudaWriter &writer) { return writer.members(true); });
  source.add("Mask", mask, [](CudaWriter &writer) { return writer.members(false); });
  return source.finish();
}

CudaSource cuda_gradient_source(const ScoreGradients *score, const Graph *mask, const CudaSourceOptions &options) {
  SourceWriter source(options);
  if (!options.biases || score == nullptr || !score->loads.empty() || !source.add_bias(score->graph)) {
    source.add(
        "Score", score != nullptr ? &score->graph : nullptr,
        [&](CudaWriter &writer) { return writer.gradient_members(*score); }, kNoPlaces);
  }
  source.add("Mask", mask, [](CudaWriter &writer) { return writer.members(false); });
  return source.finish();
}

}  // namespace flashspark::graph
