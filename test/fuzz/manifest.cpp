// The manifest.json of a checkpoint. Its checksum is put right, so that what it says is what is tried.
#include "io/checkpoint_manifest.h"

#include <nlohmann/json.hpp>

#include "io/checkpoint_reader.h"
#include "io/crc32c.h"
#include "test/fuzz/fuzz.h"

using namespace distill;
using namespace distill::test;
using nlohmann::json;

namespace {

constexpr const char* checksum_key = "manifest_crc32c";

std::string with_checksum(std::string_view content) {
  json manifest = json::parse(content, nullptr, false);
  if (!manifest.is_object()) return std::string(content);
  manifest.erase(checksum_key);
  const std::string words = manifest.dump();
  char digits[9];
  std::snprintf(digits, sizeof digits, "%08x", crc32c(std::as_bytes(std::span(words))));
  manifest[checksum_key] = digits;
  return manifest.dump();
}

void use(const std::string& folder, const CheckpointManifest& manifest) {
  for (const StoredShard& shard : manifest.shards) is_accepted([&] { check_shard(folder, shard); });
  is_accepted([&] {
    const CheckpointReader reader(folder, manifest);
    for (const auto& [_, found] : reader.tensors()) {
      const StoredMatrix& whole = found;
      is_accepted([&] { reader.check_holds(whole); });
      StoredMatrix part = whole;
      part.first_row = part.rows / 2;
      part.rows -= part.first_row;
      is_accepted([&] { reader.check_holds(part); });
    }
  });
  CheckpointRun run = manifest.run;
  run.seed += 1;
  is_accepted([&] { check_continues(folder, manifest, run); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  static const FuzzFolder folder;
  static const std::string checkpoint = folder.path() + "/step-000001";
  static const bool is_new = std::filesystem::create_directories(checkpoint);
  if (is_new) folder.write("step-000001/a", std::string(64, 'a'));
  folder.write("step-000001/manifest.json", with_checksum(text_of(bytes, size)));
  CheckpointManifest manifest;
  if (is_accepted([&] { manifest = read_manifest(checkpoint); })) {
    use(checkpoint, manifest);
    const std::string written = to_json(manifest);
    folder.write("step-000001/manifest.json", written);
    claim(to_json(read_manifest(checkpoint)) == written, "a manifest reads back as it was written");
  }
  find_checkpoints(folder.path());
  complete_checkpoints(folder.path(), [](const std::string&) {});
  return 0;
}
