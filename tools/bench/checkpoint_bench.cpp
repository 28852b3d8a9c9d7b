// Checkpoints against the disk: checkpoint_bench FOLDER [MiB] [repetitions], on the disk of FOLDER. The same bytes are
// written plainly (one file, sequentially, fsync), and as a checkpoint in the background (copy, HDF5 file with
// checksums, fsync, manifest, rename) without and with reading it back from the disk, as is done before an older one
// goes; in turns.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "io/checkpoint_writer.h"

using namespace distill;

namespace {

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void write_plainly(const std::string& path, std::span<const std::byte> bytes) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
  check(file >= 0, path, ": cannot create");
  while (!bytes.empty()) {
    const ssize_t n = write(file, bytes.data(), std::min<std::size_t>(bytes.size(), 64 << 20));
    check(n > 0, path, ": cannot write");
    bytes = bytes.subspan(std::size_t(n));
  }
  check(fsync(file) == 0, path, ": cannot flush");
  close(file);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: checkpoint_bench FOLDER [MiB] [repetitions]\n"), 2;
  const std::string folder = std::filesystem::path(argv[1]) / "checkpoint-bench";
  const std::int64_t mebibytes = argc > 2 ? std::atoll(argv[2]) : 1024, tensor_rows = 4096, columns = 1024;
  const int repetitions = argc > 3 ? std::atoi(argv[3]) : 5;
  // Tensors of 16 MiB.
  std::vector<StoredMatrix> parts;
  for (std::int64_t i = 0; i < std::max<std::int64_t>(mebibytes / 16, 1); ++i)
    parts.push_back({.name = text("values/", i),
                     .rows = tensor_rows,
                     .cols = columns,
                     .whole_rows = tensor_rows,
                     .whole_cols = columns});
  const std::size_t part_bytes = std::size_t(tensor_rows * columns) * sizeof(float);
  std::vector<std::byte> bytes(parts.size() * part_bytes);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = std::byte(i * 2654435761u >> 13);
  const auto values = [&](std::size_t i) { return std::span(bytes).subspan(i * part_bytes, part_bytes); };

  std::filesystem::create_directories(folder);
  std::map<std::string, std::vector<double>> seconds;
  Alone alone;
  const auto warn = [](const std::string& message) { std::fprintf(stderr, "%s\n", message.c_str()); };
  CheckpointWriter all_stay(folder + "/all", {}, {}, 0, alone, warn),
      one_stays(folder + "/one", {}, {}, 1, alone, warn);
  std::int64_t step = 0;
  for (int r = -1; r < repetitions; ++r) {  // the first round only prepares
    std::map<std::string, double> now;
    now["1 plain"] = seconds_of([&] { write_plainly(folder + "/plain", bytes); });
    std::filesystem::remove(folder + "/plain");
    double copying = 0;
    const auto checkpoint = [&](CheckpointWriter& writer) {
      copying = seconds_of([&] {
        writer.save({.step = ++step}, parts, [&](std::size_t i, std::span<std::byte> to) {
          std::memcpy(to.data(), values(i).data(), to.size());
        });
      });
      writer.finish();
    };
    now["2 checkpoint"] = seconds_of([&] { checkpoint(all_stay); }) - copying;
    now["4 copy: training stands still"] = copying;
    std::filesystem::remove_all(folder + "/all");
    now["3 checkpoint, read back"] = seconds_of([&] { checkpoint(one_stays); }) - copying;
    if (r >= 0)
      for (const auto& [name, s] : now) seconds[name].push_back(s);
  }
  std::filesystem::remove_all(folder);

  double plain = 0;
  std::printf("%zu MiB, median of %d\n", bytes.size() >> 20, repetitions);
  for (auto& [name, all] : seconds) {
    std::nth_element(all.begin(), all.begin() + std::ptrdiff_t(all.size() / 2), all.end());
    const double median = all[all.size() / 2];
    if (plain == 0) plain = median;
    std::printf("%-34s %8.3f s %8.0f MB/s %5.0f %% of plain\n", name.substr(2).c_str(), median,
                double(bytes.size()) / median * 1e-6, 100 * plain / median);
  }
}
