#include "io/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <map>

#include "core/error.h"
#include "io/crc32c.h"
#include "io/durable_file.h"
#include "io/hdf5.h"

namespace distill {

namespace {

namespace fs = std::filesystem;

std::string name_of_step(std::int64_t step) {
  std::array<char, 32> name{};
  std::snprintf(name.data(), name.size(), "step-%06lld", static_cast<long long>(step));
  return name.data();
}

std::string shard_name(const StoredPlace& place) {
  return text("student-pp", place.pp, "-tp", place.tp, "-dp", place.dp, ".h5");
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  std::array<char, 32> out{};
  std::strftime(out.data(), out.size(), "%Y-%m-%dT%H:%M:%SZ", &parts);
  return out.data();
}

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

View part(const CheckpointTensor& tensor, const Slab& slab) {
  return tensor.data.row_slice(slab.first_row, slab.rows).col_slice(slab.first_col, slab.cols);
}

// Fails now when the file system cannot hold so many bytes, rather than in the middle of HDF5's writing.
void check_space(const std::string& path, std::uint64_t bytes) {
  const int descriptor = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
  if (descriptor < 0) fail(path, ": cannot create: ", std::strerror(errno));
  const int error = fallocate(descriptor, 0, 0, off_t(bytes)) == 0 ? 0 : errno;
  close(descriptor);
  unlink(path.c_str());
  // File systems that cannot reserve say so; there the writing itself must fail.
  if (error == ENOSPC || error == EFBIG || error == EDQUOT)
    fail(path, ": cannot write ", bytes, " bytes: ", std::strerror(error));
}

}  // namespace

CheckpointFolder::CheckpointFolder(std::string folder, CheckpointRun run, const StoredPlace& place, int keep,
                                   Device& device, Communicator& ranks, Warn warn)
    : folder_(std::move(folder)),
      run_(std::move(run)),
      place_(place),
      keep_(keep),
      device_(device),
      ranks_(ranks),
      warn_(std::move(warn)) {}

void CheckpointFolder::warn(const std::string& message) const {
  if (ranks_.rank() == 0) warn_(message);
}

void CheckpointFolder::save(const TrainState& state, const std::vector<CheckpointTensor>& tensors) {
  const bool is_first = ranks_.rank() == 0;
  const std::string path = fs::path(folder_) / name_of_step(state.step);
  std::optional<DurableFolder> out;
  std::string partial;
  ranks_.run_together([&] {
    if (!is_first) return;
    remove_leftovers(folder_);
    if (serial_ == 0)
      for (const CompleteCheckpoint& older : complete_checkpoints(folder_, [](const std::string&) {}))
        serial_ = std::max(serial_, older.manifest.serial);
    partial = out.emplace(path).partial();
  });
  partial = ranks_.broadcast(partial, 0);
  std::optional<StoredShard> mine;
  ranks_.run_together([&] { mine = write_shard(partial, tensors); });
  const std::vector<std::string> shards = ranks_.all_gather(mine ? to_json(*mine) : "");
  ranks_.run_together([&] {
    if (!is_first) return;
    CheckpointManifest manifest{.serial = serial_ + 1, .written = utc_now(), .state = state, .run = run_, .shards = {}};
    for (const std::string& shard : shards)
      if (!shard.empty()) manifest.shards.push_back(parse_shard(shard));
    write_durably(fs::path(partial) / "manifest.json", to_json(manifest));
    out->commit();
    ++serial_;
  });
  if (keep_ == 0) return;
  ranks_.run_together([&] {
    if (mine) check_shard(path, *mine);
  });
  ranks_.run_together([&] {
    if (is_first) prune(path);
  });
}

std::optional<StoredShard> CheckpointFolder::write_shard(const std::string& folder,
                                                         const std::vector<CheckpointTensor>& tensors) const {
  constexpr std::uint64_t frame = 1 << 16, frame_of_dataset = 1 << 10;  // more than HDF5's own structures need
  std::uint64_t bytes = 0;
  for (const CheckpointTensor& t : tensors)
    if (t.data.size() > 0) bytes += frame_of_dataset + std::uint64_t(t.data.size()) * size_of(t.data.dtype);
  if (bytes == 0) return std::nullopt;
  StoredShard shard;
  shard.file = shard_name(place_);
  const std::string path = fs::path(folder) / shard.file;
  check_space(path, frame + bytes);
  Hdf5Writer file(path);
  std::map<std::string, int> parts;  // so far, by tensor
  for (const CheckpointTensor& tensor : tensors) {
    if (tensor.data.size() == 0) continue;
    StoredMatrix matrix = stored(tensor);
    if (const int part = parts[tensor.name]++; part > 0) matrix.name += text('#', part);
    std::uint32_t crc = 0;
    const FileRange range = file.write(matrix, [&](const Slab& slab, std::span<std::byte> values) {
      device_.download(values.data(), part(tensor, slab));
      crc = crc32c(values, crc);
    });
    shard.datasets.push_back({tensor.name, matrix, range, crc});
  }
  file.close();
  shard.bytes = fs::file_size(path);
  shard.frame_crc = frame_checksum(path, shard);
  return shard;
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
    reader.emplace(path, read_manifest(path), shard_name(place_));
    for (const std::string& difference : check_continues(path, reader->manifest(), run_)) warn(difference);
    for (const CheckpointTensor& tensor : tensors) reader->check_holds(stored(tensor));
  });
  check_all_wanted(*reader, tensors);
  ranks_.run_together([&] { check_every_byte(path); });
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

// Deletes the oldest complete checkpoints beyond `keep`, never the one that was just written.
void CheckpointFolder::prune(const std::string& newest_path) const {
  const std::vector<CompleteCheckpoint> complete = complete_checkpoints(folder_, [](const std::string&) {});
  for (std::size_t i = std::size_t(keep_); i < complete.size(); ++i) {
    if (complete[i].path == newest_path) continue;
    try {
      remove_folder(complete[i].path);
    } catch (const Error& problem) {
      warn(text("an old checkpoint stays: ", problem.what()));
    }
  }
}

}  // namespace distill
