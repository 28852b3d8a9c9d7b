#include "io/checkpoint.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <catch2/catch.hpp>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "io/crc32c.h"
#include "kernels/backends.h"
#include "parallel/parallel.h"
#include "test/support/hostile.h"
#include "test/support/limit.h"
#include "test/support/refusal.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;
using nlohmann::json;
namespace fs = std::filesystem;
using Lines = std::vector<std::string>;

namespace {

std::string read(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}
void write(const fs::path& path, const std::string& content) { std::ofstream(path, std::ios::binary) << content; }

Lines names_in(const fs::path& folder) {
  Lines names;
  for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

ParamTable small_table() {
  ParamTable table;
  table.add({.name = "model.embed_tokens.weight", .rows = 5, .cols = 7, .is_matrix = true});
  table.add({.name = "model.norm.weight", .cols = 7});
  return table;
}

// What a rank owns: bf16 parameters, f32 masters and moments, one tensor of each other format.
struct State {
  std::unique_ptr<Device> device = make_cpu_device(1);
  ParamTable table = small_table();
  Tensor values = device->tensor(1, table.storage_size(), DType::bf16);
  Tensor master = device->tensor(1, table.storage_size(), DType::f32);
  Tensor half = device->tensor(3, 4, DType::f16);
  Tensor wide = device->tensor(1, 5, DType::f64);
  TrainState train;

  std::vector<CheckpointTensor> tensors() {
    std::vector<CheckpointTensor> all = checkpoint_tensors("values", table, values.view());
    for (const CheckpointTensor& t : checkpoint_tensors("master", table, master.view())) all.push_back(t);
    all.push_back({.name = "exp_avg/half", .data = half.view(), .whole_rows = 6, .whole_cols = 4, .first_row = 3});
    all.push_back({.name = "exp_avg_sq/wide", .data = wide.view(), .whole_rows = 1, .whole_cols = 5});
    return all;
  }

  // Every bit of every tensor depends on seed; NaNs of all kinds included.
  void fill(std::uint32_t seed) {
    std::mt19937 random(seed);
    for (const CheckpointTensor& t : tensors()) {
      auto* bytes = static_cast<unsigned char*>(t.data.mutable_data());
      for (std::size_t i = 0; i < std::size_t(t.data.size()) * size_of(t.data.dtype); ++i)
        bytes[i] = (unsigned char)random();
    }
    train = {.step = std::int64_t(seed),
             .loss_scale = 65536.0 / 3,
             .loss_scale_good_steps = 12,
             .nonfinite_in_a_row = 1,
             .optimizer_updates = std::int64_t(seed) - 1,
             .samples = std::int64_t(1) << 40,
             .tokens = std::int64_t(1) << 60,
             .outlier_steps = 3,
             .last_record = std::int64_t(seed) - 2,
             .recent_losses = {1.0 / 3, 1e-300},
             .recent_gradient_norms = {double(seed) / 7}};
  }

  std::string bits() {
    std::string out =
        text(train.step, ' ', std::bit_cast<std::uint64_t>(train.loss_scale), ' ', train.loss_scale_good_steps, ' ',
             train.nonfinite_in_a_row, ' ', train.optimizer_updates, ' ', train.samples, ' ', train.tokens, ' ',
             std::bit_cast<std::uint64_t>(train.validation_loss.value_or(-1)), ' ', train.outlier_steps, ' ',
             train.last_record, ' ');
    for (const std::vector<double>* recent : {&train.recent_losses, &train.recent_gradient_norms})
      for (const double value : *recent) out += text(std::bit_cast<std::uint64_t>(value), ' ');
    for (const CheckpointTensor& t : tensors())
      out.append(static_cast<const char*>(t.data.data), std::size_t(t.data.size()) * size_of(t.data.dtype));
    return out;
  }
};

const CheckpointRun run{.version = "1.2.3",
                        .config = "seed: 3\n",
                        .seed = 3,
                        .threads = 2,
                        .samples_per_step = 8,
                        .grid = {},
                        .data = StoredData{.records = 60, .tokens = 1 << 20, .hash = "0123"}};

// A store over one rank, with what it warned of.
struct Store {
  ScratchFolder scratch;
  Alone alone;
  State state;
  Lines warnings;
  std::unique_ptr<CheckpointFolder> folder;

  explicit Store(int keep = 0) { reopen(run, keep); }
  void reopen(const CheckpointRun& with = run, int keep = 0) {
    folder = std::make_unique<CheckpointFolder>(
        scratch.path("checkpoints"), with, StoredPlace{}, keep, *state.device, alone,
        [this](const std::string& m) { warnings.push_back(without(m, scratch.path())); });
  }
  std::string path(const std::string& name = "") const { return scratch.path("checkpoints/" + name); }
  void save(std::uint32_t step, std::optional<double> validation_loss = {}) {
    state.fill(step);
    state.train.validation_loss = validation_loss;
    folder->save(state.train, state.tensors());
    folder->finish();
  }
  void load(const std::string& name) {
    state.fill(999);
    state.train = folder->load(path(name), state.tensors());
  }
  std::string newest() {
    const auto found = folder->newest();
    return found ? fs::path(*found).filename().string() : "none";
  }
  std::string refuse(const std::string& name) {
    return refusal(scratch.path(), [&] { load(name); });
  }
};

constexpr const char* shard = "student-pp0-tp0-dp0.h5";
constexpr const char* shard_1 = "step-000001/student-pp0-tp0-dp0.h5";

std::string bits_of(std::uint32_t seed) {
  State state;
  state.fill(seed);
  return state.bits();
}

// Changes a manifest and signs it again, as only somebody who wants to could.
void forge(const std::string& path, const std::function<void(json&)>& change) {
  json manifest = json::parse(read(path));
  manifest.erase("manifest_crc32c");
  change(manifest);
  const std::string content = manifest.dump();
  char digits[9];
  std::snprintf(digits, sizeof digits, "%08x", crc32c(std::as_bytes(std::span(content))));
  manifest["manifest_crc32c"] = digits;
  write(path, manifest.dump());
}

}  // namespace

TEST_CASE("crc32c: known values, both ways, in pieces", "[checkpoint]") {
  const auto bytes_of = [](std::string_view s) { return std::as_bytes(std::span(s)); };
  CHECK(crc32c(bytes_of("123456789")) == 0xe3069283);
  CHECK(crc32c(bytes_of(std::string(32, '\0'))) == 0x8a9136aa);
  CHECK(crc32c(bytes_of(std::string(32, '\xff'))) == 0x62a8ab43);
  CHECK(crc32c({}) == 0);
  std::mt19937 random(1);
  std::string data(1000, ' ');
  for (char& c : data) c = char(random());
  for (int round = 0; round < 200; ++round) {
    const std::size_t first = random() % 500, n = random() % 500, cut = n == 0 ? 0 : random() % n;
    const std::string_view part = std::string_view(data).substr(first, n);
    const std::uint32_t whole = crc32c(bytes_of(part));
    CHECK(crc32c_by_table(bytes_of(part)) == whole);
    CHECK(crc32c(bytes_of(part.substr(cut)), crc32c(bytes_of(part.substr(0, cut)))) == whole);
    CHECK(crc32c_by_table(bytes_of(part.substr(cut)), crc32c_by_table(bytes_of(part.substr(0, cut)))) == whole);
  }
}

TEST_CASE("a checkpoint brings back every bit", "[checkpoint]") {
  Store store;
  CHECK(store.newest() == "none");
  store.save(100);
  CHECK(names_in(store.path()) == Lines{"step-000100"});
  CHECK(names_in(store.path("step-000100")) == Lines{"manifest.json", shard});
  CHECK(store.newest() == "step-000100");
  store.load("step-000100");
  CHECK(store.state.bits() == bits_of(100));
  CHECK(store.warnings.empty());
}

TEST_CASE("a tensor larger than a slab, in rows and in one row, keeps its order", "[checkpoint]") {
  Store store;
  const std::int64_t rows = GENERATE(1, 3, 2500);
  const std::int64_t cols = 5'000'000 / rows;
  Tensor tensor = store.state.device->tensor(rows, cols, DType::f32);
  float* values = tensor.view().as<float>();
  for (std::int64_t i = 0; i < rows * cols; ++i) values[i] = float(i % 9973);
  const std::vector<CheckpointTensor> all = {
      {.name = "values/x", .data = tensor.view(), .whole_rows = rows, .whole_cols = cols}};
  store.folder->save({.step = 1}, all);
  store.folder->finish();
  std::fill_n(values, rows * cols, -1.f);
  CHECK(store.folder->load(store.path("step-000001"), all).step == 1);
  std::int64_t wrong = 0;
  for (std::int64_t i = 0; i < rows * cols; ++i) wrong += values[i] != float(i % 9973);
  CHECK(wrong == 0);
}

TEST_CASE("newest is what was written last, also after going back to an earlier step", "[checkpoint]") {
  Store store;
  for (const std::uint32_t step : {1, 2, 3}) store.save(step);
  CHECK(store.newest() == "step-000003");
  store.reopen();
  store.load("step-000001");
  store.save(2);
  CHECK(store.newest() == "step-000002");
  CHECK(names_in(store.path()) == Lines{"step-000001", "step-000002", "step-000003"});
  store.load("step-000002");
  CHECK(store.state.bits() == bits_of(2));
}

TEST_CASE("a damaged checkpoint is reported and the one before it is used", "[checkpoint]") {
  Store store;
  store.save(1);
  store.save(2);
  const std::string two = store.path("step-000002/"), file = two + shard, whole = read(file);
  std::string expected;
  SECTION("a flipped byte in a tensor") {
    std::string damaged = whole;
    const json manifest = json::parse(read(two + "manifest.json"));
    damaged[manifest["shards"][0]["datasets"][2]["offset"]] ^= 1;
    write(file, damaged);
    expected = "checkpoints/step-000002/" + std::string(shard) +
               ": master/model.embed_tokens.weight is damaged (its checksum does not match)";
    CHECK(store.refuse("step-000002") == expected);
  }
  SECTION("a flipped byte of the file's structure") {
    std::string damaged = whole;
    damaged[9] ^= 1;
    write(file, damaged);
    expected =
        "checkpoints/step-000002/" + std::string(shard) + ": is damaged (the checksum of its structure does not match)";
    CHECK(store.refuse("step-000002") == expected);
  }
  SECTION("a truncated file") {
    write(file, whole.substr(0, 1000));
    CHECK(store.refuse("step-000002") == "checkpoints/step-000002/" + std::string(shard) +
                                             ": has 1000 bytes, its manifest says " + std::to_string(whole.size()));
    expected = "checkpoints/step-000002: " + std::string(shard) + " has 1000 bytes, its manifest says " +
               std::to_string(whole.size());
  }
  SECTION("a missing file") {
    fs::remove(file);
    CHECK(store.refuse("step-000002") ==
          "checkpoints/step-000002/" + std::string(shard) + ": cannot open: No such file or directory");
    expected = "checkpoints/step-000002: lacks " + std::string(shard);
  }
  SECTION("a missing manifest") {
    fs::remove(two + "manifest.json");
    expected = "checkpoints/step-000002: has no manifest.json: not a complete checkpoint";
    CHECK(store.refuse("step-000002") == expected);
  }
  SECTION("a changed manifest") {
    std::string manifest = read(two + "manifest.json");
    manifest.replace(manifest.find("\"seed\": 3"), 9, "\"seed\": 4");
    write(two + "manifest.json", manifest);
    expected = "checkpoints/step-000002/manifest.json: is damaged (its checksum does not match)";
    CHECK(store.refuse("step-000002") == expected);
  }
  SECTION("a torn manifest") {
    write(two + "manifest.json", "{");
    expected =
        "checkpoints/step-000002/manifest.json: not valid JSON: line 1, column 2: syntax error while parsing object "
        "key - unexpected end of input; expected string literal";
    CHECK(store.refuse("step-000002") == expected);
  }
  SECTION("another format") {
    forge(two + "manifest.json", [](json& m) { m["format_version"] = 1; });
    expected = "checkpoints/step-000002/manifest.json: has format version 1, this program reads 2";
    CHECK(store.refuse("step-000002") == expected);
    forge(two + "manifest.json", [](json& m) { m["format"] = "x"; });
    expected = "checkpoints/step-000002/manifest.json: is not the manifest of a checkpoint of this program";
    CHECK(store.refuse("step-000002") == expected);
  }
  CHECK(store.newest() == "step-000001");
  CHECK(store.warnings == Lines{"checkpoint passed over: " + expected});
  store.load("step-000001");
  CHECK(store.state.bits() == bits_of(1));
}

TEST_CASE("any flipped bit is found", "[checkpoint]") {
  Store store;
  store.save(1);
  const std::string file = store.path(shard_1), whole = read(file);
  std::mt19937 random(5);
  for (int round = 0; round < 300; ++round) {
    std::string damaged = whole;
    damaged[random() % damaged.size()] ^= char(1 << (random() % 8));
    write(file, damaged);
    CHECK(store.newest() == "none");
    CHECK(store.refuse("step-000001").find("damaged") != std::string::npos);
  }
}

TEST_CASE("damaged manifests give an error or the same checkpoint", "[checkpoint]") {
  Store store;
  store.save(1);
  const std::string path = store.path("step-000001/manifest.json"), whole = read(path);
  std::mt19937 random(11);
  for (int round = 0; round < 2000; ++round) {
    write(path, damaged(whole, random));
    try {
      store.load("step-000001");
      CHECK(store.state.bits() == bits_of(1));  // white space
    } catch (const Error& error) {
      CHECK(error.code() == ExitCode::bad_input);
    }
  }
}

TEST_CASE("forged manifests cannot do harm", "[checkpoint]") {
  Store store;
  store.save(1);
  const std::string path = store.path("step-000001/manifest.json"), whole = read(path);
  const auto forged = [&](const std::function<void(json&)>& change) {
    write(path, whole);
    forge(path, change);
    return store.refuse("step-000001");
  };
  const auto first = [](json& m) -> json& { return m["shards"][0]["datasets"][0]; };
  const std::string file = "checkpoints/" + std::string(shard_1);
  const std::string no_layout = file + ": its datasets do not lie side by side within the file";
  CHECK(forged([&](json& m) { first(m)["offset"] = UINT64_MAX; }) == no_layout);
  CHECK(forged([&](json& m) { first(m)["bytes"] = UINT64_MAX; }) == no_layout);
  CHECK(forged([&](json& m) { m["shards"][0]["datasets"].push_back(first(m)); }) == no_layout);
  CHECK(forged([&](json& m) { m["shards"][0]["file"] = "../../x"; }).ends_with("shard ../../x is no file name"));
  CHECK(forged([&](json& m) { first(m)["crc32c"] = "xyz"; }).ends_with("checksum xyz is no number"));
  CHECK(forged([&](json& m) { m["state"].erase("step"); }).find("is not a manifest of this program: ") !=
        std::string::npos);
  CHECK(forged([&](json& m) { m["shards"][0]["file"] = "other.h5"; }) ==
        "checkpoints/step-000001/other.h5: cannot open: No such file or directory");
  CHECK(forged([&](json& m) {
          first(m)["first"] = {0, 1};
        }).ends_with("dataset values/model.embed_tokens.weight does not lie within its tensor"));
  CHECK(forged([&](json& m) {
          first(m)["shape"] = {INT64_MAX, INT64_MAX};
        }).ends_with("does not lie within its tensor"));
  CHECK(forged([&](json& m) {
          first(m)["whole_shape"] = {6, 7};
        }) ==
        "checkpoints/step-000001: values/model.embed_tokens.weight is bf16 [6, 7], expected bf16 [5, 7]: another model "
        "or another dtype");
  CHECK(forged([&](json& m) { first(m)["dtype"] = "i32"; }).ends_with("dtype i32 is not one of a checkpoint"));
  CHECK(forged([&](json& m) { first(m)["name"] = "master/model.embed_tokens.weight"; }) ==
        "checkpoints/step-000001: " + std::string(shard) +
            ": master/model.embed_tokens.weight is not what the manifest says");
  CHECK(forged([&](json& m) { m["shards"][0]["datasets"][1]["tensor"] = "values/model.embed_tokens.weight"; }) ==
        "checkpoints/step-000001: its manifest calls values/model.embed_tokens.weight bf16 [5, 7] and bf16 [1, 7]");
  // Any value of the manifest replaced by any other.
  std::mt19937 random(13);
  const std::array<json, 9> others = {nullptr, -1, 0, UINT64_MAX, 1e300, "", "00000000", json::array(), json::object()};
  for (int round = 0; round < 1000; ++round) {
    write(path, whole);
    forge(path, [&](json& m) {
      json flat = m.flatten();
      auto at = flat.begin();
      std::advance(at, std::ptrdiff_t(random() % flat.size()));
      m[json::json_pointer(at.key())] = others[random() % others.size()];
    });
    try {
      store.load("step-000001");
    } catch (const Error& error) {
      CHECK(error.code() == ExitCode::bad_input);
    }
  }
}

TEST_CASE("a checkpoint of another run is refused or warned of", "[checkpoint]") {
  Store store;
  store.save(1);
  CheckpointRun other = run;
  SECTION("grid") {
    other.grid.dp = 2;
    store.reopen(other);
    store.load("step-000001");
    CHECK(store.state.bits() == bits_of(1));
    CHECK(store.warnings ==
          Lines{"checkpoints/step-000001: was written by another grid (tp 1, pp 1, dp 1; this run: tp 1, pp 1, dp 2): "
                "the run goes on, equal within rounding"});
  }
  SECTION("batch") {
    other.samples_per_step = 16;
    store.reopen(other);
    CHECK(
        store.refuse("step-000001") ==
        "checkpoints/step-000001: was written with a global batch of 8 sequences, this run has 16 "
        "(per_device_train_batch_size × gradient_accumulation_steps × dp): the position in the data would be another");
  }
  SECTION("seed and threads") {
    other.seed = 4;
    other.threads = 1;
    store.reopen(other);
    store.load("step-000001");
    CHECK(store.warnings ==
          Lines{"checkpoints/step-000001: was written with seed 3, this run has 4: the data comes in another order",
                "checkpoints/step-000001: was written with 2 compute threads a rank, this run has 1: the run goes on, "
                "but not "
                "with the same bits"});
  }
  SECTION("data") {
    other.data->hash = "4567";
    store.reopen(other);
    store.load("step-000001");
    CHECK(
        store.warnings ==
        Lines{"checkpoints/step-000001: was written with other training data (60 records of 1048576 tokens, hash 0123; "
              "this run: 60 records of 1048576 tokens, hash 4567): from here on the order of the data is not the "
              "interrupted run's"});
    // Older manifests do not know their data.
    store.warnings.clear();
    forge(store.path("step-000001/manifest.json"), [](json& m) { m["run"].erase("data"); });
    store.load("step-000001");
    CHECK(store.state.bits() == bits_of(1));
    CHECK(store.warnings.empty());
  }
  CHECK(store.refuse("step-000007") == "checkpoints/step-000007: has no manifest.json: not a complete checkpoint");
}

TEST_CASE("a checkpoint of another model is refused", "[checkpoint]") {
  Store store;
  store.save(1);
  const auto refuse = [&](const std::function<void(std::vector<CheckpointTensor>&)>& change) {
    std::vector<CheckpointTensor> tensors = store.state.tensors();
    change(tensors);
    return without(refusal(store.scratch.path(), [&] { store.folder->load(store.path("step-000001"), tensors); }),
                   "checkpoints/step-000001");
  };
  CHECK(refuse([](auto& t) { t.pop_back(); }) ==
        ": holds exp_avg_sq/wide, which this run has not: another model or another dtype");
  CHECK(refuse([](auto& t) { t[0].name = "values/other"; }) == ": has no values/other: another model or another dtype");
  CHECK(refuse([](auto& t) { t[0].data.dtype = DType::f16; }) ==
        ": values/model.embed_tokens.weight is bf16 [5, 7], expected f16 [5, 7]: another model or another dtype");
  CHECK(refuse([](auto& t) { t[4].whole_rows = 7; }) ==
        ": exp_avg/half is f16 [6, 4], expected f16 [7, 4]: another model or another dtype");
  CHECK(refuse([](auto& t) { t[4].first_row = 0; }) ==
        ": lacks rows 0 to 2, columns 0 to 3 of exp_avg/half (f16 [6, 4])");
  CHECK(refuse([](auto& t) { t[4].first_row = 2; }) ==
        ": lacks rows 2 to 2, columns 0 to 3 of exp_avg/half (f16 [6, 4])");
  CHECK(refuse([](auto& t) { t[0].data = t[0].data.reshaped(7, 5); }) ==
        ": lacks rows 5 to 6, columns 0 to 4 of values/model.embed_tokens.weight (bf16 [5, 7])");
}

TEST_CASE("old checkpoints go once a new one has been read back", "[checkpoint]") {
  Store store(2);
  for (std::uint32_t step = 1; step <= 3; ++step) store.save(step);
  CHECK(names_in(store.path()) == Lines{"step-000002", "step-000003"});
  // A damaged one does not count among those that stay.
  write(store.path("step-000003/") + shard, "x");
  store.save(4);
  CHECK(names_in(store.path()) == Lines{"step-000002", "step-000003", "step-000004"});
  store.save(5);
  CHECK(names_in(store.path()) == Lines{"step-000003", "step-000004", "step-000005"});
}

TEST_CASE("the best checkpoint is marked and never goes", "[checkpoint]") {
  Store store(1);
  const auto best = [&] {
    std::error_code none;
    return fs::read_symlink(store.path("best"), none).string();
  };
  store.save(1);
  CHECK(best().empty());
  store.save(2, 1.0 / 3);
  CHECK(best() == "step-000002");
  CHECK(names_in(store.path()) == Lines{"best", "step-000002"});
  store.save(3, 0.4);
  store.save(4);
  CHECK(best() == "step-000002");
  CHECK(names_in(store.path()) == Lines{"best", "step-000002", "step-000004"});
  // Also for those who resume, whatever a kill has left of the mark.
  for (const std::string left : {"step-000002", "step-000004", "step-000003"}) {
    CAPTURE(left);
    fs::remove(store.path("best"));
    fs::create_symlink(left, store.path("best"));
    fs::create_symlink(left, store.path(".best.partial"));
    store.reopen(run, 1);
    CHECK(store.newest() == "step-000004");
    store.save(4, 0.5);
    CHECK(best() == "step-000002");
    CHECK(names_in(store.path()) == Lines{"best", "step-000002", "step-000004"});
  }
  CHECK(store.folder->load(store.path("best"), store.state.tensors()).validation_loss == 1.0 / 3);
  store.save(5, 1.0 / 3);  // of equal ones the newest
  CHECK(best() == "step-000005");
  CHECK(names_in(store.path()) == Lines{"best", "step-000005"});
  CHECK(store.newest() == "step-000005");
  CHECK(store.warnings.empty());
  store.reopen(run, 0);
  store.save(6, 0.1);
  CHECK(best() == "step-000006");
  CHECK(names_in(store.path()) == Lines{"best", "step-000005", "step-000006"});
}

TEST_CASE("a best checkpoint that cannot be marked is a checkpoint", "[checkpoint]") {
  Store store(1);
  fs::create_directories(store.path("best/full"));
  store.save(1, 0.5);
  REQUIRE(store.warnings.size() == 1);
  CHECK(store.warnings[0] ==
        "the best checkpoint, checkpoints/step-000001, is not marked: checkpoints/best: cannot rename to it: Is a "
        "directory");
  CHECK(store.newest() == "step-000001");
}

TEST_CASE("checkpoints from before validation losses and records were kept are read", "[checkpoint]") {
  Store store;
  store.save(1);
  forge(store.path("step-000001/manifest.json"), [](json& m) {
    m["state"].erase("validation_loss");
    m["state"].erase("last_record");
  });
  CHECK(store.newest() == "step-000001");
  store.load("step-000001");
  CHECK(std::exchange(store.state.train.last_record, -1) == 0);
  CHECK(store.state.bits() == bits_of(1));
}

TEST_CASE("a resume reads what it uses twice: once to verify it, once to load it", "[checkpoint]") {
  Store store;
  Tensor tensor = store.state.device->tensor(1000, 2000, DType::f32);
  store.state.device->zero(tensor.view());
  const std::vector<CheckpointTensor> all = {
      {.name = "values/x", .data = tensor.view(), .whole_rows = 1000, .whole_cols = 2000}};
  store.folder->save({.step = 1}, all);
  store.folder->finish();
  const auto bytes_read = [] {
    std::ifstream counters("/proc/self/io");
    std::string name;
    double bytes = 0;
    counters >> name >> bytes;  // rchar: of all reads of this process
    return bytes;
  };
  const double before = bytes_read();
  store.folder->load(store.folder->newest().value(), all);
  const double passes = (bytes_read() - before) / double(fs::file_size(store.path(shard_1)));
  CHECK(passes > 1.9);
  CHECK(passes < 2.1);
}

TEST_CASE("what a killed process left is removed by the next save", "[checkpoint]") {
  Store store;
  fs::create_directories(store.path(".step-000007.partial"));
  write(store.path(".step-000007.partial/x.h5"), "x");
  fs::create_directories(store.path(".step-000003.removed"));
  CHECK(store.newest() == "none");
  store.save(8);
  CHECK(names_in(store.path()) == Lines{"step-000008"});
}

TEST_CASE("a full disk loses only the checkpoint that is being written", "[checkpoint]") {
  Store store(1);
  store.save(1);
  const std::uint64_t bytes = fs::file_size(store.path(shard_1));
  for (const std::uint64_t limit : {std::uint64_t(0), std::uint64_t(600), bytes / 2, bytes - 1}) {
    std::string message;
    {
      const FileLimit full(limit);
      message = refusal(
          store.scratch.path(), [&] { store.save(2); }, ExitCode::internal);
    }
    CHECK(message.starts_with("checkpoints/.step-000002.partial/" + std::string(shard) + ": cannot write "));
    CHECK(message.ends_with(": File too large"));
    CHECK(names_in(store.path()) == Lines{"step-000001"});
    store.load("step-000001");
    CHECK(store.state.bits() == bits_of(1));
  }
  store.save(2);
  CHECK(names_in(store.path()) == Lines{"step-000002"});
}

// As when others fill the disk between the check and the writing.
TEST_CASE("HDF5 survives a disk that fills up while it writes", "[checkpoint]") {
  const ScratchFolder scratch;
  const std::string path = scratch.path("x.h5");
  const auto attempt = [&](std::uint64_t limit) {
    return refusal(
        scratch.path(),
        [&] {
          Hdf5Writer file(path);
          const FileLimit full(limit);
          file.write(
              {.name = "a/b", .dtype = DType::f32, .rows = 1000, .cols = 1000, .whole_rows = 1000, .whole_cols = 1000},
              std::vector<std::byte>(4'000'000, std::byte(1)));
          file.close();
        },
        ExitCode::internal);
  };
  CHECK(attempt(100'000).starts_with("x.h5: cannot write a/b: "));
  CHECK(names_in(scratch.path()).empty());
  for (const std::uint64_t limit : {0u, 500u, 2'000u, 4'000'000u}) {
    CHECK(attempt(limit).starts_with("x.h5: cannot write"));
    CHECK(names_in(scratch.path()).empty());
  }
  CHECK(attempt(RLIM_INFINITY) == "no error");
}

TEST_CASE("a killed process leaves a good checkpoint", "[checkpoint]") {
  Store store;
  store.save(1);
  store.folder.reset();  // a child has none of the threads of this process
  for (const int milliseconds : {20, 45, 70}) {
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      store.reopen();
      for (std::uint32_t step = 2;; step = step == 50 ? 2 : step + 1) store.save(step);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
    kill(child, SIGKILL);
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    CHECK(WIFSIGNALED(status));
    store.reopen();
    const std::string newest = store.newest();
    REQUIRE(newest != "none");
    store.load(newest);
    CHECK(store.state.bits() == bits_of(std::uint32_t(store.state.train.step)));
    store.folder.reset();
  }
  CHECK(store.warnings.empty());
}

TEST_CASE("every rank writes and reads its own part", "[checkpoint]") {
  const ScratchFolder scratch;
  const int ranks = 3;
  CheckpointRun with = run;
  with.grid.dp = ranks;
  const auto on_all_ranks = [&](const std::function<void(CheckpointFolder&, State&, Communicator&)>& body) {
    run_ranks(ranks, [&](Communicator& world) {
      State state;
      CheckpointFolder folder(scratch.path(), with, {.dp = world.rank()}, 1, *state.device, world,
                              [](const std::string&) {});
      body(folder, state, world);
    });
  };
  std::array<std::string, ranks> saved, loaded;
  on_all_ranks([&](CheckpointFolder& folder, State& state, Communicator& world) {
    for (std::uint32_t step = 1; step <= 2; ++step) {
      state.fill(10 + std::uint32_t(world.rank()));
      state.train.step = step;
      folder.save(state.train, state.tensors());
    }
    saved[std::size_t(world.rank())] = state.bits();
  });
  CHECK(names_in(scratch.path()) == Lines{"step-000002"});
  on_all_ranks([&](CheckpointFolder& folder, State& state, Communicator& world) {
    const auto newest = folder.newest();
    state.train = folder.load(newest.value(), state.tensors());
    loaded[std::size_t(world.rank())] = text(state.bits());
  });
  // The scalars are those of the first rank.
  for (int r = 0; r < ranks; ++r)
    CHECK(loaded[r].substr(loaded[r].size() - 200) == saved[r].substr(saved[r].size() - 200));

  std::string damaged = read(scratch.path("step-000002/student-pp0-tp0-dp2.h5"));
  damaged[8] ^= 1;
  write(scratch.path("step-000002/student-pp0-tp0-dp2.h5"), damaged);
  std::array<std::string, ranks> messages;
  on_all_ranks([&](CheckpointFolder& folder, State& state, Communicator& world) {
    messages[std::size_t(world.rank())] =
        refusal(scratch.path(), [&] { folder.load(scratch.path("step-000002"), state.tensors()); });
    if (folder.newest().has_value()) messages[0] = "found a newest one";
  });
  for (const std::string& message : messages)
    CHECK(message == "step-000002/student-pp0-tp0-dp2.h5: is damaged (the checksum of its structure does not match)");
}

namespace {

// Rectangles of whole matrices, by rank: what a grid makes of a state.
struct Part {
  std::string name;
  Slab slab;
};
using Layout = std::vector<std::vector<Part>>;

struct Whole {
  std::string name;
  DType dtype;
  std::int64_t rows, cols;
};
const std::vector<Whole> wholes = {{"values/w", DType::bf16, 13, 11},
                                   {"exp_avg/w", DType::f32, 13, 11},
                                   {"values/norm", DType::bf16, 1, 29},
                                   {"exp_avg/norm", DType::f32, 1, 29},
                                   {"exp_avg/last", DType::f64, 40, 1}};

// The tensors of one kind one after the other, cut anywhere: up to three rectangles of each matrix.
Layout flat_cuts(int ranks, std::mt19937& random) {
  Layout layout{std::size_t(ranks)};
  for (const Whole& w : wholes) {
    std::vector<std::int64_t> cuts = {0, w.rows * w.cols};
    for (int i = 1; i < ranks; ++i) cuts.push_back(std::int64_t(random()) % (w.rows * w.cols + 1));
    std::sort(cuts.begin(), cuts.end());
    for (std::size_t r = 0; r < std::size_t(ranks); ++r) {
      std::int64_t at = cuts[r];
      const std::int64_t end = cuts[r + 1];
      while (at < end) {
        const std::int64_t row = at / w.cols, col = at % w.cols;
        const bool is_whole_rows = col == 0 && end - at >= w.cols;
        const std::int64_t rows = is_whole_rows ? (end - at) / w.cols : 1;
        const std::int64_t cols = is_whole_rows ? w.cols : std::min(w.cols - col, end - at);
        layout[r].push_back({w.name, {row, col, rows, cols}});
        at += rows * cols;
      }
    }
  }
  return layout;
}

// Rows or columns of each matrix shared out, some of them empty.
Layout straight_cuts(int ranks, bool by_rows, std::mt19937& random) {
  Layout layout{std::size_t(ranks)};
  for (const Whole& w : wholes) {
    const std::int64_t n = by_rows ? w.rows : w.cols;
    std::vector<std::int64_t> cuts = {0, n};
    for (int i = 1; i < ranks; ++i) cuts.push_back(std::int64_t(random()) % (n + 1));
    std::sort(cuts.begin(), cuts.end());
    for (std::size_t r = 0; r < std::size_t(ranks); ++r)
      layout[r].push_back({w.name, by_rows ? Slab{cuts[r], 0, cuts[r + 1] - cuts[r], w.cols}
                                           : Slab{0, cuts[r], w.rows, cuts[r + 1] - cuts[r]}});
  }
  return layout;
}

// Rectangles anywhere, which overlap, and the whole on one rank.
Layout replicas(int ranks, std::mt19937& random) {
  Layout layout{std::size_t(ranks)};
  const auto below = [&](std::int64_t n) { return std::int64_t(random()) % n; };
  for (const Whole& w : wholes) {
    for (std::vector<Part>& mine : layout)
      for (int i = 0; i < 3; ++i) {
        const std::int64_t row = below(w.rows), col = below(w.cols);
        mine.push_back({w.name, {row, col, 1 + below(w.rows - row), 1 + below(w.cols - col)}});
      }
    layout[random() % layout.size()].push_back({w.name, {0, 0, w.rows, w.cols}});
  }
  return layout;
}

// A byte that depends on the element and its tensor only.
unsigned char byte_at(std::size_t tensor, std::int64_t element, std::size_t byte) {
  return (unsigned char)((std::size_t(element) * 2654435761u + tensor * 97 + byte * 31) >> 3);
}

// The parts of one rank in memory.
struct Parts {
  std::unique_ptr<Device> device = make_cpu_device(1);
  std::vector<Tensor> memory;
  std::vector<CheckpointTensor> tensors;

  explicit Parts(const std::vector<Part>& parts) {
    for (const Part& part : parts) {
      const Whole& whole = *whole_of(part);
      memory.push_back(device->tensor(part.slab.rows, part.slab.cols, whole.dtype));
      tensors.push_back({.name = part.name,
                         .data = memory.back().view(),
                         .whole_rows = whole.rows,
                         .whole_cols = whole.cols,
                         .first_row = part.slab.first_row,
                         .first_col = part.slab.first_col});
    }
  }
  static std::vector<Whole>::const_iterator whole_of(const Part& part) {
    return std::find_if(wholes.begin(), wholes.end(), [&](const Whole& w) { return w.name == part.name; });
  }
  // Calls visit(byte in memory, what it must be) for every byte.
  template <class Visit>
  void for_each_byte(const Visit& visit) {
    for (const CheckpointTensor& t : tensors) {
      const auto whole = whole_of({t.name, {}});
      const std::size_t width = size_of(t.data.dtype);
      auto* at = static_cast<unsigned char*>(t.data.mutable_data());
      for (std::int64_t row = 0; row < t.data.rows; ++row)
        for (std::int64_t col = 0; col < t.data.cols; ++col)
          for (std::size_t b = 0; b < width; ++b, ++at)
            visit(*at, byte_at(std::size_t(whole - wholes.begin()),
                               (t.first_row + row) * whole->cols + t.first_col + col, b));
    }
  }
};

void on_ranks(const ScratchFolder& scratch, const Layout& layout,
              const std::function<void(CheckpointFolder&, Parts&, Communicator&)>& body) {
  CheckpointRun with = run;
  with.grid.dp = int(layout.size());
  run_ranks(int(layout.size()), [&](Communicator& world) {
    Parts parts(layout[std::size_t(world.rank())]);
    CheckpointFolder folder(scratch.path(), with, {.dp = world.rank()}, 0, *parts.device, world,
                            [](const std::string&) {});
    body(folder, parts, world);
  });
}
void save_layout(const ScratchFolder& scratch, const Layout& layout) {
  on_ranks(scratch, layout, [](CheckpointFolder& folder, Parts& parts, Communicator&) {
    parts.for_each_byte([](unsigned char& byte, unsigned char value) { byte = value; });
    folder.save({.step = 1}, parts.tensors);
  });
}
std::int64_t wrong_bytes(const ScratchFolder& scratch, const Layout& layout) {
  std::atomic<std::int64_t> wrong = 0;
  on_ranks(scratch, layout, [&](CheckpointFolder& folder, Parts& parts, Communicator&) {
    parts.for_each_byte([](unsigned char& byte, unsigned char value) { byte = (unsigned char)~value; });
    wrong += folder.load(folder.newest().value(), parts.tensors).step != 1;
    parts.for_each_byte([&](unsigned char byte, unsigned char value) { wrong += byte != value; });
  });
  return wrong;
}
Lines refusals(const ScratchFolder& scratch, const Layout& layout) {
  Lines messages(layout.size());
  on_ranks(scratch, layout, [&](CheckpointFolder& folder, Parts& parts, Communicator& world) {
    try {
      folder.load(scratch.path("step-000001"), parts.tensors);
    } catch (const CommonError& error) {
      messages[std::size_t(world.rank())] = without(error.what(), scratch.path());
    }
  });
  return messages;
}

}  // namespace

TEST_CASE("what one layout of ranks saved, every other loads, bit for bit", "[checkpoint]") {
  std::mt19937 random(17);
  const auto layouts = [&] {
    std::vector<Layout> all;
    for (const int ranks : {1, 2, 3}) {
      all.push_back(flat_cuts(ranks, random));
      all.push_back(straight_cuts(ranks, true, random));
      all.push_back(straight_cuts(ranks, false, random));
      all.push_back(replicas(ranks, random));
    }
    return all;
  };
  for (const Layout& saved : layouts()) {
    const ScratchFolder scratch;
    save_layout(scratch, saved);
    for (const Layout& wanted : layouts()) CHECK(wrong_bytes(scratch, wanted) == 0);
  }
}

TEST_CASE("a rank that owns nothing writes nothing", "[checkpoint]") {
  const ScratchFolder scratch;
  std::mt19937 random(1);
  Layout layout = straight_cuts(1, true, random);
  layout.push_back({{"values/w", {13, 0, 0, 11}}});
  layout.emplace_back();
  save_layout(scratch, layout);
  CHECK(names_in(scratch.path("step-000001")) == Lines{"manifest.json", shard});
  CHECK(wrong_bytes(scratch, flat_cuts(2, random)) == 0);
}

TEST_CASE("a piece that no rank saved is missed by all", "[checkpoint]") {
  const ScratchFolder scratch;
  std::mt19937 random(2);
  Layout layout = straight_cuts(1, true, random);
  layout[0].erase(layout[0].begin());
  for (const Slab& slab : {Slab{0, 0, 4, 11}, Slab{4, 0, 9, 3}, Slab{5, 3, 8, 8}, Slab{4, 4, 1, 7}})
    layout[0].push_back({"values/w", slab});
  save_layout(scratch, layout);  // all of it but [4, 3]
  const std::string message = "step-000001: lacks rows 4 to 4, columns 3 to 3 of values/w (bf16 [13, 11])";
  for (const std::string& found : refusals(scratch, straight_cuts(3, false, random))) CHECK(found == message);
  // A rank that does not need it does not help the others.
  const Layout wanted = {{{"values/w", {0, 0, 2, 11}}}, {{"values/w", {2, 0, 11, 11}}}};
  for (const std::string& found : refusals(scratch, wanted)) CHECK(found == message);
}

TEST_CASE("a damaged file of one rank is found by all, whoever needs it", "[checkpoint]") {
  const ScratchFolder scratch;
  std::mt19937 random(3);
  save_layout(scratch, flat_cuts(3, random));
  const std::string file = scratch.path("step-000001/student-pp0-tp0-dp2.h5");
  std::string bytes = read(file);
  const json manifest = json::parse(read(scratch.path("step-000001/manifest.json")));
  const json& dataset = manifest["shards"][2]["datasets"][0];
  bytes[dataset["offset"].get<std::size_t>() + 1] ^= 4;
  write(file, bytes);
  for (const int ranks : {1, 2, 3})
    for (const std::string& message : refusals(scratch, flat_cuts(ranks, random)))
      CHECK(message == "step-000001/student-pp0-tp0-dp2.h5: " + dataset["name"].get<std::string>() +
                           " is damaged (its checksum does not match)");
}
