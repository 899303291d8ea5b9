// Errors inside the library are exceptions. api.cpp turns them into a status and a text; none crosses the C ABI.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "flashspark/flashspark.h"

namespace flashspark {

class Error : public std::runtime_error {
 public:
  Error(flashspark_status status, const std::string &what) : std::runtime_error(what), status_(status) {}
  flashspark_status status() const { return status_; }

 private:
  flashspark_status status_;
};

// "page_size = 24: must be a multiple of 16"
[[noreturn]] void fail(const std::string &argument, const std::string &value, const std::string &rule,
                       flashspark_status status = FLASHSPARK_INVALID_ARGUMENT);
[[noreturn]] void fail(const std::string &argument, const char *value, const std::string &rule,
                       flashspark_status status = FLASHSPARK_INVALID_ARGUMENT);
[[noreturn]] void fail(const std::string &argument, int64_t value, const std::string &rule);
[[noreturn]] void fail(const std::string &argument, double value, const std::string &rule);

void set_last_error(const char *text) noexcept;
const char *last_error() noexcept;

}  // namespace flashspark
