#include "io/checkpoint.h"

#include <map>
#include <span>

#include "core/error.h"

namespace distill {

namespace {

StoredMatrix stored(const CheckpointTensor& tensor) {
  return {.name = tensor.name,
          .dtype = tensor.data.dtype,
          .rows = tensor.data.rows,
          .cols = tensor.data.cols,
          .whole_rows = tensor.whole_rows,
          .whole_cols = tensor.whole_cols,
          .first_row = tensor.first_row,
          .first_col = tensor.first_col};
}

std::vector<StoredMatrix> stored(const std::vector<CheckpointTensor>& tensors) {
  std::vector<StoredMatrix> parts;
  for (const CheckpointTensor& tensor : tensors) parts.push_back(stored(tensor));
  return parts;
}

}  // namespace

CheckpointFolder::CheckpointFolder(std::string folder, CheckpointRun run, const StoredPlace& place, int keep,
                                   Device& device, Communicator& ranks, Warn warn,
                                   CheckpointWriter::BeforeCommit before_commit)
    : folder_(std::move(folder)),
      run_(std::move(run)),
      nearest_(shard_name(place)),
      device_(device),
      ranks_(ranks),
      warn_(std::move(warn)),
      writer_(folder_, run_, place, keep, ranks, warn_, std::move(before_commit)) {}

void CheckpointFolder::warn(const std::string& message) const {
  if (ranks_.rank() == 0) warn_(message);
}

void CheckpointFolder::reserve(const std::vector<CheckpointTensor>& tensors) { writer_.reserve(stored(tensors)); }

void CheckpointFolder::save(const TrainState& state, const std::vector<CheckpointTensor>& tensors) {
  writer_.save(state, stored(tensors),
               [&](std::size_t part, std::span<std::byte> to) { device_.download(to.data(), tensors[part].data); });
}

std::optional<std::string> CheckpointFolder::newest() {
  std::vector<CompleteCheckpoint> candidates;
  ranks_.run_together([&] {
    if (ranks_.rank() == 0)
      candidates = complete_checkpoints(
          folder_, [&](const std::string& problem) { warn(text("checkpoint passed over: ", problem)); });
  });
  for (std::size_t i = 0;; ++i) {
    const std::string path = ranks_.broadcast(i < candidates.size() ? candidates[i].path : "", 0);
    if (path.empty()) return std::nullopt;
    try {
      ranks_.run_together([&] { check_every_byte(path); });
      verified_ = path;
      return path;
    } catch (const Error& problem) {
      if (problem.code() == ExitCode::peer_lost) throw;
      warn(text("checkpoint passed over: ", problem.what()));
    }
  }
}

// Each rank reads its share of the files.
void CheckpointFolder::check_every_byte(const std::string& path) const {
  const std::vector<StoredShard> shards = read_manifest(path).shards;
  for (std::size_t s = std::size_t(ranks_.rank()); s < shards.size(); s += std::size_t(ranks_.size()))
    check_shard(path, shards[s]);
}

TrainState CheckpointFolder::load(const std::string& path, const std::vector<CheckpointTensor>& tensors) {
  std::optional<CheckpointReader> reader;
  ranks_.run_together([&] {
    reader.emplace(path, read_manifest(path), nearest_);
    for (const std::string& difference : check_continues(path, reader->manifest(), run_)) warn(difference);
    for (const CheckpointTensor& tensor : tensors) reader->check_holds(stored(tensor));
  });
  check_all_wanted(*reader, tensors);
  if (path != verified_) ranks_.run_together([&] { check_every_byte(path); });
  verified_.clear();
  ranks_.run_together([&] {
    std::vector<std::byte> bytes;
    for (const CheckpointTensor& tensor : tensors) {
      bytes.resize(std::size_t(tensor.data.size()) * size_of(tensor.data.dtype));
      reader->read(stored(tensor), bytes);
      device_.upload(tensor.data, bytes.data());
    }
    device_.synchronize();
  });
  return reader->manifest().state;
}

// What no rank wants belongs to a state of another kind: masters, say, of a run with 16-bit parameters.
void CheckpointFolder::check_all_wanted(const CheckpointReader& reader,
                                        const std::vector<CheckpointTensor>& tensors) const {
  std::map<std::string, std::size_t> index;
  for (const auto& [name, whole] : reader.tensors()) index.emplace(name, index.size());
  std::vector<std::int64_t> is_wanted(index.size());
  for (const CheckpointTensor& tensor : tensors) is_wanted[index.at(tensor.name)] = 1;
  ranks_.all_reduce(is_wanted, Reduce::max);
  ranks_.run_together([&] {
    for (const auto& [name, i] : index)
      check_input(is_wanted[i] != 0, reader.path(), ": holds ", name,
                  ", which this run has not: another model or another dtype");
  });
}

}  // namespace distill
