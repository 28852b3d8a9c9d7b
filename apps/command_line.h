// The command line of distill: which command, which configuration, which overrides. See `distill --help`.
#pragma once

#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace distill {

enum class Command {
  train,
  check,
  encode,
  metrics,
  inspect,
  export_checkpoint,
  print  // --help, --help-config, --version: show CommandLine::output and leave with 0
};

// distill metrics
struct MetricsRequest {
  std::string run;  // its name, or a folder
  bool as_csv = false, from_hdf5 = false, log = false;
  std::vector<std::string> plot;  // names; none: the summary
  std::string svg;                // the file to plot into; none: the terminal
};

struct CommandLine {
  Command command = Command::train;
  std::filesystem::path config;
  std::vector<std::string> overrides;  // key=value, in the order given; --max-time is one of them
  int ranks = 0;                       // check: ranks to plan for; 0: as many as were started
  MetricsRequest metrics;
  std::string path;          // inspect, export_checkpoint: what to read
  bool each_tensor = false;  // inspect: not only a summary
  std::string out, model;    // export_checkpoint: folder to write; student's folder, empty: the run's
  std::string output;
};

// `arguments` without the program's name. `version` composes what --version shows. What cannot be understood is an
// input error that says what was expected.
CommandLine parse_command_line(std::span<const std::string> arguments, const std::function<std::string()>& version);

// "CLI11 2.1.2"
std::string command_line_library_version();

}  // namespace distill
