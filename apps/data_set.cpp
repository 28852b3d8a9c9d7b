#include "apps/data_set.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <type_traits>
#include <utility>

#include "io/chat_template.h"
#include "io/encode.h"
#include "io/encoded_file.h"
#include "io/hash.h"
#include "io/mapped_file.h"
#include "io/records.h"
#include "parallel/parallel.h"

namespace distill {

namespace {

namespace fs = std::filesystem;

fs::path encoded_folder(const Config& config) { return fs::path(config.output_dir) / "encoded"; }

std::string joined(const std::vector<std::string>& words) {
  std::string all;
  for (const std::string& word : words) all += (all.empty() ? "" : ", ") + word;
  return all;
}

// The key that chose the template of records; that of validation is by default the student's.
std::string template_key(const ConfigFile& file, std::string_view data_key) {
  const std::string own = text(data_key.substr(0, data_key.rfind('.')), ".template");
  return file.written.contains(own) ? own : "student.data_args.template";
}

// The ranks that wait leave their cores to the one that works.
int threads_of_node(const Communicator& world, int threads) {
  const int cores = int(std::thread::hardware_concurrency()), all = threads * int(ranks_of_node(world).size());
  return std::max(threads, std::min(all, cores));
}

template <class T>
std::span<const T> as(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const T*>(bytes.data()), bytes.size() / sizeof(T)};
}
std::string as_text(std::span<const std::byte> bytes) {
  const auto letters = as<char>(bytes);
  return {letters.begin(), letters.end()};
}

// A data set as the parts of node memory: counts, texts, the three arrays.
static_assert(std::is_trivially_copyable_v<DataCounts>);

std::span<const std::byte> bytes_of(const std::string& words) {
  return std::as_bytes(std::span(words.data(), words.size()));
}

NodeData to_parts(DataSet data) {
  const auto kept = std::make_shared<const DataSet>(std::move(data));
  const DataCounts& counts = *kept;
  return {{std::as_bytes(std::span(&counts, 1)), bytes_of(kept->bad_records), bytes_of(kept->file),
           bytes_of(kept->warning), std::as_bytes(kept->samples.tokens()), std::as_bytes(kept->samples.offsets()),
           std::as_bytes(kept->samples.prompt_lengths())},
          kept};
}

DataSet from_parts(const NodeData& shared) {
  const auto& parts = shared.parts;
  return {as<DataCounts>(parts[0])[0],
          Samples(as<std::int32_t>(parts[4]), as<std::int64_t>(parts[5]), as<std::int32_t>(parts[6]), shared.owner),
          as_text(parts[1]), as_text(parts[2]), as_text(parts[3])};
}

std::string hash_of(const Samples& samples) {
  const auto letters = [](auto values) {
    const auto bytes = std::as_bytes(values);
    return std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  };
  Hasher hasher;
  hasher.add(letters(samples.tokens()));
  hasher.add(letters(samples.offsets()));
  hasher.add(letters(samples.prompt_lengths()));
  return hasher.hex();
}

void describe_samples(DataSet& data) {
  hash_of(data.samples).copy(data.hash.data(), data.hash.size() - 1);
  for (std::int64_t i = 0; i < data.samples.size(); ++i) {
    data.longest = std::max(data.longest, int(data.samples[i].tokens.size()));
    data.supervised += data.samples[i].supervised();
  }
}

DataSet encode_data(const ConfigFile& file, const DataFiles& source, const Tokenizer& tokenizer, int threads,
                    const Say& progress) {
  const Config& config = file.config;
  const RecordFields fields{.question = config.question_key,
                            .answer = config.answer_key,
                            .prompt = config.prompt_key,
                            .system = config.system_key};
  Records records;
  file.reading(source.key,
               [&] { records = read_records(source.files, fields, config.student.data_args.skip_bad_records); });
  std::optional<ChatTemplate> chat;
  file.reading(template_key(file, source.key), [&] {
    chat.emplace(ChatTemplate::load(source.template_name, config.student.model_args.model_name_or_path));
  });
  EncodeOptions options;
  options.sequence_length = config.sequence_length;
  options.distill_on_prompt = config.distill_on_prompt;
  options.threads = threads;
  options.progress = [&](std::int64_t done, std::int64_t total) {
    progress(text("encoding ", done, " of ", total, " records"));
  };
  EncodedRecords encoded = encode_records(
      records.records, [&](std::string_view t) { return tokenizer.encode(t); },
      [&](std::span<const Message> conversation, bool prompt) { return chat->render(conversation, prompt); }, options);
  check_input(encoded.samples.size() > 0, file.where(source.key), ": ", source.key, ": none of the ",
              records.records.size(), " records of ", joined(source.files), " has an answer that begins within ",
              config.sequence_length, " tokens (sequence_length)");
  DataSet data;
  if (records.bad > 0) data.bad_records = records.describe_bad();
  data.bad = records.bad;
  data.truncated = encoded.truncated;
  data.left_out = encoded.left_out;
  data.samples = std::move(encoded.samples);
  describe_samples(data);
  return data;
}

// What `distill encode` wrote at this path.
DataSet read_file(const std::string& path, std::int64_t vocabulary) {
  EncodedData encoded = read_encoded(path, vocabulary);
  DataSet data;
  if (encoded.bad > 0) data.bad_records = text(path, ": ", encoded.bad, " bad records were left out when it was made");
  data.bad = encoded.bad;
  data.truncated = encoded.truncated;
  data.left_out = encoded.left_out;
  data.samples = std::move(encoded.samples);
  data.file = path;
  describe_samples(data);
  return data;
}

}  // namespace

fs::path encoded_path(const ConfigFile& file, const DataFiles& source) {
  const Config& c = file.config;
  const std::string& model = c.student.model_args.model_name_or_path;
  // Models with the same tokenizer share encoded files, so it is not its path that counts.
  const std::vector<std::string> words = {std::string(MappedFile(fs::path(model) / "tokenizer.json").bytes()),
                                          ChatTemplate::load(source.template_name, model).identity(),
                                          c.question_key,
                                          c.answer_key,
                                          c.prompt_key,
                                          c.system_key,
                                          text(c.sequence_length),
                                          text(c.distill_on_prompt),
                                          text(c.student.data_args.skip_bad_records)};
  return encoded_folder(c) / (encoding_key(words, source.files) + ".h5");
}

DataSet read_data(const ConfigFile& file, const DataFiles& source, const Tokenizer& tokenizer, int threads,
                  const Say& progress) {
  std::string warning;
  // The key takes a pass over the files: not where nothing was ever encoded.
  if (std::error_code none; fs::is_directory(encoded_folder(file.config), none)) {
    const fs::path path = encoded_path(file, source);
    try {
      if (fs::exists(path)) return read_file(path, tokenizer.vocabulary_size());
    } catch (const Error& error) {
      warning = text(error.what(), "; the records are encoded again");
    }
  }
  DataSet data = encode_data(file, source, tokenizer, threads, progress);
  data.warning = warning;
  return data;
}

void work_for_all(Communicator& world, int threads, const std::function<void(int threads)>& work) {
  const WaitForWork patience(world);
  world.run_together([&] { work(threads_of_node(world, threads)); });
}

DataSet read_data_once(Communicator& world, const ConfigFile& file, const DataFiles& source, const Tokenizer& tokenizer,
                       int threads, const Say& progress) {
  DataSet data;
  work_for_all(world, threads, [&](int all_threads) {
    if (world.rank() == ranks_of_node(world).front()) data = read_data(file, source, tokenizer, all_threads, progress);
  });
  return from_parts(share_in_node(world, to_parts(std::move(data)), text("the encoded data of ", source.key)));
}

}  // namespace distill
