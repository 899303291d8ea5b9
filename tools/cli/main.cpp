// Options and help. Only this file includes CLI11, which takes seconds to compile.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "cli/cli.hpp"
#include "cli/measure.hpp"
#include "cli/system.hpp"
#include "flashspark/flashspark.h"

namespace {

using namespace flashspark::cli;

constexpr char kFooter[] = R"(Examples:
  flashspark doctor                      what this machine has and which implementation each problem gets
  flashspark verify                      every feature against the double-precision oracle
  flashspark bench --plot bench.svg      how fast, and how far from the machine's limits

Exit status: 0 fine, 1 a check failed, 2 wrong usage.)";

// Parses a decimal number from `low` to `high` and nothing else. CLI11's own conversion wraps around, reads octal and
// accepts nan.
template <class T>
CLI::Validator number(T low, T high) {
  const auto read = [=](std::string &text) -> std::string {
    T value{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || !(value >= low && value <= high))
      return fmt::format("{} is not a number from {} to {}", text, low, high);
    text = fmt::format("{}", value);
    return {};
  };
  return CLI::Validator(read, "");
}

std::string not_empty(const std::string &text) {
  return text.empty() ? "must not be empty" : "";
}

void add_text(CLI::App *sub, const char *name, std::string &value, const char *help, const char *type) {
  sub->add_option(name, value, help)->check(not_empty)->type_name(type);
}

void add_flag(CLI::App *sub, const char *name, bool &value, const char *help) {
  sub->add_flag(name, value, help)->disable_flag_override();  // --json=maybe is an error
}

void add_threads_and_seed(CLI::App *sub, int &threads, uint64_t &seed) {
  sub->add_option("--threads", threads, "CPU threads, up to 1024 (0: all)")->transform(number(0, 1024))->type_name("N");
  sub->add_option("--seed", seed, "Other random inputs, up to 2^64 - 1")
      ->transform(number<uint64_t>(0, UINT64_MAX))
      ->type_name("N");
}

void add_doctor(CLI::App &app, DoctorOptions &o) {
  auto *sub =
      app.add_subcommand("doctor", "Machine, implementations and Python environment; each trouble with its mend");
  add_flag(sub, "--json", o.json, "Print JSON");
  add_flag(sub, "--bandwidth", o.bandwidth, "Measure the FMA peak and the copy bandwidth (one second)");
  add_flag(sub, "-v,--verbose", o.verbose, "Print the whole explanation of every choice");
  sub->footer(
      "Examples:\n  flashspark doctor\n  flashspark doctor --bandwidth --json | jq .machine\n\n"
      "Exit status: 0 no errors, 1 at least one error, 2 wrong usage.");
}

void add_verify(CLI::App &app, VerifyOptions &o) {
  auto *sub = app.add_subcommand(
      "verify", "Three guide checks, the feature matrix and its gradients, each against the oracle, on GPU and CPU");
  add_text(sub, "--filter", o.filter, "Only cases whose name contains TEXT", "TEXT");
  add_text(sub, "--implementation", o.implementation, "Only this implementation", "NAME");
  add_flag(sub, "--cpu", o.cpu, "Stay on the CPU where there is a GPU too");
  add_threads_and_seed(sub, o.threads, o.seed);
  add_text(sub, "--report", o.report, "Write one JSON file with results and machine facts", "FILE");
  add_flag(sub, "--list", o.list, "Print the names of the cases and run nothing");
  add_flag(sub, "-v,--verbose", o.verbose, "A line for every case");
  add_flag(sub, "--json", o.json, "Print JSON");
  sub->add_flag("--vllm", o.vllm, "The installed vLLM's FLASH_ATTN backend on random batches; --seed, --verbose apply")
      ->disable_flag_override()
      ->excludes("--filter", "--implementation", "--cpu", "--threads", "--report", "--list", "--json");
  sub->get_option("--list")->excludes("--report");
  sub->footer(
      "Examples:\n  flashspark verify\n  flashspark verify --filter guide\n"
      "  flashspark verify --filter paged --implementation cpu-engine --verbose\n"
      "  flashspark verify --filter backward/ --seed 7 --report verify.json\n\n"
      "Exit status: 0 every case passed, 1 one failed, 2 wrong usage.");
}

void add_bench_options(CLI::App *sub, BenchOptions &o, const char *plot) {
  add_text(sub, "--filter", o.filter, "Only cases whose name contains TEXT", "TEXT");
  add_text(sub, "--implementation", o.implementation, "This one instead of dispatch's choice", "NAME");
  add_flag(sub, "--cpu", o.cpu, "Stay on the CPU where there is a GPU too");
  sub->add_option("--seconds", o.seconds, "Time to spend on one case, 0.01 to 600")
      ->transform(number(0.01, 600.0))
      ->capture_default_str()
      ->type_name("S");
  add_threads_and_seed(sub, o.threads, o.seed);
  add_text(sub, "--plot", o.plot, plot, "FILE.svg");
  add_flag(sub, "--list", o.list, "Print the names of the cases and run nothing");
  sub->get_option("--list")->excludes("--plot");
  add_flag(sub, "--json", o.json, "Print JSON");
}

void add_bench(CLI::App &app, BenchOptions &o, BenchOptions &decode_options, BenchOptions &flex_options) {
  auto *sub = app.add_subcommand(
      "bench", "Times the guide checks, prefill and decode, on the GPU if there is one, against limits");
  add_bench_options(sub, o, "Write a bar chart");
  add_flag(sub, "--matrix", o.matrix, "The feature matrix too");
  add_flag(sub, "--backward", o.backward, "Gradients instead of results: training's cases");
  sub->footer(
      "Examples:\n  flashspark bench\n  flashspark bench --filter decode --plot decode.svg\n"
      "  flashspark bench --backward --filter S1024\n"
      "  flashspark bench --threads 1 --json > bench.json\n\n"
      "Exit status: 0 fine, 1 a case could not run, 2 wrong usage.");

  auto *decode = sub->add_subcommand(
      "decode", "Times decode and verification over paged caches: a grid of heads, batch, context and rows");
  const std::vector<CLI::Option *> own = sub->get_options();
  for (CLI::Option *option : own) decode->excludes(option);  // bench decode and bench flex have their own options
  decode_options.seconds = 0.05;
  add_bench_options(decode, decode_options, "Write a chart of time against batch x context");
  add_flag(decode, "--full", decode_options.full, "The whole grid of thousands");
  decode->footer(
      "Examples:\n  flashspark bench decode --plot decode.svg\n  flashspark bench decode --filter 64/8-D128\n"
      "  flashspark bench decode --full --filter q1-page16-bf16 --json > decode.json\n\n"
      "Exit status: 0 fine, 1 a case could not run, 2 wrong usage.");

  auto *flex = sub->add_subcommand(
      "flex", "Times score and mask functions beside the kernel without them: three shapes, smaller ones on the CPU");
  for (CLI::Option *option : own) flex->excludes(option);
  add_bench_options(flex, flex_options, "Write a bar chart");
  add_flag(flex, "--full", flex_options.full, "The GPU's shapes on the CPU, too");
  flex->footer(
      "Examples:\n  flashspark bench flex --plot flex.svg\n  flashspark bench flex --filter A/\n"
      "  flashspark bench flex --filter ALiBi --implementation cpu-engine --json > flex.json\n\n"
      "Exit status: 0 fine, 1 a case could not run, 2 wrong usage.");
}

void add_uninstall(CLI::App &app) {
  auto *sub = app.add_subcommand("uninstall", "Removes the start-up hook for vLLM from the Python environment");
  sub->footer(
      "Examples:\n  flashspark uninstall && pip uninstall flashspark\n\nExit status: 0, 1 a file could not be "
      "removed.");
}

int run(int argc, char **argv) {
  CLI::App app("flashspark: FlashAttention for NVIDIA SM12x GPUs and for any CPU", "flashspark");
  app.set_version_flag("--version", std::string("flashspark ") + flashspark_version());
  app.require_subcommand(0, 1);  // with 1, CLI11's message for a misspelt subcommand would not name it
  app.footer(kFooter);
  DoctorOptions doctor_options;
  VerifyOptions verify_options;
  BenchOptions bench_options, decode_options, flex_options;
  add_doctor(app, doctor_options);
  add_verify(app, verify_options);
  add_bench(app, bench_options, decode_options, flex_options);
  add_uninstall(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError &e) {
    return app.exit(e) == 0 ? kOk : kUsage;  // --help and --version arrive here too, with 0
  }
  if (app.get_subcommands().empty()) {
    std::fputs(app.help().c_str(), stderr);
    return kUsage;
  }
  if (app.got_subcommand("doctor")) return doctor(doctor_options);
  if (app.got_subcommand("uninstall")) return uninstall();
  if (const std::string wrong = environment_error(); !wrong.empty()) throw UsageError(wrong);
  if (app.got_subcommand("verify")) return verify_options.vllm ? verify_vllm(verify_options) : verify(verify_options);
  const CLI::App *bench_command = app.get_subcommand("bench");
  if (bench_command->got_subcommand("flex")) return bench_flex(flex_options);
  return bench_command->got_subcommand("decode") ? bench_decode(decode_options) : bench(bench_options);
}

// Output that could not be written is an error, whatever the command found.
int close_output(int status) {
  errno = 0;
  std::cout.flush();
  const bool failed_before = std::ferror(stdout) != 0;
  if (std::fclose(stdout) == 0 && !failed_before) return status;
  std::fprintf(stderr, "flashspark: cannot write to standard output: %s\n",
               errno != 0 ? std::strerror(errno) : "it is full or closed");
  return status == kOk ? kFailed : status;
}

}  // namespace

int main(int argc, char **argv) {
  prepare_standard_streams();
  int status = kFailed;
  try {
    status = run(argc, argv);
  } catch (const UsageError &e) {
    status = kUsage;
    std::fprintf(stderr, "flashspark: %s\n", e.what());
  } catch (const std::exception &e) {
    // otherwise close_output() reports the error
    if (!std::ferror(stdout)) std::fprintf(stderr, "flashspark: %s\n", e.what());
  }
  return close_output(status);
}
