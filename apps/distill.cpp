// distill: trains a student language model to match a teacher. Assembles the parts and owns nothing else.
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "apps/command_line.h"
#include "apps/devices.h"
#include "apps/encode_command.h"
#include "apps/export_checkpoint.h"
#include "apps/inspect.h"
#include "apps/job.h"
#include "apps/metrics_command.h"
#include "apps/models.h"
#include "apps/progress.h"
#include "apps/run_plan.h"
#include "apps/signals.h"
#include "apps/version.h"
#include "kernels/gpus.h"
#include "parallel/parallel.h"

namespace distill {
namespace {

// mpirun gives ranks no terminal for their standard error, so there it is lines.
Say progress_line(bool shown) {
  if (!shown) return [](const std::string&) {};
  return Progress(std::cerr, isatty(STDERR_FILENO));
}

// The names of the nodes by rank; none where `check --ranks N` plans for N ranks on one node, whatever was started.
std::vector<std::string> plan_hosts(const Communicator& world, int ranks) {
  return ranks > 0 ? std::vector<std::string>() : hosts_of(world);
}

std::vector<int> plan_nodes(const Communicator& world, int ranks) {
  return ranks > 0 ? std::vector<int>(std::size_t(ranks), 0) : nodes_of(world);
}

Patience patience_of(const Config& config) {
  const auto milliseconds = [](Seconds time) { return std::chrono::ceil<std::chrono::milliseconds>(time); };
  Patience patience;
  patience.peer_dead_after = milliseconds(config.peer_dead_after);
  patience.peer_timeout = milliseconds(config.peer_timeout);
  return patience;
}

bool is_about_files(Command command) {
  return command == Command::metrics || command == Command::inspect || command == Command::export_checkpoint;
}

// Needs one rank, whatever was started.
ExitCode work_on_files(const CommandLine& command, Communicator& world, const Say& say) {
  ExitCode code = ExitCode::ok;
  world.run_together([&] {
    if (world.rank() != 0) return;
    if (command.command == Command::inspect)
      code = inspect(command.path, command.each_tensor, say);
    else if (command.command == Command::metrics)
      std::cout << show_metrics(command);
    else
      export_checkpoint(command.path, command.out, command.model, say);
  });
  return code;
}

ExitCode run(MpiSession& mpi, const std::vector<std::string>& arguments, Clock::time_point started) {
  Communicator& world = mpi.world();
  const bool speaks = world.rank() == 0;
  const Say say = [&](const std::string& line) {
    if (speaks) std::cout << line << std::endl;
  };
  CommandLine command;
  std::optional<RunPlan> plan;
  int threads = 1;
  world.run_together([&] { command = parse_command_line(arguments, version_text); });
  if (command.command == Command::print) {
    if (speaks) std::cout << command.output;
    return ExitCode::ok;
  }
  if (is_about_files(command.command)) return work_on_files(command, world, say);
  threads = compute_threads(world);
  ConfigFile file;
  Grid grid;
  world.run_together([&] {
    file = read_config(command.config, command.overrides, Capabilities{.cuda = is_built_with_cuda()});
    world.set_patience(patience_of(file.config));
    if (speaks)
      for (const std::string& warning : file.warnings) std::cerr << "warning: " << warning << std::endl;
    if (command.command == Command::encode) return;
    grid = plan_grid(file, plan_nodes(world, command.ranks), plan_hosts(world, command.ranks));
    // A checkpoint that this run may not go on from is an error before its data is read.
    check_checkpoints(file, checkpoint_run(file.config, grid, threads));
  });
  mpi.watch_nodes(world.patience().peer_dead_after);
  const Say progress = progress_line(speaks);
  if (command.command == Command::encode) {
    encode_and_keep(world, file, threads, say, progress);
    return ExitCode::ok;
  }
  // The devices of other ranks than these are not known here.
  const RunDevices devices = command.ranks > 0 ? RunDevices{} : find_devices(file.config, grid, world);
  const bool on_gpus = command.ranks > 0 ? file.config.device == DeviceChoice::cuda : devices.are_gpus();
  plan.emplace(make_plan(file, grid, on_gpus, world, threads, progress));
  progress("");
  if (speaks)
    for (const std::string& warning : plan->warnings) std::cerr << "warning: " << warning << std::endl;
  say(describe(*plan) + (command.ranks > 0 ? "" : text("  compute threads per rank: ", threads, "\n")));
  if (plan->grid.places.size() > 1)
    say(describe(plan->grid, plan->student.tied_head, plan_hosts(world, command.ranks)));
  if (command.ranks == 0) say(describe(devices, plan->grid, world));
  if (devices.are_gpus()) mpi.watch_ranks(world.patience().peer_dead_after);
  if (command.command == Command::check) {
    // Training says what differs when it resumes. The threads of other ranks than these are not known.
    std::vector<std::string> differences;
    world.run_together([&] {
      differences =
          check_checkpoints(file, checkpoint_run(file.config, grid, command.ranks > 0 ? 0 : threads, &plan->train));
    });
    if (speaks)
      for (const std::string& difference : differences) std::cerr << "warning: " << difference << std::endl;
    say("check: all good");
    return ExitCode::ok;
  }
  return run_job(*plan, devices, mpi, threads, started, say);
}

// libgomp reads when it is loaded how long a waiting thread spins, by default for milliseconds. Where ranks or other
// programs share the cores, the spinning keeps those from them that are waited for (measured on two busy cores: steps 3
// to 5 times longer), so the program starts again with a short spin unless the user has said something.
void spin_briefly(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") || std::getenv("GOMP_SPINCOUNT")) return;
  setenv("GOMP_SPINCOUNT", "1000", 1);
  execv("/proc/self/exe", argv);  // returns only where /proc is missing: then all goes on, waiting as before
}

// What all ranks know of is one message and one exit code; they end together.
int leave(MpiSession& mpi, const CommonError& error) {
  if (mpi.me().world_rank == 0) std::cerr << "distill: " << error.what() << std::endl;
  return int(error.code());
}

int run_with_mpi(MpiSession& mpi, const std::vector<std::string>& arguments, Clock::time_point started) {
  try {
    return int(run(mpi, arguments, started));
  } catch (const CommonError& error) {
    return leave(mpi, error);
  } catch (const Error& error) {
    return end_run(mpi, error.what(), error.code());
  } catch (const std::exception& error) {
    return end_run(mpi, error.what(), ExitCode::internal);
  }
}

}  // namespace
}  // namespace distill

// The only handlers: here of what fails before MPI has begun.
int main(int argc, char** argv) try {
  using namespace distill;
  spin_briefly(argv);
  take_stop_signals();
  const Clock::time_point started = Clock::now();
  MpiSession mpi(argc, argv);
  return run_with_mpi(mpi, std::vector<std::string>(argv + 1, argv + argc), started);
} catch (const std::exception& error) {
  std::cerr << "distill: " << error.what() << std::endl;
  return int(distill::ExitCode::internal);
}
