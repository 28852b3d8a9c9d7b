#include "io/checkpoint_writer.h"

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
#include <new>
#include <utility>

#include "core/error.h"
#include "core/out_of_memory.h"
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

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  std::array<char, 32> out{};
  std::strftime(out.data(), out.size(), "%Y-%m-%dT%H:%M:%SZ", &parts);
  return out.data();
}

std::size_t bytes_of(const StoredMatrix& matrix) {
  return std::size_t(matrix.rows * matrix.cols) * size_of(matrix.dtype);
}

// Fails now when the file system cannot hold so many bytes, rather than in the middle of writing them.
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

// Reads back what was written, from the disk rather than from memory where the system can be asked to.
void read_back(const std::string& folder, const StoredShard& shard) {
  const std::string path = fs::path(folder) / shard.file;
  if (const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC); descriptor >= 0) {
    posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
    close(descriptor);
  }
  check_shard(folder, shard);
}

}  // namespace

std::string shard_name(const StoredPlace& place) {
  return text("student-pp", place.pp, "-tp", place.tp, "-dp", place.dp, ".h5");
}

CheckpointWriter::CheckpointWriter(std::string folder, CheckpointRun run, const StoredPlace& place, int keep,
                                   Communicator& ranks, Warn warn, BeforeCommit before_commit)
    : folder_(std::move(folder)),
      run_(std::move(run)),
      place_(place),
      keep_(keep),
      ranks_(ranks.split(0, ranks.rank(), "checkpoint writers")),
      warn_(std::move(warn)),
      before_commit_(std::move(before_commit)),
      exceptions_at_start_(std::uncaught_exceptions()) {}

CheckpointWriter::~CheckpointWriter() {
  if (std::uncaught_exceptions() > exceptions_at_start_) {
    is_abandoned_ = true;
    ranks_->give_up();
  }
  writing_.reset();  // waits
}

void CheckpointWriter::save(const TrainState& state, const std::vector<StoredMatrix>& parts, const Copy& copy) {
  wait();
  if (has_lost_rank_) std::rethrow_exception(failure_);
  state_ = state;
  take(parts, copy);
  writing_ = lane_.start([this] { write(); });
}

void CheckpointWriter::finish() {
  wait();
  if (failure_) std::rethrow_exception(failure_);
}

void CheckpointWriter::wait() {
  if (writing_) writing_->wait();  // throws nothing: write() keeps its failure
  writing_.reset();
}

void CheckpointWriter::reserve(const std::vector<StoredMatrix>& parts) {
  std::size_t bytes = 0;
  for (const StoredMatrix& matrix : parts) bytes += bytes_of(matrix);
  if (bytes <= memory_bytes_) return;
  memory_.reset();
  memory_bytes_ = 0;
  try {
    memory_ = std::make_unique<std::byte[]>(bytes);  // zeros: the system gives memory when it is first written to
  } catch (const std::bad_alloc&) {
    throw OutOfMemory(text("out of memory: ", bytes, " bytes asked for"));
  }
  memory_bytes_ = bytes;
}

void CheckpointWriter::take(const std::vector<StoredMatrix>& parts, const Copy& copy) {
  reserve(parts);
  parts_.clear();
  std::map<std::string, int> count;  // of parts, by tensor
  std::byte* at = memory_.get();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const std::span<std::byte> values(at, bytes_of(parts[i]));
    if (values.empty()) continue;
    copy(i, values);
    at += values.size();
    Part& part = parts_.emplace_back(Part{parts[i].name, parts[i], values});
    if (const int n = count[part.tensor]++; n > 0) part.matrix.name += text('#', n);
  }
}

void CheckpointWriter::write() {
  failure_ = nullptr;
  try {
    write_checkpoint();
  } catch (const std::exception& problem) {
    failure_ = std::current_exception();
    const auto* error = dynamic_cast<const Error*>(&problem);
    has_lost_rank_ = error && error->code() == ExitCode::peer_lost;
    if (is_first() && !has_lost_rank_ && !is_abandoned_)
      warn_(text("the checkpoint of step ", state_.step, " could not be written: ", problem.what()));
  }
}

void CheckpointWriter::write_checkpoint() {
  std::optional<DurableFolder> out;
  const std::string partial = begin(out);
  std::optional<StoredShard> mine;
  std::string mine_json;  // empty where this rank owns nothing
  ranks_->run_together([&] {
    mine = write_shard(partial);
    if (mine) mine_json = to_json(*mine);
  });
  const std::vector<std::string> shards = ranks_->all_gather(mine_json);
  ranks_->run_together([&] {
    if (is_first()) put_manifest(partial, shards);
  });
  // Before an older one goes.
  if (keep_ > 0 || ranks_->any(is_first() && out->replaces()))
    ranks_->run_together([&] {
      if (mine) read_back(partial, *mine);
    });
  ranks_->run_together([&] {
    if (!is_first()) return;
    before_commit_();
    out->commit();
    tidy();
  });
}

// Makes the folder to write into; its name, on every rank.
std::string CheckpointWriter::begin(std::optional<DurableFolder>& out) {
  std::string partial;
  ranks_->run_together([&] {
    if (!is_first()) return;
    remove_leftovers(folder_);
    if (serial_ == 0)
      for (const CompleteCheckpoint& older : complete_checkpoints(folder_, [](const std::string&) {}))
        serial_ = std::max(serial_, older.manifest.serial);
    partial = out.emplace(fs::path(folder_) / name_of_step(state_.step)).partial();
  });
  return ranks_->broadcast(partial, 0);
}

// Nothing where this rank owns nothing.
std::optional<StoredShard> CheckpointWriter::write_shard(const std::string& folder) const {
  if (parts_.empty()) return std::nullopt;
  constexpr std::uint64_t frame = 1 << 16, frame_of_dataset = 1 << 10;  // more than HDF5's own structures need
  std::uint64_t bytes = frame;
  for (const Part& part : parts_) bytes += frame_of_dataset + part.values.size();
  StoredShard shard;
  shard.file = shard_name(place_);
  const std::string path = fs::path(folder) / shard.file;
  check_space(path, bytes);
  Hdf5Writer file(path);
  for (const Part& part : parts_) {
    check(!is_abandoned_, path, ": left off");
    shard.datasets.push_back({part.tensor, part.matrix, file.write(part.matrix, part.values), crc32c(part.values)});
  }
  file.close();
  shard.bytes = fs::file_size(path);
  shard.frame_crc = frame_checksum(path, shard);
  return shard;
}

// The files of all ranks are there.
void CheckpointWriter::put_manifest(const std::string& folder, const std::vector<std::string>& shards) {
  CheckpointManifest manifest{.serial = serial_ + 1, .written = utc_now(), .state = state_, .run = run_, .shards = {}};
  for (const std::string& shard : shards)
    if (!shard.empty()) manifest.shards.push_back(parse_shard(shard));
  write_durably(fs::path(folder) / "manifest.json", to_json(manifest));
  ++serial_;  // also where what follows fails late: the folder may have its name by then
}

void CheckpointWriter::tidy() const {
  if (keep_ == 0 && !state_.validation_loss) return;
  const std::vector<CompleteCheckpoint> all = complete_checkpoints(folder_, [](const std::string&) {});
  // A link that could not be changed still leads to the checkpoint that was best before: then none goes.
  if (const CompleteCheckpoint* best = best_of(all); best && !mark(*best)) return;
  if (keep_ > 0) prune(all);
}

// Which one is best is read from all manifests every time, so a link that a kill kept from being changed is mended.
bool CheckpointWriter::mark(const CompleteCheckpoint& best) const {
  const fs::path link = fs::path(folder_) / best_name;
  try {
    replace_link(link, fs::path(best.path).filename());
    return true;
  } catch (const Error& problem) {
    warn_(text("the best checkpoint, ", best.path, ", is not marked: ", problem.what()));
    return false;
  }
}

// Deletes the oldest complete checkpoints beyond `keep`, never the best one.
void CheckpointWriter::prune(const std::vector<CompleteCheckpoint>& complete) const {
  const CompleteCheckpoint* best = best_of(complete);
  for (std::size_t i = std::size_t(keep_); i < complete.size(); ++i) {
    if (&complete[i] == best) continue;
    try {
      remove_folder(complete[i].path);
    } catch (const Error& problem) {
      warn_(text("an old checkpoint stays: ", problem.what()));
    }
  }
}

}  // namespace distill
