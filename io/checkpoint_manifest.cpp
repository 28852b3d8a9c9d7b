#include "io/checkpoint_manifest.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "io/crc32c.h"
#include "io/durable_file.h"
#include "io/strict_json.h"

namespace distill {

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char *format_name = "distill checkpoint", *checksum_key = "manifest_crc32c";
constexpr std::string_view step_prefix = "step-";
constexpr int format_version = 2;

std::string hex(std::uint32_t value) {
  std::array<char, 9> out{};
  std::snprintf(out.data(), out.size(), "%08x", value);
  return out.data();
}

std::uint32_t parse_hex(const std::string& digits) {
  std::uint32_t value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
  check_input(error == std::errc() && end == digits.data() + digits.size(), "checksum ", digits, " is no number");
  return value;
}

std::uint32_t checksum(const json& manifest) {
  const std::string content = manifest.dump();
  return crc32c(std::as_bytes(std::span(content)));
}

json shard_json(const StoredShard& shard) {
  json datasets = json::array();
  for (const StoredDataset& d : shard.datasets)
    datasets.push_back({{"name", d.matrix.name},
                        {"tensor", d.tensor},
                        {"dtype", name_of(d.matrix.dtype)},
                        {"shape", {d.matrix.rows, d.matrix.cols}},
                        {"whole_shape", {d.matrix.whole_rows, d.matrix.whole_cols}},
                        {"first", {d.matrix.first_row, d.matrix.first_col}},
                        {"offset", d.range.offset},
                        {"bytes", d.range.bytes},
                        {"crc32c", hex(d.crc)}});
  return {{"file", shard.file}, {"bytes", shard.bytes}, {"frame_crc32c", hex(shard.frame_crc)}, {"datasets", datasets}};
}

DType dtype_from(const std::string& name) {
  for (const DType type : {DType::f32, DType::f64, DType::bf16, DType::f16})
    if (name == name_of(type)) return type;
  fail_input("dtype ", name, " is not one of a checkpoint");
}

StoredMatrix matrix_from(const json& value) {
  const json &shape = value.at("shape"), &whole = value.at("whole_shape"), &first = value.at("first");
  StoredMatrix m{.name = value.at("name"),
                 .dtype = dtype_from(value.at("dtype")),
                 .rows = shape.at(0),
                 .cols = shape.at(1),
                 .whole_rows = whole.at(0),
                 .whole_cols = whole.at(1),
                 .first_row = first.at(0),
                 .first_col = first.at(1)};
  const auto lies_within = [](std::int64_t begin, std::int64_t n, std::int64_t whole_n) {
    return begin >= 0 && n >= 0 && n <= whole_n && begin <= whole_n - n;
  };
  check_input(lies_within(m.first_row, m.rows, m.whole_rows) && lies_within(m.first_col, m.cols, m.whole_cols),
              "dataset ", m.name, " does not lie within its tensor");
  return m;
}

StoredShard shard_from(const json& value) {
  StoredShard shard{.file = value.at("file"),
                    .bytes = value.at("bytes"),
                    .frame_crc = parse_hex(value.at("frame_crc32c")),
                    .datasets = {}};
  check_input(!shard.file.empty() && shard.file.find('/') == std::string::npos, "shard ", shard.file,
              " is no file name");
  for (const json& d : value.at("datasets"))
    shard.datasets.push_back(
        {d.at("tensor"), matrix_from(d), {d.at("offset"), d.at("bytes")}, parse_hex(d.at("crc32c"))});
  return shard;
}

json state_json(const TrainState& s) {
  return {{"step", s.step},
          {"samples", s.samples},
          {"tokens", s.tokens},
          {"optimizer_updates", s.optimizer_updates},
          {"loss_scale", s.loss_scale},
          {"loss_scale_good_steps", s.loss_scale_good_steps},
          {"nonfinite_in_a_row", s.nonfinite_in_a_row},
          {"validation_loss", s.validation_loss ? json(*s.validation_loss) : json()},
          {"outlier_steps", s.outlier_steps},
          {"last_record", s.last_record},
          {"recent_losses", s.recent_losses},
          {"recent_gradient_norms", s.recent_gradient_norms}};
}

// What older manifests lack, or what was not known.
std::optional<double> optional_number(const json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? std::nullopt : std::optional(found->get<double>());
}

TrainState state_from(const json& value) {
  return {.step = value.at("step"),
          .loss_scale = value.at("loss_scale"),
          .loss_scale_good_steps = value.at("loss_scale_good_steps"),
          .nonfinite_in_a_row = value.at("nonfinite_in_a_row"),
          .optimizer_updates = value.at("optimizer_updates"),
          .samples = value.at("samples"),
          .tokens = value.at("tokens"),
          .validation_loss = optional_number(value, "validation_loss"),
          // Older checkpoints lack these.
          .outlier_steps = value.value("outlier_steps", std::int64_t(0)),
          .last_record = value.value("last_record", std::int64_t(0)),
          .recent_losses = value.value("recent_losses", std::vector<double>()),
          .recent_gradient_norms = value.value("recent_gradient_norms", std::vector<double>())};
}

json data_json(const std::optional<StoredData>& data) {
  if (!data) return nullptr;
  return {{"records", data->records}, {"tokens", data->tokens}, {"xxh3_128", data->hash}};
}

std::optional<StoredData> data_from(const json& run) {
  const auto found = run.find("data");
  if (found == run.end() || found->is_null()) return std::nullopt;
  return StoredData{found->at("records"), found->at("tokens"), found->at("xxh3_128")};
}

std::string describe(const StoredData& data) {
  return text(data.records, " records of ", data.tokens, " tokens, hash ", data.hash);
}

CheckpointManifest manifest_from(const json& value) {
  const json& run = value.at("run");
  const json& grid = run.at("grid");
  CheckpointManifest manifest{.serial = value.at("serial"),
                              .written = value.at("written"),
                              .state = state_from(value.at("state")),
                              .run = {.version = run.at("version"),
                                      .config = run.at("config"),
                                      .seed = run.at("seed"),
                                      .threads = run.at("threads"),
                                      .samples_per_step = run.at("samples_per_step"),
                                      .grid = {grid.at("tp"), grid.at("pp"), grid.at("dp")},
                                      .data = data_from(run)},
                              .shards = {}};
  for (const json& shard : value.at("shards")) manifest.shards.push_back(shard_from(shard));
  return manifest;
}

std::optional<std::int64_t> step_in(std::string_view name) {
  if (!name.starts_with(step_prefix)) return std::nullopt;
  name.remove_prefix(step_prefix.size());
  std::int64_t step = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), step);
  return error == std::errc() && end == name.data() + name.size() ? std::optional(step) : std::nullopt;
}

void check_sizes(const std::string& folder, const CheckpointManifest& manifest) {
  for (const StoredShard& shard : manifest.shards) {
    std::error_code error;
    const std::uint64_t size = fs::file_size(fs::path(folder) / shard.file, error);
    check_input(!error, folder, ": lacks ", shard.file);
    check_input(size == shard.bytes, folder, ": ", shard.file, " has ", size, " bytes, its manifest says ",
                shard.bytes);
  }
}

// Reads by calls rather than through mapped memory: a bad sector must be an error here and no signal.
class Reader {
 public:
  explicit Reader(const std::string& path) : path_(path), descriptor_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    check_input(descriptor_ >= 0, path, ": cannot open: ", std::strerror(errno));
  }
  ~Reader() { close(descriptor_); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  std::uint64_t size() const {
    struct stat info = {};
    const bool is_known = fstat(descriptor_, &info) == 0;
    check_input(is_known, path_, ": cannot read: ", std::strerror(errno));
    return std::uint64_t(info.st_size);
  }

  std::uint32_t checksum(FileRange range, std::uint32_t before = 0) {
    buffer_.resize(std::min<std::uint64_t>(4 << 20, range.bytes));
    while (range.bytes > 0) {
      const ssize_t n =
          pread(descriptor_, buffer_.data(), std::min<std::uint64_t>(buffer_.size(), range.bytes), off_t(range.offset));
      if (n < 0 && errno == EINTR) continue;
      check_input(n > 0, path_, ": cannot read: ", n == 0 ? "it ends too early" : std::strerror(errno));
      before = crc32c(std::span(buffer_).first(std::size_t(n)), before);
      range = {range.offset + std::uint64_t(n), range.bytes - std::uint64_t(n)};
    }
    return before;
  }

 private:
  const std::string& path_;
  int descriptor_;
  std::vector<std::byte> buffer_;
};

std::uint32_t frame_checksum(Reader& reader, const std::string& path, const StoredShard& shard) {
  std::vector<FileRange> ranges;
  for (const StoredDataset& d : shard.datasets) ranges.push_back(d.range);
  std::sort(ranges.begin(), ranges.end(), [](const FileRange& a, const FileRange& b) { return a.offset < b.offset; });
  ranges.push_back({shard.bytes, 0});
  std::uint64_t at = 0;
  std::uint32_t crc = 0;
  for (const FileRange& range : ranges) {
    if (range.bytes == 0 && range.offset == 0) continue;  // a dataset without elements has no place
    check_input(range.offset >= at && range.offset <= shard.bytes && range.bytes <= shard.bytes - range.offset, path,
                ": its datasets do not lie side by side within the file");
    crc = reader.checksum({at, range.offset - at}, crc);
    at = range.offset + range.bytes;
  }
  return crc;
}

}  // namespace

std::string describe(const StoredGrid& grid) { return text("tp ", grid.tp, ", pp ", grid.pp, ", dp ", grid.dp); }

std::string to_json(const StoredShard& shard) { return shard_json(shard).dump(); }
StoredShard parse_shard(const std::string& text) { return shard_from(json::parse(text)); }

std::string to_json(const CheckpointManifest& manifest) {
  const CheckpointRun& run = manifest.run;
  json shards = json::array();
  for (const StoredShard& shard : manifest.shards) shards.push_back(shard_json(shard));
  json out = {{"format", format_name},
              {"format_version", format_version},
              {"serial", manifest.serial},
              {"written", manifest.written},
              {"state", state_json(manifest.state)},
              {"run",
               {{"version", run.version},
                {"hdf5_version", hdf5_version()},
                {"config", run.config},
                {"seed", run.seed},
                {"threads", run.threads},
                {"samples_per_step", run.samples_per_step},
                {"grid", {{"tp", run.grid.tp}, {"pp", run.grid.pp}, {"dp", run.grid.dp}}},
                {"data", data_json(run.data)}}},
              {"shards", shards}};
  out[checksum_key] = hex(checksum(out));
  return out.dump(1) + "\n";
}

CheckpointManifest read_manifest(const std::string& folder) {
  const std::string path = fs::path(folder) / "manifest.json";
  std::error_code error;
  check_input(fs::exists(path, error), folder, ": has no manifest.json: not a complete checkpoint");
  json manifest = read_strict_json(path);
  check_input(manifest.is_object() && manifest.value("format", json()) == format_name, path,
              ": is not the manifest of a checkpoint of this program");
  check_input(manifest.value("format_version", json()) == format_version, path, ": has format version ",
              shown(manifest.value("format_version", json())), ", this program reads ", format_version);
  const json written = manifest.value(checksum_key, json());
  manifest.erase(checksum_key);
  check_input(written == hex(checksum(manifest)), path, ": is damaged (its checksum does not match)");
  try {
    return manifest_from(manifest);
  } catch (const json::exception& problem) {
    fail_input(path, ": is not a manifest of this program: ", problem.what());
  }
}

std::vector<std::string> check_continues(const std::string& path, const CheckpointManifest& manifest,
                                         const CheckpointRun& run) {
  const CheckpointRun& other = manifest.run;
  check_input(other.samples_per_step == run.samples_per_step, path, ": was written with a global batch of ",
              other.samples_per_step, " sequences, this run has ", run.samples_per_step,
              " (per_device_train_batch_size × gradient_accumulation_steps × dp): the position in the data would be "
              "another");
  std::vector<std::string> differences;
  if (other.grid != run.grid)
    differences.push_back(text(path, ": was written by another grid (", describe(other.grid),
                               "; this run: ", describe(run.grid), "): the run goes on, equal within rounding"));
  if (other.seed != run.seed)
    differences.push_back(text(path, ": was written with seed ", other.seed, ", this run has ", run.seed,
                               ": the data comes in another order"));
  if (other.data && run.data && other.data != run.data)
    differences.push_back(text(path, ": was written with other training data (", describe(*other.data),
                               "; this run: ", describe(*run.data),
                               "): from here on the order of the data is not the interrupted run's"));
  if (run.threads != 0 && other.threads != run.threads)
    differences.push_back(text(path, ": was written with ", other.threads, " compute threads a rank, this run has ",
                               run.threads, ": the run goes on, but not with the same bits"));
  return differences;
}

std::vector<FoundCheckpoint> find_checkpoints(const std::string& folder) {
  std::vector<FoundCheckpoint> found;
  std::error_code missing;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, missing)) {
    const std::string name = entry.path().filename(), before = name_before_replacement(name);
    const auto step = step_in(before.empty() ? name : before);
    if (!step || (!before.empty() && fs::exists(fs::path(folder) / before))) continue;
    FoundCheckpoint& checkpoint = found.emplace_back();
    checkpoint.path = entry.path();
    checkpoint.step = *step;
    try {
      CheckpointManifest manifest = read_manifest(checkpoint.path);
      check_sizes(checkpoint.path, manifest);
      checkpoint.manifest = std::move(manifest);
    } catch (const Error& problem) {
      checkpoint.problem = problem.what();
    }
  }
  std::sort(found.begin(), found.end(),
            [](const FoundCheckpoint& a, const FoundCheckpoint& b) { return a.step < b.step; });
  return found;
}

std::vector<CompleteCheckpoint> complete_checkpoints(const std::string& folder,
                                                     const std::function<void(const std::string&)>& report) {
  std::vector<CompleteCheckpoint> complete;
  std::vector<FoundCheckpoint> found = find_checkpoints(folder);
  for (FoundCheckpoint& checkpoint : found)
    if (checkpoint.manifest) complete.push_back({checkpoint.path, std::move(*checkpoint.manifest)});
  std::sort(complete.begin(), complete.end(), [](const CompleteCheckpoint& a, const CompleteCheckpoint& b) {
    return a.manifest.serial > b.manifest.serial;
  });
  const std::int64_t newest_step = complete.empty() ? -1 : complete.front().manifest.state.step;
  for (auto checkpoint = found.rbegin(); checkpoint != found.rend() && checkpoint->step > newest_step; ++checkpoint)
    if (!checkpoint->manifest) report(checkpoint->problem);
  return complete;
}

const CompleteCheckpoint* best_of(const std::vector<CompleteCheckpoint>& complete) {
  const auto loss_of = [](const CompleteCheckpoint& c) { return c.manifest.state.validation_loss; };
  const CompleteCheckpoint* best = nullptr;
  for (const CompleteCheckpoint& checkpoint : complete)
    if (loss_of(checkpoint) && (!best || loss_of(checkpoint) < loss_of(*best))) best = &checkpoint;
  return best;
}

std::uint32_t frame_checksum(const std::string& path, const StoredShard& shard) {
  Reader reader(path);
  return frame_checksum(reader, path, shard);
}

void check_shard(const std::string& folder, const StoredShard& shard) {
  const std::string path = fs::path(folder) / shard.file;
  Reader reader(path);
  const std::uint64_t size = reader.size();
  check_input(size == shard.bytes, path, ": has ", size, " bytes, its manifest says ", shard.bytes);
  check_input(frame_checksum(reader, path, shard) == shard.frame_crc, path,
              ": is damaged (the checksum of its structure does not match)");
  for (const StoredDataset& d : shard.datasets)
    check_input(reader.checksum(d.range) == d.crc, path, ": ", d.matrix.name,
                " is damaged (its checksum does not match)");
}

}  // namespace distill
