#include "apps/command_line.h"

#include <catch2/catch.hpp>

#include "io/config_file.h"
#include "test/support/refusal.h"

using namespace distill;

namespace {

using Words = std::vector<std::string>;

CommandLine parse(const Words& words) {
  return parse_command_line(words, [] { return std::string("distill 9.9"); });
}

std::string refused(const Words& words) {
  return test::refusal("", [&] { parse(words); });
}

}  // namespace

TEST_CASE("training is what happens without a command") {
  const CommandLine line =
      parse({"--config", "x.yaml", "seed=1", "student.data_args.file_name=[a, b]", "exp_name=a=b"});
  CHECK(line.command == Command::train);
  CHECK(line.config == "x.yaml");
  CHECK(line.overrides == Words{"seed=1", "student.data_args.file_name=[a, b]", "exp_name=a=b"});
  CHECK(line.ranks == 0);
}

TEST_CASE("ways to name the configuration") {
  CHECK(parse({"--config=x.yaml"}).config == "x.yaml");
  CHECK(parse({"seed=1", "--config", "x.yaml"}).config == "x.yaml");
  CHECK(parse({"--config-path", "dir", "--config-name", "run"}).config == "dir/run.yaml");
  CHECK(parse({"--config_path", "dir", "--config_name", "run"}).config == "dir/run.yaml");
  CHECK(parse({"--config-name", "run.yaml"}).config == "run.yaml");
}

TEST_CASE("options and overrides apply to a command wherever they stand") {
  const std::vector<Words> orders = {{"check", "--config", "x.yaml", "--ranks", "4", "a=1", "b=2"},
                                     {"--config", "x.yaml", "a=1", "check", "b=2", "--ranks", "4"},
                                     {"--ranks", "4", "--config", "x.yaml", "a=1", "b=2", "check"},
                                     {"a=1", "--ranks=4", "check", "--config=x.yaml", "b=2"}};
  for (const Words& words : orders) {
    const CommandLine line = parse(words);
    CHECK(line.command == Command::check);
    CHECK(line.config == "x.yaml");
    CHECK(line.ranks == 4);
    CHECK(line.overrides == Words{"a=1", "b=2"});
  }
  CHECK(parse({"--config", "x.yaml", "encode"}).command == Command::encode);
  const CommandLine named_check = parse({"--config-name", "check"});
  CHECK(named_check.command == Command::train);
  CHECK(named_check.config == "check.yaml");
}

TEST_CASE("commands on files take positional arguments and no configuration") {
  const CommandLine inspect = parse({"inspect", "a/step-000001", "--tensors"});
  CHECK(inspect.command == Command::inspect);
  CHECK(inspect.path == "a/step-000001");
  CHECK(inspect.each_tensor);
  CHECK_FALSE(parse({"--tensors", "inspect", "x=y"}).path.empty());
  // A folder may be named like a command.
  for (const Words& words : std::vector<Words>{{"export", "inspect", "check", "--model", "export"},
                                               {"--model=export", "export", "inspect", "check"}}) {
    const CommandLine line = parse(words);
    CHECK(line.command == Command::export_checkpoint);
    CHECK(line.path == "inspect");
    CHECK(line.out == "check");
    CHECK(line.model == "export");
  }
  CHECK(parse({"export", "a", "b"}).model.empty());
  CHECK_THAT(parse({"export", "--help"}).output, Catch::Contains("CHECKPOINT") && Catch::Contains("--model FOLDER"));

  CHECK(refused({"inspect"}) == "command line: PATH is required; see distill --help");
  CHECK(refused({"export", "a"}) == "command line: OUT is required; see distill --help");
  CHECK(refused({"inspect", "a", "b"}) == "'distill inspect' takes no 'b': distill inspect --help");
  CHECK(refused({"inspect", "a", "--config", "x.yaml"}) ==
        "'distill inspect' takes no configuration: distill inspect --help");
  CHECK(refused({"export", "a", "b", "--max-time", "1h"}) ==
        "'distill export' takes no --max-time: distill export --help");
  CHECK(refused({"export", "a", "b", "--tensors"}) == "option '--tensors' belongs to 'distill inspect'");
  CHECK(refused({"inspekt", "a"}) == "unknown command 'inspekt': did you mean 'inspect'?");
  CHECK(refused({"exprot", "a", "b"}) == "unknown command 'exprot': did you mean 'export'?");
}

TEST_CASE("a time limit is an override that wins") {
  CHECK(parse({"--config", "x.yaml", "--max-time", "3h55m", "max_time=1h"}).overrides ==
        Words{"max_time=1h", "max_time=3h55m"});
}

TEST_CASE("metrics of a run need no configuration") {
  const CommandLine line = parse({"metrics", "demo", "--h5"});
  CHECK(line.command == Command::metrics);
  CHECK(line.config.empty());
  CHECK(line.metrics.run == "demo");
  CHECK(line.metrics.from_hdf5);
  CHECK(line.metrics.plot.empty());
  const std::vector<Words> orders = {
      {"metrics", "demo", "--plot", "a,b", "--plot", "c", "--log", "--svg", "x.svg", "logging_dir=logs"},
      {"logging_dir=logs", "metrics", "--plot", "a,b", "demo", "--svg=x.svg", "--log", "--plot", "c"},
      {"--log", "--plot=a,b", "--svg", "x.svg", "--plot", "c", "metrics", "logging_dir=logs", "demo"}};
  for (const Words& words : orders) {
    const CommandLine plots = parse(words);
    CHECK(plots.metrics.run == "demo");
    CHECK(plots.metrics.plot == Words{"a", "b", "c"});
    CHECK(plots.metrics.log);
    CHECK(plots.metrics.svg == "x.svg");
    CHECK(plots.overrides == Words{"logging_dir=logs"});
  }
  CHECK(parse({"metrics", "--summary", "--config", "x.yaml", "demo"}).config == "x.yaml");
  CHECK(refused({"metrics"}) == "command line: RUN is required; see distill --help");
  CHECK(refused({"metrics", "logging_dir=logs"}) == "command line: RUN is required; see distill --help");
  CHECK(refused({"metrics", "demo", "more"}) == "unexpected argument 'more': expected key=value");
  CHECK(refused({"metrics", "demo", "--csv", "--plot", "a"}) ==
        "command line: --csv excludes --plot; see distill --help");
  CHECK(refused({"metrics", "demo", "--svg", "x.svg"}) == "command line: --svg requires --plot; see distill --help");
}

TEST_CASE("help and version are texts to print") {
  const CommandLine help = parse({"--help"});
  CHECK(help.command == Command::print);
  for (const char* part :
       {"--config FILE", "--config-name", "--max-time", "--help-config", "--version", "check ", "encode ",
        "Examples:", "mpirun -np 2 distill --config run.yaml", "Exit codes:", "85  stopped by a signal"})
    CHECK_THAT(help.output, Catch::Contains(part));
  CHECK_THAT(parse({"check", "--help"}).output, Catch::Contains("--ranks N"));
  CHECK(parse({"--version"}).output == "distill 9.9");
  CHECK(parse({"--config", "x.yaml", "--version"}).command == Command::print);
  CHECK(parse({"--help-config"}).output == config_help());
}

TEST_CASE("wrong command lines") {
  CHECK(refused({}) == "no configuration: expected --config FILE, or --config-path DIR --config-name NAME");
  CHECK(refused({"check"}) == "no configuration: expected --config FILE, or --config-path DIR --config-name NAME");
  CHECK(refused({"--config-path", "dir"}) == "--config-path dir without --config-name: expected both");
  CHECK(refused({"--config", "x.yaml", "--config-name", "y"}) ==
        "--config and --config-path/--config-name are two ways to say the same: expected one of them");
  CHECK(refused({"chekc", "--config", "x.yaml"}) == "unknown command 'chekc': did you mean 'check'?");
  CHECK(refused({"--config", "x.yaml", "chekc"}) == "unknown command 'chekc': did you mean 'check'?");
  CHECK(refused({"train", "--config", "x.yaml"}) ==
        "unknown command 'train': expected key=value or a command of distill --help");
  CHECK(refused({"check", "--config", "x.yaml", "seed"}) == "unexpected argument 'seed': expected key=value");
  CHECK(refused({"x.yaml"}) == "unexpected argument 'x.yaml': did you mean '--config x.yaml'?");
  CHECK(refused({"--confg", "x.yaml"}) == "unknown option '--confg': did you mean '--config'?");
  CHECK(refused({"check", "--config", "x.yaml", "--rank=3"}) == "unknown option '--rank=3': did you mean '--ranks'?");
  CHECK(refused({"--config", "x.yaml", "--student.infer_batch_size=3"}) ==
        "unknown option '--student.infer_batch_size=3': distill --help lists all options; overrides are written "
        "key=value");
  CHECK(refused({"--config", "x.yaml", "--ranks", "3"}) == "option '--ranks' belongs to 'distill check'");
  CHECK(refused({"check", "--config", "x.yaml", "--ranks", "0"}) ==
        "command line: --ranks: Value 0 not in range 1 to 1048576; see distill --help");
  CHECK(refused({"check", "--config", "x.yaml", "--ranks", "many"}) ==
        "command line: --ranks: Value many not in range 1 to 1048576; see distill --help");
  CHECK(refused({"--config"}) == "command line: --config: 1 required FILE missing; see distill --help");
  CHECK(refused({"--config", "a", "--config", "b"}) ==
        "command line: --config: At Most 1 required but received 2; see distill --help");
}
