// Shards of a checkpoint: the bytes say which rectangles of a matrix two HDF5 files hold and which rectangle is wanted.
// It is read, element by element what was written, or refused where an element is nowhere. HDF5 itself is no subject:
// it gets only bytes whose checksums are right. Last, the manifest may be made to say something else than the files.
#include <cstring>
#include <map>
#include <vector>

#include "io/checkpoint_reader.h"
#include "test/fuzz/fuzz.h"

using namespace distill;
using namespace distill::test;

namespace {

// Numbers out of the input; 0 when it is at its end.
class Numbers {
 public:
  Numbers(const std::uint8_t* bytes, std::size_t size) : next_(bytes), end_(bytes + size) {}
  // In [low, high].
  std::int64_t next(std::int64_t low, std::int64_t high) {
    return next_ == end_ ? low : low + *next_++ % (high - low + 1);
  }

 private:
  const std::uint8_t *next_, *end_;
};

StoredMatrix rectangle(Numbers& numbers, const StoredMatrix& whole) {
  StoredMatrix m = whole;
  m.first_row = numbers.next(0, whole.whole_rows - 1);
  m.first_col = numbers.next(0, whole.whole_cols - 1);
  m.rows = numbers.next(0, whole.whole_rows - m.first_row);
  m.cols = numbers.next(0, whole.whole_cols - m.first_col);
  return m;
}

bool holds(const StoredMatrix& m, std::int64_t row, std::int64_t col) {
  return row >= m.first_row && row < m.first_row + m.rows && col >= m.first_col && col < m.first_col + m.cols;
}

// The bytes of an element tell its place.
void put_value(std::byte* to, const StoredMatrix& m, std::int64_t row, std::int64_t col) {
  const std::uint64_t value = std::uint64_t(row * m.whole_cols + col + 1) * 257;
  std::memcpy(to, &value, size_of(m.dtype));
}

// Elements [first, first + count) of each side of a rectangle of m, row-major.
std::vector<std::byte> values(const StoredMatrix& m) {
  const std::size_t width = size_of(m.dtype);
  std::vector<std::byte> out(std::size_t(m.rows * m.cols) * width);
  for (std::int64_t i = 0; i < m.rows * m.cols; ++i)
    put_value(out.data() + std::size_t(i) * width, m, m.first_row + i / m.cols, m.first_col + i % m.cols);
  return out;
}

StoredDataset write(Hdf5Writer& file, StoredMatrix m, std::size_t number) {
  if (number > 0) m.name += "#" + std::to_string(number);
  const FileRange range = file.write(m, values(m));
  return {.tensor = "values/x", .matrix = m, .range = range, .crc = 0};
}

void read(const std::string& folder, const CheckpointManifest& manifest, const StoredMatrix& wanted, bool is_there,
          bool is_true) {
  std::vector<std::byte> out(std::size_t(wanted.rows * wanted.cols) * size_of(wanted.dtype));
  const bool is_read = is_accepted([&] { CheckpointReader(folder, manifest, "b").read(wanted, out); });
  if (!is_true) return;
  claim(is_read == is_there, "a rectangle is read exactly where every element is somewhere");
  if (is_read) claim(out == values(wanted), "what is read is what was written");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  static const FuzzFolder folder;
  Numbers numbers(bytes, size);
  constexpr DType types[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
  StoredMatrix whole{.name = "values/x", .dtype = types[numbers.next(0, 3)]};
  whole.whole_rows = numbers.next(1, 9);
  whole.whole_cols = numbers.next(1, 9);
  const StoredMatrix wanted = rectangle(numbers, whole);
  CheckpointManifest manifest;
  manifest.shards = {{.file = "a", .datasets = {}}, {.file = "b", .datasets = {}}};
  std::vector<StoredMatrix> parts;
  {
    Hdf5Writer a(folder.path() + "/a"), b(folder.path() + "/b");
    for (std::int64_t n = numbers.next(1, 6); n > 0; --n) {
      const bool is_first = numbers.next(0, 1) == 0;
      std::vector<StoredDataset>& datasets = manifest.shards[is_first ? 0 : 1].datasets;
      parts.push_back(rectangle(numbers, whole));
      datasets.push_back(write(is_first ? a : b, parts.back(), datasets.size()));
    }
    a.close();
    b.close();
  }
  bool is_there = true;
  for (std::int64_t row = wanted.first_row; row < wanted.first_row + wanted.rows; ++row)
    for (std::int64_t col = wanted.first_col; col < wanted.first_col + wanted.cols; ++col)
      is_there = is_there && std::any_of(parts.begin(), parts.end(), [&](auto& m) { return holds(m, row, col); });
  read(folder.path(), manifest, wanted, is_there, true);

  std::vector<StoredDataset>& datasets = manifest.shards[manifest.shards[0].datasets.empty() ? 1 : 0].datasets;
  StoredMatrix& m = datasets[std::size_t(numbers.next(0, std::int64_t(datasets.size()) - 1))].matrix;
  m = rectangle(numbers, whole);
  m.name = numbers.next(0, 1) == 0 ? "values/x" : "values/nowhere";
  read(folder.path(), manifest, wanted, is_there, false);
  return 0;
}
