// What the library asks of the process that it lives in: a POSIX half and a Windows half.
#pragma once

#include <optional>
#include <string>

namespace flashspark {

// Runs `action` in every child that is forked from now on. Windows has no fork.
void at_fork_in_child(void (*action)());

// CPUs that this process may run on; at least 1.
int cpus_of_process();

// A variable of the environment; paths in it are UTF-8.
std::optional<std::string> environment_variable(const char *name);

// The file of the running program; "" if the system does not say.
std::string program_file();

}  // namespace flashspark
