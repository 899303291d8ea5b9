// Writes user functions as CUDA C++ (src/graph/cuda_source.hpp), for the build of the emulator's tests.
//   function_source NAME FILE   type UserFunctions_NAME, of the named functions (tests/support/named_graphs.hpp)
//   function_source --all FILE  those of all of them and of random graphs, and a list of them
//   function_source --gradients NAME|--all FILE  the same for backward kernels, with all gradients that there are
//   function_source --pairs NAME FILE            type UserFunctions_pairs_NAME, of backward kernels that hand on P^T,
//                                                without gradients of captured tensors
#include <cstdio>
#include <exception>
#include <fstream>
#include <optional>
#include <string>

#include "graph/cuda_source.hpp"
#include "random_functions.hpp"
#include "support/named_graphs.hpp"

namespace flashspark::emulator {
namespace {

std::optional<graph::Graph> simplified(const graph::Graph *graph) {
  if (graph == nullptr) return {};
  return graph::simplified_function(*graph);
}

enum class Kernels { forward, gradients, pairs };
Kernels kernels = Kernels::forward;

std::string source_of(const graph::Graph *score, const graph::Graph *mask, const std::string &name) {
  const auto simple_score = simplified(score), simple_mask = simplified(mask);
  const graph::Graph *masks = simple_mask ? &*simple_mask : nullptr;
  std::string text;
  if (kernels != Kernels::forward) {
    const bool pairs = kernels == Kernels::pairs;
    std::optional<graph::ScoreGradients> of_score;
    if (simple_score) of_score = graph::score_gradients(*simple_score, pairs ? 0u : ~0u);
    text = graph::cuda_gradient_source(of_score ? &*of_score : nullptr, masks, {.biases = pairs}).text;
  } else {
    text = graph::cuda_source(simple_score ? &*simple_score : nullptr, masks).text;
  }
  const std::string general = "struct UserFunctions {";
  const std::string form = kernels == Kernels::pairs ? "pairs_" : "";
  return text.replace(text.find(general), general.size(), "struct UserFunctions_" + form + name + " {");
}

std::string source_of(const test::NamedFunctions &functions) {
  const auto score = functions.score(), mask = functions.mask();
  return source_of(score ? &*score : nullptr, mask ? &*mask : nullptr, functions.name);
}

std::string source_of(uint64_t seed) {
  const RandomFunctions random(seed);
  return source_of(&random.score, &random.mask, random.name());
}

std::string source_of_all() {
  std::string text, list;
  const auto add = [&](const std::string &name, const std::string &source) {
    text += source;
    list += "  EACH(" + name + ") \\\n";
  };
  for (const test::NamedFunctions &each : test::named_functions()) add(each.name, source_of(each));
  for (const test::NamedFunctions &each : test::gradient_functions()) {
    if (kernels != Kernels::forward) add(each.name, source_of(each));
  }
  for (uint64_t seed = 0; seed < kRandomFunctions; ++seed) {
    add(RandomFunctions(seed).name(), source_of(seed));
  }
  return text + "#define FLASHSPARK_ALL_FUNCTIONS(EACH) \\\n" + list + "\n";
}

}  // namespace
}  // namespace flashspark::emulator

int main(int argc, char **argv) try {
  using namespace flashspark;
  using emulator::Kernels, emulator::kernels;
  const std::string first = argc == 4 ? argv[1] : "";
  if (first == "--gradients") kernels = Kernels::gradients;
  if (first == "--pairs") kernels = Kernels::pairs;
  if (argc != (kernels != Kernels::forward ? 4 : 3)) return 2;
  const std::string name = argv[argc - 2];
  const test::NamedFunctions functions = test::named(name);
  const std::string random = "random_";
  const bool is_random = name.starts_with(random);
  if (name != "--all" && !is_random && functions.name == nullptr) {
    std::fprintf(stderr, "no functions are called %s\n", name.c_str());
    return 2;
  }
  std::ofstream file(argv[argc - 1]);
  file << "// Written by tests/emulator/function_source.cpp.\n#include \""
       << (kernels != Kernels::forward ? "backward" : "attention") << "/function_mod.cuh\"\n\n"
       << (name == "--all" ? emulator::source_of_all()
           : is_random     ? emulator::source_of(std::stoull(name.substr(random.size())))
                           : emulator::source_of(functions));
  return file.flush() ? 0 : 1;
} catch (const std::exception &error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
