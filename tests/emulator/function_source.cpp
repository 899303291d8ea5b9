// Writes user functions as CUDA C++ (src/graph/cuda_source.hpp), for the build of the emulator's tests.
//   function_source NAME FILE   type UserFunctions_NAME, of the named functions (tests/support/named_graphs.hpp)
//   function_source --all FILE  those of all of them and of random graphs, and a list of them
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

std::string source_of(const graph::Graph *score, const graph::Graph *mask, const std::string &name) {
  const auto simple_score = simplified(score), simple_mask = simplified(mask);
  std::string text =
      graph::cuda_source(simple_score ? &*simple_score : nullptr, simple_mask ? &*simple_mask : nullptr).text;
  const std::string general = "struct UserFunctions {";
  return text.replace(text.find(general), general.size(), "struct UserFunctions_" + name + " {");
}

std::string source_of(const test::NamedFunctions &functions) {
  const auto score = functions.score(), mask = functions.mask();
  return source_of(score ? &*score : nullptr, mask ? &*mask : nullptr, functions.name);
}

std::string source_of_all() {
  std::string text, list;
  const auto add = [&](const std::string &name, const std::string &source) {
    text += source;
    list += "  EACH(" + name + ") \\\n";
  };
  for (const test::NamedFunctions &each : test::named_functions()) add(each.name, source_of(each));
  for (uint64_t seed = 0; seed < kRandomFunctions; ++seed) {
    const RandomFunctions random(seed);
    add(random.name(), source_of(&random.score, &random.mask, random.name()));
  }
  return text + "#define FLASHSPARK_ALL_FUNCTIONS(EACH) \\\n" + list + "\n";
}

}  // namespace
}  // namespace flashspark::emulator

int main(int argc, char **argv) try {
  using namespace flashspark;
  if (argc != 3) return 2;
  const std::string name = argv[1];
  const test::NamedFunctions functions = test::named(name);
  if (name != "--all" && functions.name == nullptr) {
    std::fprintf(stderr, "no functions are called %s\n", argv[1]);
    return 2;
  }
  std::ofstream file(argv[2]);
  file << "// Written by tests/emulator/function_source.cpp.\n#include \"attention/function_mod.cuh\"\n\n"
       << (name == "--all" ? emulator::source_of_all() : emulator::source_of(functions));
  return file.flush() ? 0 : 1;
} catch (const std::exception &error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
