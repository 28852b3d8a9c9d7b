#include "apps/encode_command.h"

#include <chrono>
#include <cstdio>
#include <iostream>
#include <system_error>

#include "apps/run_plan.h"
#include "io/encoded_file.h"

namespace distill {

namespace {

std::string contents(const DataSet& data) {
  return text(data.samples.size(), " records, ", count_text(double(data.samples.tokens().size())), " tokens");
}

// What was done, in a line.
std::string encode_one(const ConfigFile& file, const DataFiles& source, const Tokenizer& tokenizer, int threads,
                       const Say& progress) {
  const auto start = std::chrono::steady_clock::now();
  const std::filesystem::path path = encoded_path(file, source);
  std::error_code error;
  std::filesystem::create_directories(path.parent_path(), error);
  check_input(!error, file.where("output_dir"), ": cannot make ", path.parent_path().string(), ": ", error.message());
  const DataSet data = read_data(file, source, tokenizer, threads, progress);
  progress("");
  if (!data.warning.empty()) std::cerr << "warning: " << data.warning << std::endl;
  if (data.bad > 0) std::cerr << "warning: " << data.bad_records << std::endl;
  if (!data.file.empty()) return text(data.file, " is there already: ", contents(data));
  const std::uint64_t bytes = write_encoded(
      path, {.samples = data.samples, .bad = data.bad, .truncated = data.truncated, .left_out = data.left_out});
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%.1f s", took.count());
  return text(path.string(), ": ", contents(data), ", ", bytes_text(double(bytes)), " in ", seconds);
}

}  // namespace

void encode_and_keep(Communicator& world, const ConfigFile& file, int threads, const Say& say, const Say& progress) {
  const DataArgs& data = file.config.student.data_args;
  const ValidationDataArgs& held_out = file.config.validation.data_args;
  work_for_all(world, threads, [&](int all_threads) {
    if (world.rank() != 0) return;
    const Tokenizer tokenizer = Tokenizer::load(file.config.student.model_args.model_name_or_path);
    const DataFiles training{"student.data_args.file_name", data.file_name, data.template_name};
    say("training: " + encode_one(file, training, tokenizer, all_threads, progress));
    if (held_out.file_name.empty()) return;
    const DataFiles validation{"validation.data_args.file_name", held_out.file_name, held_out.template_name};
    say("validation: " + encode_one(file, validation, tokenizer, all_threads, progress));
  });
}

}  // namespace distill
