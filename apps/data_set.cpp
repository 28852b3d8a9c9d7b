#include "apps/data_set.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <span>
#include <thread>
#include <type_traits>
#include <utility>

#include "io/chat_template.h"
#include "io/encode.h"
#include "io/records.h"
#include "parallel/parallel.h"

namespace distill {

namespace {

std::string joined(const std::vector<std::string>& words) {
  std::string all;
  for (const std::string& word : words) all += (all.empty() ? "" : ", ") + word;
  return all;
}

// While one rank works for the others they wait as long as it lives, and need not be told that they do.
class WaitForWork {
 public:
  explicit WaitForWork(Communicator& world) : world_(world), before_(world.patience()) {
    Patience endless = before_;
    endless.peer_timeout = endless.stall_report = std::chrono::hours(24 * 365);
    world_.set_patience(endless);
  }
  ~WaitForWork() { world_.set_patience(before_); }
  WaitForWork(const WaitForWork&) = delete;
  WaitForWork& operator=(const WaitForWork&) = delete;

 private:
  Communicator& world_;
  Patience before_;
};

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

// A data set as the parts of node memory: counts, words, the three arrays.
static_assert(std::is_trivially_copyable_v<DataCounts>);

NodeData to_parts(DataSet data) {
  const auto kept = std::make_shared<const DataSet>(std::move(data));
  const DataCounts& counts = *kept;
  return {{std::as_bytes(std::span(&counts, 1)),
           std::as_bytes(std::span(kept->bad_records.data(), kept->bad_records.size())),
           std::as_bytes(kept->samples.tokens()), std::as_bytes(kept->samples.offsets()),
           std::as_bytes(kept->samples.prompt_lengths())},
          kept};
}

DataSet from_parts(const NodeData& shared) {
  DataSet data;
  static_cast<DataCounts&>(data) = as<DataCounts>(shared.parts[0])[0];
  data.bad_records = as_text(shared.parts[1]);
  data.samples = Samples(as<std::int32_t>(shared.parts[2]), as<std::int64_t>(shared.parts[3]),
                         as<std::int32_t>(shared.parts[4]), shared.owner);
  return data;
}

}  // namespace

DataSet read_data(const ConfigFile& file, const DataFiles& source, const Tokenizer& tokenizer, int threads,
                  const Say& progress) {
  const Config& config = file.config;
  const RecordFields fields{.question = config.question_key,
                            .answer = config.answer_key,
                            .prompt = config.prompt_key,
                            .system = config.system_key};
  const Records records = read_records(source.files, fields, config.student.data_args.skip_bad_records);
  const ChatTemplate chat = ChatTemplate::load(source.template_name, config.student.model_args.model_name_or_path);
  EncodeOptions options;
  options.sequence_length = config.sequence_length;
  options.distill_on_prompt = config.distill_on_prompt;
  options.threads = threads;
  options.progress = [&](std::int64_t done, std::int64_t total) {
    progress(text("encoding ", done, " of ", total, " records"));
  };
  EncodedRecords encoded = encode_records(
      records.records, [&](std::string_view t) { return tokenizer.encode(t); },
      [&](std::span<const Message> conversation, bool prompt) { return chat.render(conversation, prompt); }, options);
  check_input(encoded.samples.size() > 0, file.where(source.key), ": none of the ", records.records.size(),
              " records of ", joined(source.files), " has an answer that begins within ", config.sequence_length,
              " tokens (sequence_length)");
  DataSet data;
  if (records.bad > 0) data.bad_records = records.describe_bad();
  data.bad = records.bad;
  data.truncated = encoded.truncated;
  data.left_out = encoded.left_out;
  data.samples = std::move(encoded.samples);
  for (std::int64_t i = 0; i < data.samples.size(); ++i) {
    data.longest = std::max(data.longest, int(data.samples[i].tokens.size()));
    data.supervised += data.samples[i].supervised();
  }
  return data;
}

DataSet read_data_once(Communicator& world, const ConfigFile& file, const DataFiles& source, const Tokenizer& tokenizer,
                       int threads, const Say& progress) {
  DataSet data;
  const WaitForWork patience(world);
  world.run_together([&] {
    if (world.rank() == ranks_of_node(world).front())
      data = read_data(file, source, tokenizer, threads_of_node(world, threads), progress);
  });
  return from_parts(share_in_node(world, to_parts(std::move(data)), text("the encoded data of ", source.key)));
}

}  // namespace distill
