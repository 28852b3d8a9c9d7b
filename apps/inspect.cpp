#include "apps/inspect.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <map>
#include <set>
#include <sstream>
#include <vector>

#include "io/checkpoint_manifest.h"
#include "io/checkpoint_reader.h"

namespace distill {

namespace {

namespace fs = std::filesystem;

// The message of the input error that work ends with, or nothing.
template <class Work>
std::string problem_of(const Work& work) {
  try {
    work();
  } catch (const Error& problem) {
    return problem.what();
  }
  return {};
}

std::string counted(std::size_t n, const std::string& thing) { return text(n, ' ', thing, n == 1 ? "" : "s"); }

std::uint64_t bytes_of(const CheckpointManifest& manifest) {
  std::uint64_t bytes = 0;
  for (const StoredShard& shard : manifest.shards) bytes += shard.bytes;
  return bytes;
}

std::string size_text(const CheckpointManifest& manifest) {
  return text(bytes_text(double(bytes_of(manifest))), " in ", counted(manifest.shards.size(), "file"));
}

// ", validation loss 2.3456", or nothing.
std::string loss_text(const TrainState& state) {
  if (!state.validation_loss) return {};
  std::array<char, 40> out{};
  std::snprintf(out.data(), out.size(), ", validation loss %.4f", *state.validation_loss);
  return out.data();
}

// A line for each kind: values, master, exp_avg, exp_avg_sq.
void say_kinds(const std::map<std::string, StoredMatrix>& tensors, const Say& say) {
  struct Kind {
    std::size_t tensors = 0;
    double elements = 0;
    std::set<std::string> types;
  };
  std::map<std::string, Kind> kinds;
  for (const auto& [name, tensor] : tensors) {
    Kind& kind = kinds[name.substr(0, name.find('/'))];
    ++kind.tensors;
    kind.elements += double(tensor.whole_rows) * double(tensor.whole_cols);
    kind.types.emplace(name_of(tensor.dtype));
  }
  for (const auto& [name, kind] : kinds) {
    std::string types;
    for (const std::string& type : kind.types) types += (types.empty() ? "" : "/") + type;
    say(text("    ", name, ": ", counted(kind.tensors, "tensor"), ", ", types, ", ", count_text(kind.elements),
             " elements"));
  }
}

void say_tensors(const std::map<std::string, StoredMatrix>& tensors, const Say& say) {
  for (const auto& [name, tensor] : tensors)
    say(text("    ", name, ' ', name_of(tensor.dtype), " [", tensor.whole_rows, ", ", tensor.whole_cols, ']'));
}

void say_facts(const CheckpointManifest& manifest, const Say& say) {
  const TrainState& state = manifest.state;
  const CheckpointRun& run = manifest.run;
  say(text("  step ", state.step, ": ", state.samples, " samples, ", state.tokens, " tokens, ", state.optimizer_updates,
           " optimizer updates", loss_text(state)));
  say(text("  written ", manifest.written, " by distill ", run.version));
  say(text("  grid ", describe(run.grid), "; global batch ", run.samples_per_step, "; seed ", run.seed, "; ",
           counted(std::size_t(run.threads), "compute thread"), " a rank"));
  if (run.data)
    say(text("  training data: ", run.data->records, " records of ", run.data->tokens, " tokens, hash ",
             run.data->hash));
}

// Reads every byte, a line for each file.
std::vector<std::string> check_files(const CheckpointReader& reader, const Say& say) {
  std::vector<std::string> problems;
  for (const StoredShard& shard : reader.manifest().shards) {
    const std::string problem = problem_of([&] { check_shard(reader.path(), shard); });
    say(text("    ", shard.file, ": ", bytes_text(double(shard.bytes)), ", ", counted(shard.datasets.size(), "part"),
             ", ", problem.empty() ? "good" : "damaged"));
    if (!problem.empty()) problems.push_back(problem);
  }
  // Its parts must make up whole tensors.
  for (const auto& [name, whole] : reader.tensors())
    if (const std::string problem = problem_of([&] { reader.check_holds(whole); }); !problem.empty())
      problems.push_back(problem);
  return problems;
}

void say_configuration(const std::string& yaml, const Say& say) {
  say("  configuration");
  std::istringstream lines(yaml);
  for (std::string line; std::getline(lines, line);) say("    " + line);
}

ExitCode inspect_one(const std::string& path, bool each_tensor, const Say& say) {
  const CheckpointReader reader(path, read_manifest(path));
  say(path);
  say_facts(reader.manifest(), say);
  say("  " + size_text(reader.manifest()));
  const std::vector<std::string> problems = check_files(reader, say);
  const std::map<std::string, StoredMatrix> tensors = reader.tensors();
  say("  " + counted(tensors.size(), "tensor"));
  (each_tensor ? say_tensors : say_kinds)(tensors, say);
  say_configuration(reader.manifest().run.config, say);
  for (const std::string& problem : problems) say("damaged: " + problem);
  if (!problems.empty()) return ExitCode::bad_input;
  say("complete: every byte is good");
  return ExitCode::ok;
}

std::string damage_of(const FoundCheckpoint& checkpoint) {
  if (!checkpoint.manifest) return checkpoint.problem;
  std::vector<std::string> problems;
  const std::string problem = problem_of([&] {
    problems = check_files(CheckpointReader(checkpoint.path, *checkpoint.manifest), [](const std::string&) {});
  });
  return problem.empty() && !problems.empty() ? problems.front() : problem;
}

// Nothing where none was validated.
std::string best_path(const std::vector<FoundCheckpoint>& found) {
  std::vector<CompleteCheckpoint> complete;
  for (const FoundCheckpoint& checkpoint : found)
    if (checkpoint.manifest) complete.push_back({checkpoint.path, *checkpoint.manifest});
  std::sort(complete.begin(), complete.end(), [](const CompleteCheckpoint& a, const CompleteCheckpoint& b) {
    return a.manifest.serial > b.manifest.serial;
  });
  const CompleteCheckpoint* best = best_of(complete);
  return best ? best->path : "";
}

ExitCode inspect_all(const std::string& folder, const Say& say) {
  const std::vector<FoundCheckpoint> found = find_checkpoints(folder);
  check_input(!found.empty(), folder, ": holds no checkpoints (step-…)");
  say(folder);
  const std::string best = best_path(found);
  const FoundCheckpoint* newest = nullptr;
  bool all_good = true;
  for (const FoundCheckpoint& checkpoint : found) {
    const std::string damage = damage_of(checkpoint), name = fs::path(checkpoint.path).filename();
    if (damage.empty()) {
      say(text("  ", name, ": complete, written ", checkpoint.manifest->written, ", ", size_text(*checkpoint.manifest),
               loss_text(checkpoint.manifest->state), checkpoint.path == best ? ", best" : ""));
      if (!newest || checkpoint.manifest->serial > newest->manifest->serial) newest = &checkpoint;
    } else {
      say(text("  ", name, ": damaged: ", damage));
      all_good = false;
    }
  }
  say(newest ? text("resume_from_checkpoint=true goes on from ", fs::path(newest->path).filename().string())
             : "resume_from_checkpoint=true finds nothing to go on from");
  return all_good ? ExitCode::ok : ExitCode::bad_input;
}

}  // namespace

ExitCode inspect(const std::string& path, bool each_tensor, const Say& say) {
  check_input(fs::is_directory(path), path, ": no such folder");
  const fs::path full = fs::path(path).lexically_normal(), folder = full.has_filename() ? full : full.parent_path();
  if (folder.filename().string().starts_with("step-") || fs::exists(folder / "manifest.json"))
    return inspect_one(folder, each_tensor, say);
  return inspect_all(fs::is_directory(folder / "checkpoints") ? folder / "checkpoints" : folder, say);
}

}  // namespace distill
