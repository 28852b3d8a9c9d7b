#include "io/encode.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "core/error.h"

namespace distill {

namespace {

constexpr std::int64_t chunk_records = 256;

// What becomes of some records that follow each other.
struct Chunk {
  SampleBuilder samples;
  std::int64_t truncated = 0, left_out = 0;
};

// In their order the result is that of one thread. A chunk is let go as soon as it is copied.
EncodedRecords join(std::vector<Chunk> chunks) {
  std::vector<Samples> parts;
  EncodedRecords all;
  std::size_t samples = 0, tokens = 0;
  for (Chunk& chunk : chunks) {
    all.truncated += chunk.truncated;
    all.left_out += chunk.left_out;
    parts.push_back(std::move(chunk.samples).finish());
    samples += std::size_t(parts.back().size());
    tokens += parts.back().tokens().size();
  }
  SampleBuilder whole;
  whole.reserve(samples, tokens);
  for (Samples& part : parts) {
    for (std::int64_t i = 0; i < part.size(); ++i) whole.add(part[i].tokens, part[i].prompt_length);
    part = {};
  }
  all.samples = std::move(whole).finish();
  return all;
}

void encode_record(Chunk& out, const Record& record, const EncodeText& encode, const RenderChat& render,
                   const EncodeOptions& options) {
  const std::string user = record.prompt.empty() ? record.question : record.prompt + "\n" + record.question;
  std::vector<Message> conversation;
  if (!record.system.empty()) conversation.push_back({"system", record.system});
  conversation.push_back({"user", user});
  const std::int64_t prompt_length =
      options.distill_on_prompt ? 0 : std::int64_t(encode(render(conversation, true)).size());

  conversation.push_back({"assistant", record.answer});
  std::string full = render(conversation, false);
  if (full.ends_with('\n')) full.pop_back();
  const std::vector<std::int32_t> tokens = encode(full);
  std::span<const std::int32_t> kept = tokens;
  if (std::int64_t(kept.size()) > options.sequence_length) {
    kept = kept.first(std::size_t(options.sequence_length));
    ++out.truncated;
  }
  const SampleView sample{kept, std::int32_t(std::min(prompt_length, std::int64_t(kept.size())))};
  if (sample.supervised() > 0)
    out.samples.add(sample.tokens, sample.prompt_length);
  else
    ++out.left_out;
}

// Chunks of records handed to threads as they become free; their results are kept apart and joined in order.
class Encoding {
 public:
  Encoding(const std::vector<Record>& records, const EncodeText& encode, const RenderChat& render,
           const EncodeOptions& options)
      : records_(records),
        encode_(encode),
        render_(render),
        options_(options),
        total_(std::int64_t(records.size())),
        chunks_(std::size_t((total_ + chunk_records - 1) / chunk_records)) {}

  EncodedRecords run() {
    const int threads = std::clamp(options_.threads, 1, std::max(1, int(chunks_.size())));
    std::vector<std::jthread> pool;
    running_ = threads;
    for (int i = 0; i < threads; ++i) pool.emplace_back([this] { work(); });
    report_until_done();
    pool.clear();  // joins
    if (error_) std::rethrow_exception(error_);

    return join(std::move(chunks_));
  }

 private:
  void work() {
    try {
      for (std::size_t c; (c = next_chunk_++) < chunks_.size();) {
        const std::int64_t begin = std::int64_t(c) * chunk_records, end = std::min(begin + chunk_records, total_);
        for (std::int64_t i = begin; i < end; ++i)
          encode_record(chunks_[c], records_[std::size_t(i)], encode_, render_, options_);
        done_ += end - begin;
      }
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_chunk_ = chunks_.size();
    }
    const std::lock_guard lock(mutex_);
    --running_;
    finished_.notify_one();
  }

  void report_until_done() {
    std::unique_lock lock(mutex_);
    while (!finished_.wait_for(lock, std::chrono::milliseconds(200), [this] { return running_ == 0; }))
      if (options_.progress) options_.progress(done_, total_);
    if (options_.progress && !error_) options_.progress(total_, total_);
  }

  const std::vector<Record>& records_;
  const EncodeText& encode_;
  const RenderChat& render_;
  const EncodeOptions& options_;
  const std::int64_t total_;
  std::vector<Chunk> chunks_;
  std::atomic<std::size_t> next_chunk_{0};
  std::atomic<std::int64_t> done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
  int running_ = 0;
  std::exception_ptr error_;
};

}  // namespace

EncodedRecords encode_records(const std::vector<Record>& records, const EncodeText& encode, const RenderChat& render,
                              const EncodeOptions& options) {
  return Encoding(records, encode, render, options).run();
}

}  // namespace distill
