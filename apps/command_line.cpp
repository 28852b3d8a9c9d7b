#include "apps/command_line.h"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <array>
#include <iterator>
#include <string_view>

#include "core/error.h"
#include "core/nearest_name.h"
#include "io/config_file.h"

namespace distill {

namespace {

constexpr std::string_view footer = R"(
Examples:
  distill --config run.yaml                                    both roles in turn, on one rank
  mpirun -np 2 distill --config run.yaml                       one student rank, one teacher rank
  mpirun -np 2 distill --config run.yaml student.training_args.learning_rate=1e-4 max_steps=100
  distill --config-path configs --config-name run              the same as --config configs/run.yaml
  distill --config run.yaml resume_from_checkpoint=true        continue after an interruption
  distill check --config run.yaml --ranks 16                   validate and show the plan, without training
  distill encode --config run.yaml                             encode the records once, for all runs that follow
  distill metrics run --plot train/loss,student/val_loss       look at a run, finished or not
  distill inspect output/run                                   list and verify the checkpoints of a run
  distill export output/run/checkpoints/step-000100 student    a checkpoint's student as a Hugging Face folder

Exit codes:
  0   finished
  1   internal error, or a failure of the machine
  2   bad input: command line, configuration, model or data
  3   another rank died, or gave nothing for too long
  4   loss or gradient were not finite for max_nonfinite_steps steps in a row, or an outlier (outlier_action: stop)
  85  stopped by a signal or a time limit after saving: run the same command again)";

// Whether a command takes the configuration, overrides and options of training.
enum class Configuration { needed, optional, none };

// A command beside training: one row. Its options may be positional.
struct CommandRow {
  Command command;
  Configuration configuration;
  std::string name, description;
  void (*add_options)(CLI::App& app, CommandLine& line);
};

// What the parser fills in before it is judged.
struct Parsed {
  std::string config, config_path, config_name, max_time;
  bool help_config = false, version = false;
  const CommandRow* row = nullptr;  // null: training
  CommandLine line;

  Configuration configuration() const { return row ? row->configuration : Configuration::needed; }
  bool names_config() const { return !config.empty() || !config_name.empty() || !config_path.empty(); }
};

void add_metrics_options(CLI::App& app, CommandLine& line) {
  MetricsRequest& request = line.metrics;
  // An override of the configuration is no name: it goes on to the options of distill.
  const auto is_name = [](const std::string& word) {
    return word.find('=') == std::string::npos ? "" : "expected a name, not key=value";
  };
  app.validate_positionals();
  app.add_option("RUN", request.run, "The run's name (exp_name; its folder is in logging_dir), or the folder")
      ->required()
      ->check(CLI::Validator(is_name, ""))
      ->type_name("");
  auto* csv = app.add_flag("--csv", request.as_csv, "Print all values as CSV");
  app.add_flag("--h5", request.from_hdf5, "Read metrics.h5 (default: metrics.csv where there is one)");
  auto* plot = app.add_option("--plot", request.plot, "Plot metrics; several by commas or by more --plot")
                   ->delimiter(',')
                   ->allow_extra_args(false)
                   ->excludes(csv)
                   ->type_name("NAME");
  app.add_flag("--summary")
      ->description("Print a table: first, last, least, greatest, mean of the last tenth (the default)")
      ->excludes(csv)
      ->excludes(plot);
  app.add_option("--svg", request.svg, "Plot into this SVG file, which every browser shows (there is no PNG)")
      ->needs(plot)
      ->type_name("FILE");
  app.add_flag("--log", request.log, "Plot on a logarithmic axis")->needs(plot);
}

const std::vector<CommandRow>& commands() {
  static const std::vector<CommandRow> rows = {
      {Command::check, Configuration::needed, "check",
       "Read and validate everything that can be validated without training; show the plan",
       [](CLI::App& app, CommandLine& line) {
         app.add_option("--ranks", line.ranks, "Ranks to plan for (default: as many as were started)")
             ->check(CLI::Range(1, 1 << 20).description(""))
             ->type_name("N");
       }},
      {Command::encode, Configuration::needed, "encode",
       "Encode the records and keep them in <output_dir>/encoded, where later runs with the same data find them",
       [](CLI::App&, CommandLine&) {}},
      {Command::metrics, Configuration::optional, "metrics",
       "Look at the metrics of a run: finished, going on or killed", add_metrics_options},
      {Command::inspect, Configuration::none, "inspect",
       "Show what a checkpoint holds and verify every byte; list those of a run",
       [](CLI::App& app, CommandLine& line) {
         app.add_option("PATH", line.path, "A checkpoint, a folder of checkpoints, or the folder of a run")->required();
         app.add_flag("--tensors", line.each_tensor, "Show every tensor, not only a summary");
       }},
      {Command::export_checkpoint, Configuration::none, "export",
       "Write the student of a checkpoint as a Hugging Face folder",
       [](CLI::App& app, CommandLine& line) {
         app.add_option("CHECKPOINT", line.path, "The checkpoint: a folder step-…")->required();
         app.add_option("OUT", line.out, "The folder to write; must not exist")->required();
         app.add_option("--model", line.model, "Folder of the student, where it is no longer where the run found it")
             ->type_name("FOLDER");
       }},
  };
  return rows;
}

std::vector<std::string> command_names() {
  std::vector<std::string> names;
  for (const CommandRow& row : commands()) names.push_back(row.name);
  return names;
}

void add_options(CLI::App& app, Parsed& parsed) {
  app.set_help_flag("-h,--help", "Show this help");
  app.add_option("--config", parsed.config, "Configuration file (YAML)")->type_name("FILE");
  app.add_option("--config-path,--config_path", parsed.config_path, "Folder of the configuration")->type_name("DIR");
  app.add_option("--config-name,--config_name", parsed.config_name, "Its name without .yaml")->type_name("NAME");
  app.add_option("--max-time", parsed.max_time, "Wall-clock limit such as 3h55m: save and leave with 85")
      ->type_name("TIME");
  app.add_flag("--help-config", parsed.help_config, "Show all configuration keys: default, allowed values, meaning");
  app.add_flag("--version", parsed.version, "Show version, backends and libraries");
  app.add_option("overrides", parsed.line.overrides,
                 "key=value: overrides a key of the configuration by its dotted path");
  for (const CommandRow& row : commands()) {
    CLI::App* sub = app.add_subcommand(row.name, row.description);
    sub->set_help_flag("-h,--help", "Show this help");
    sub->fallthrough();
    if (row.configuration != Configuration::none)
      sub->footer("The options and overrides of distill apply as well: distill --help");
    row.add_options(*sub, parsed.line);
    sub->callback([&parsed, &row] { parsed.row = &row; });
  }
  app.require_subcommand(0, 1);  // what follows a command may be named like another
  app.footer(std::string(footer));
  app.allow_extras();
}

// An option, of the program or of a command, that takes the next argument as its value.
bool takes_value(const CLI::App& app, const std::string& argument) {
  const auto takes = [&](const CLI::App* a) {
    const CLI::Option* option = argument.starts_with("-") ? a->get_option_no_throw(argument) : nullptr;
    return option && option->get_items_expected_max() > 0;
  };
  const std::vector<const CLI::App*> subs = app.get_subcommands({});
  return takes(&app) || std::any_of(subs.begin(), subs.end(), takes);
}

// Puts the command first, so that its options are understood wherever they stand.
std::vector<std::string> command_first(const CLI::App& app, std::span<const std::string> arguments) {
  std::vector<std::string> ordered(arguments.begin(), arguments.end());
  const std::vector<std::string> names = command_names();
  for (std::size_t i = 0; i < ordered.size(); ++i) {
    if (takes_value(app, ordered[i])) {
      ++i;
    } else if (std::find(names.begin(), names.end(), ordered[i]) != names.end()) {
      std::rotate(ordered.begin(), ordered.begin() + std::ptrdiff_t(i), ordered.begin() + std::ptrdiff_t(i) + 1);
      break;
    }
  }
  return ordered;
}

void check_no_unknown_option(const CLI::App& app) {
  const std::vector<std::string> extras = app.remaining(true);
  if (extras.empty()) return;
  const std::string name = extras.front().substr(0, extras.front().find('='));
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) names.push_back(option->get_name());
  for (const CLI::App* command : app.get_subcommands({})) {
    check_input(!command->get_option_no_throw(name), "option '", name, "' belongs to 'distill ", command->get_name(),
                "'");
    for (const CLI::Option* option : command->get_options()) names.push_back(option->get_name());
  }
  const std::string guess = nearest_name(name, names);
  fail_input("unknown option '", extras.front(), "'",
             guess.empty() ? ": distill --help lists all options; overrides are written key=value"
                           : text(": did you mean '", guess, "'?"));
}

void check_overrides(const Parsed& parsed) {
  for (const std::string& argument : parsed.line.overrides) {
    if (argument.find('=') != std::string::npos) continue;
    if (argument.ends_with(".yaml") || argument.ends_with(".yml"))
      fail_input("unexpected argument '", argument, "': did you mean '--config ", argument, "'?");
    check_input(!parsed.row, "unexpected argument '", argument, "': expected key=value");
    const std::string guess = nearest_name(argument, command_names());
    fail_input(
        "unknown command '", argument, "': ",
        guess.empty() ? "expected key=value or a command of distill --help" : text("did you mean '", guess, "'?"));
  }
}

// A command that works on files alone.
void check_unconfigured(const Parsed& parsed) {
  const auto refuse = [&](const std::string& what) {
    fail_input("'distill ", parsed.row->name, "' takes no ", what, ": distill ", parsed.row->name, " --help");
  };
  if (!parsed.line.overrides.empty()) refuse(text("'", parsed.line.overrides.front(), "'"));
  if (parsed.names_config()) refuse("configuration");
  if (!parsed.max_time.empty()) refuse("--max-time");
}

std::filesystem::path config_file(const Parsed& parsed) {
  const bool by_name = !parsed.config_name.empty() || !parsed.config_path.empty();
  check_input(parsed.config.empty() || !by_name,
              "--config and --config-path/--config-name are two ways to say the same: ", "expected one of them");
  if (!parsed.config.empty()) return parsed.config;
  check_input(by_name, "no configuration: expected --config FILE, or --config-path DIR --config-name NAME");
  check_input(!parsed.config_name.empty(), "--config-path ", parsed.config_path,
              " without --config-name: expected both");
  const bool has_ending = parsed.config_name.ends_with(".yaml") || parsed.config_name.ends_with(".yml");
  return std::filesystem::path(parsed.config_path) / (parsed.config_name + (has_ending ? "" : ".yaml"));
}

CommandLine printing(std::string output) {
  CommandLine line;
  line.command = Command::print;
  line.output = std::move(output);
  return line;
}

}  // namespace

CommandLine parse_command_line(std::span<const std::string> arguments, const std::function<std::string()>& version) {
  CLI::App app("Distils a teacher language model into a student.", "distill");
  Parsed parsed;
  add_options(app, parsed);
  std::vector<std::string> ordered = command_first(app, arguments);
  std::reverse(ordered.begin(), ordered.end());  // as CLI::App::parse wants it
  try {
    app.parse(ordered);
  } catch (const CLI::CallForHelp&) {
    return printing(app.help());
  } catch (const CLI::ParseError& e) {
    fail_input("command line: ", e.what(), "; see distill --help");
  }
  check_no_unknown_option(app);
  if (parsed.help_config) return printing(config_help());
  if (parsed.version) return printing(version());
  if (parsed.row) parsed.line.command = parsed.row->command;
  if (parsed.configuration() == Configuration::none) {
    check_unconfigured(parsed);
    return parsed.line;
  }
  check_overrides(parsed);
  if (parsed.configuration() == Configuration::needed || parsed.names_config())
    parsed.line.config = config_file(parsed);
  if (!parsed.max_time.empty()) parsed.line.overrides.push_back("max_time=" + parsed.max_time);
  return parsed.line;
}

std::string command_line_library_version() { return text("CLI11 ", CLI11_VERSION); }

}  // namespace distill
