#include "error.hpp"

#include <cstdio>
#include <cstring>

namespace flashspark {

namespace {
// A fixed buffer: reporting an out-of-memory error must not allocate.
thread_local char last_error_text[4096];
}  // namespace

void fail(const std::string &argument, const std::string &value, const std::string &rule, flashspark_status status) {
  throw Error(status, argument + " = " + value + ": " + rule);
}

void fail(const std::string &argument, const char *value, const std::string &rule, flashspark_status status) {
  fail(argument, std::string(value), rule, status);
}

void fail(const std::string &argument, int64_t value, const std::string &rule) {
  fail(argument, std::to_string(value), rule);
}

void fail(const std::string &argument, double value, const std::string &rule) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", value);
  fail(argument, text, rule);
}

void set_last_error(const char *text) noexcept {
  std::strncpy(last_error_text, text, sizeof last_error_text - 1);
  last_error_text[sizeof last_error_text - 1] = '\0';
}

const char *last_error() noexcept {
  return last_error_text;
}

}  // namespace flashspark
