// Facts as JSON, under the same names in every report.
#pragma once

#include <nlohmann/json.hpp>

#include "cases/cases.hpp"
#include "cli/machine.hpp"

namespace flashspark::cli {

using Json = nlohmann::ordered_json;
class GpuSession;

Json to_json(const Machine &machine);
Json to_json(const Limits &limits);
Json to_json(const GpuFacts &facts);
Json to_json(GpuSession &gpu);          // the GPU in use and its limits
Json to_json(const cases::Case &spec);  // enough to rebuild the case
Json report_header();                   // version, time (UTC), machine, GPUs

void print_json(const Json &json);                           // stdout
void write_json(const Json &json, const std::string &path);  // throws if the file cannot be written

}  // namespace flashspark::cli
