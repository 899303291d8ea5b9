// Options and help. CLI11 takes seconds to compile, so nothing else includes it.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <string>

#include "cli/cli.hpp"
#include "flashspark/flashspark.h"

namespace {

using namespace flashspark::cli;

constexpr char kFooter[] = R"(Examples:
  flashspark doctor                      what this machine has and which implementation each problem gets
  flashspark verify                      every feature against the double-precision oracle
  flashspark bench --plot bench.svg      how fast, and how far from the machine's limits

Exit status: 0 fine, 1 a check failed, 2 wrong usage.)";

void add_doctor(CLI::App &app, DoctorOptions &o) {
  auto *sub =
      app.add_subcommand("doctor", "Machine, implementations and Python environment; each trouble with its mend");
  sub->add_flag("--json", o.json, "Print JSON");
  sub->add_flag("--bandwidth", o.bandwidth, "Measure the FMA peak and the copy bandwidth (one second)");
  sub->add_flag("-v,--verbose", o.verbose, "Print the whole explanation of every choice");
  sub->footer(
      "Examples:\n  flashspark doctor\n  flashspark doctor --bandwidth --json | jq .machine\n\n"
      "Exit status: 0 no errors, 1 at least one error, 2 wrong usage.");
}

void add_verify(CLI::App &app, VerifyOptions &o) {
  auto *sub = app.add_subcommand("verify",
                                 "Three guide checks and the feature matrix, each against the oracle, on GPU and CPU");
  sub->add_option("--filter", o.filter, "Only cases whose name contains TEXT")->type_name("TEXT");
  sub->add_option("--implementation", o.implementation, "Only this implementation")->type_name("NAME");
  sub->add_flag("--cpu", o.cpu, "Stay on the CPU where there is a GPU too");
  sub->add_option("--threads", o.threads, "CPU threads, up to 1024 (0: all)")
      ->check(CLI::Range(0, 1024).description(""))
      ->type_name("N");
  sub->add_option("--seed", o.seed, "Other random inputs")->type_name("N");
  sub->add_option("--report", o.report, "Write one JSON file with results and machine facts")->type_name("FILE");
  sub->add_flag("--list", o.list, "Print the names of the cases and run nothing");
  sub->add_flag("-v,--verbose", o.verbose, "A line for every case");
  sub->add_flag("--json", o.json, "Print JSON");
  sub->add_flag("--vllm", o.vllm, "The installed vLLM's FLASH_ATTN backend on random batches; --seed, --verbose apply")
      ->excludes("--filter", "--implementation", "--cpu", "--report", "--list", "--json");
  sub->footer(
      "Examples:\n  flashspark verify\n  flashspark verify --filter guide\n"
      "  flashspark verify --filter paged --implementation cpu-engine --verbose\n"
      "  flashspark verify --seed 7 --report verify.json\n\n"
      "Exit status: 0 every case passed, 1 one failed, 2 wrong usage.");
}

void add_bench_options(CLI::App *sub, BenchOptions &o, const char *plot) {
  sub->add_option("--filter", o.filter, "Only cases whose name contains TEXT")->type_name("TEXT");
  sub->add_option("--implementation", o.implementation, "This one instead of dispatch's choice")->type_name("NAME");
  sub->add_flag("--cpu", o.cpu, "Stay on the CPU where there is a GPU too");
  sub->add_option("--threads", o.threads, "CPU threads, up to 1024 (0: all)")
      ->check(CLI::Range(0, 1024).description(""))
      ->type_name("N");
  sub->add_option("--seconds", o.seconds, "Time to spend on one case, 0.01 to 600")
      ->check(CLI::Range(0.01, 600.0).description(""))
      ->capture_default_str()
      ->type_name("S");
  sub->add_option("--seed", o.seed, "Other random inputs")->type_name("N");
  sub->add_option("--plot", o.plot, plot)->type_name("FILE.svg");
  sub->add_flag("--list", o.list, "Print the names of the cases and run nothing");
  sub->add_flag("--json", o.json, "Print JSON");
}

void add_bench(CLI::App &app, BenchOptions &o, BenchOptions &decode_options) {
  auto *sub = app.add_subcommand(
      "bench", "Times the guide checks, prefill and decode, on the GPU if there is one, against limits");
  add_bench_options(sub, o, "Write a bar chart");
  sub->add_flag("--matrix", o.matrix, "The feature matrix too");
  sub->footer(
      "Examples:\n  flashspark bench\n  flashspark bench --filter decode --plot decode.svg\n"
      "  flashspark bench --threads 1 --json > bench.json\n\n"
      "Exit status: 0 fine, 1 a case could not run, 2 wrong usage.");

  auto *decode = sub->add_subcommand(
      "decode", "Times decode and verification over paged caches: a grid of heads, batch, context and rows");
  for (CLI::Option *option : sub->get_options()) decode->excludes(option);  // it has its own
  decode_options.seconds = 0.05;
  add_bench_options(decode, decode_options, "Write a chart of time against batch x context");
  decode->add_flag("--full", decode_options.full, "The whole grid of thousands");
  decode->footer(
      "Examples:\n  flashspark bench decode --plot decode.svg\n  flashspark bench decode --filter 64/8-D128\n"
      "  flashspark bench decode --full --filter q1-page16-bf16 --json > decode.json\n\n"
      "Exit status: 0 fine, 1 a case could not run, 2 wrong usage.");
}

void add_uninstall(CLI::App &app) {
  auto *sub = app.add_subcommand("uninstall", "Removes the start-up hook for vLLM from the Python environment");
  sub->footer(
      "Examples:\n  flashspark uninstall && pip uninstall flashspark\n\nExit status: 0, 1 a file could not be "
      "removed.");
}

}  // namespace

int main(int argc, char **argv) {
  CLI::App app("flashspark: FlashAttention for NVIDIA SM12x GPUs and for any CPU", "flashspark");
  app.set_version_flag("--version", std::string("flashspark ") + flashspark_version());
  app.require_subcommand(0, 1);  // CLI11's message for a misspelt subcommand would not name it if one were required
  app.footer(kFooter);
  DoctorOptions doctor_options;
  VerifyOptions verify_options;
  BenchOptions bench_options, decode_options;
  add_doctor(app, doctor_options);
  add_verify(app, verify_options);
  add_bench(app, bench_options, decode_options);
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
  try {
    if (app.got_subcommand("doctor")) return doctor(doctor_options);
    if (app.got_subcommand("verify")) return verify_options.vllm ? verify_vllm(verify_options) : verify(verify_options);
    if (app.got_subcommand("uninstall")) return uninstall();
    return app.get_subcommand("bench")->got_subcommand("decode") ? bench_decode(decode_options) : bench(bench_options);
  } catch (const UsageError &e) {
    std::fprintf(stderr, "flashspark: %s\n", e.what());
    return kUsage;
  } catch (const std::exception &e) {
    std::fprintf(stderr, "flashspark: %s\n", e.what());
    return kFailed;
  }
}
