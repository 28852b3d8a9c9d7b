#include "io/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>

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

std::string describe(const StoredMatrix& m) {
  return text(name_of(m.dtype), " [", m.rows, ", ", m.cols, "] at [", m.first_row, ", ", m.first_col, "] of [",
              m.whole_rows, ", ", m.whole_cols, ']');
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
  StoredShard mine;
  ranks_.run_together([&] { mine = write_shard(partial, tensors); });
  const std::vector<std::string> shards = ranks_.all_gather(to_json(mine));
  ranks_.run_together([&] {
    if (!is_first) return;
    CheckpointManifest manifest{.serial = serial_ + 1, .state = state, .run = run_, .shards = {}};
    for (const std::string& shard : shards) manifest.shards.push_back(parse_shard(shard));
    write_durably(fs::path(partial) / "manifest.json", to_json(manifest));
    out->commit();
    ++serial_;
  });
  if (keep_ == 0) return;
  ranks_.run_together([&] { check_shard(path, mine); });
  ranks_.run_together([&] {
    if (is_first) prune(path);
  });
}

StoredShard CheckpointFolder::write_shard(const std::string& folder,
                                          const std::vector<CheckpointTensor>& tensors) const {
  StoredShard shard;
  shard.file = shard_name(place_);
  const std::string path = fs::path(folder) / shard.file;
  constexpr std::uint64_t frame = 1 << 16, frame_of_dataset = 1 << 10;  // more than HDF5's own structures need
  std::uint64_t bytes = frame;
  for (const CheckpointTensor& t : tensors)
    bytes += frame_of_dataset + std::uint64_t(t.data.size()) * size_of(t.data.dtype);
  check_space(path, bytes);
  Hdf5Writer file(path);
  for (const CheckpointTensor& tensor : tensors) {
    std::uint32_t crc = 0;
    const FileRange range = file.write(stored(tensor), [&](const Slab& slab, std::span<std::byte> values) {
      device_.download(values.data(), part(tensor, slab));
      crc = crc32c(values, crc);
    });
    shard.datasets.push_back({tensor.name, range, crc});
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
      // Each rank reads its part of the shards.
      ranks_.run_together([&] {
        const std::vector<StoredShard> shards = read_manifest(path).shards;
        for (std::size_t s = std::size_t(ranks_.rank()); s < shards.size(); s += std::size_t(ranks_.size()))
          check_shard(path, shards[s]);
      });
      return path;
    } catch (const Error& problem) {
      if (problem.code() == ExitCode::peer_lost) throw;
      warn(text("checkpoint passed over: ", problem.what()));
    }
  }
}

TrainState CheckpointFolder::load(const std::string& path, const std::vector<CheckpointTensor>& tensors) {
  TrainState state;
  ranks_.run_together([&] {
    const CheckpointManifest manifest = read_manifest(path);
    for (const std::string& difference : check_continues(path, manifest, run_)) warn(difference);
    const std::string mine = shard_name(place_);
    const auto shard = std::find_if(manifest.shards.begin(), manifest.shards.end(),
                                    [&](const StoredShard& s) { return s.file == mine; });
    check_input(shard != manifest.shards.end(), path, ": its manifest names no ", mine);
    read_shard(path, *shard, tensors);
    state = manifest.state;
  });
  return state;
}

void CheckpointFolder::read_shard(const std::string& folder, const StoredShard& shard,
                                  const std::vector<CheckpointTensor>& tensors) const {
  check_shard_frame(folder, shard);  // HDF5 is not made for damaged files, so it sees none
  const std::string path = fs::path(folder) / shard.file;
  check_input(shard.datasets.size() == tensors.size(), path, ": holds ", shard.datasets.size(),
              " tensors, this run has ", tensors.size(), ": another model or another dtype");
  const Hdf5Reader file(path);
  for (const CheckpointTensor& tensor : tensors) {
    const auto record = std::find_if(shard.datasets.begin(), shard.datasets.end(),
                                     [&](const StoredDataset& d) { return d.name == tensor.name; });
    check_input(record != shard.datasets.end(), path, ": has no ", tensor.name, ": another model or another dtype");
    const std::string found = describe(file.describe(tensor.name)), wanted = describe(stored(tensor));
    check_input(found == wanted, path, ": ", tensor.name, " is ", found, ", this run has ", wanted);
    std::uint32_t crc = 0;
    file.read(stored(tensor), [&](const Slab& slab, std::span<const std::byte> values) {
      crc = crc32c(values, crc);
      device_.upload(part(tensor, slab), values.data());
    });
    check_input(crc == record->crc, path, ": ", tensor.name, " is damaged (its checksum does not match)");
  }
  device_.synchronize();
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
