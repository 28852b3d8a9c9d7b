#include "io/checkpoint_reader.h"

#include <algorithm>
#include <filesystem>

#include "core/error.h"

namespace distill {

namespace {

Slab slab_of(const StoredMatrix& m) { return {m.first_row, m.first_col, m.rows, m.cols}; }

bool is_empty(const Slab& s) { return s.rows <= 0 || s.cols <= 0; }

Slab intersection(const Slab& a, const Slab& b) {
  const std::int64_t row = std::max(a.first_row, b.first_row), col = std::max(a.first_col, b.first_col);
  return {row, col, std::min(a.first_row + a.rows, b.first_row + b.rows) - row,
          std::min(a.first_col + a.cols, b.first_col + b.cols) - col};
}

// Adds what is left of `whole` around its part `hole`: above, below, to the left, to the right.
void add_rest(std::vector<Slab>& rest, const Slab& whole, const Slab& hole) {
  const std::int64_t bottom = hole.first_row + hole.rows, right = hole.first_col + hole.cols;
  for (const Slab& side : {Slab{whole.first_row, whole.first_col, hole.first_row - whole.first_row, whole.cols},
                           Slab{bottom, whole.first_col, whole.first_row + whole.rows - bottom, whole.cols},
                           Slab{hole.first_row, whole.first_col, hole.rows, hole.first_col - whole.first_col},
                           Slab{hole.first_row, right, hole.rows, whole.first_col + whole.cols - right}})
    if (!is_empty(side)) rest.push_back(side);
}

std::string describe(const StoredMatrix& m) {
  return text(name_of(m.dtype), " [", m.whole_rows, ", ", m.whole_cols, ']');
}

bool same_tensor(const StoredMatrix& a, const StoredMatrix& b) {
  return a.dtype == b.dtype && a.whole_rows == b.whole_rows && a.whole_cols == b.whole_cols;
}

}  // namespace

CheckpointReader::CheckpointReader(std::string path, CheckpointManifest manifest, std::string_view nearest)
    : path_(std::move(path)), manifest_(std::move(manifest)) {
  std::stable_partition(manifest_.shards.begin(), manifest_.shards.end(),
                        [&](const StoredShard& shard) { return shard.file == nearest; });
  for (const StoredShard& shard : manifest_.shards)
    for (const StoredDataset& dataset : shard.datasets) {
      std::vector<Part>& parts = parts_[dataset.tensor];
      parts.push_back({&shard, &dataset});
      const StoredMatrix &first = parts.front().dataset->matrix, &last = dataset.matrix;
      check_input(same_tensor(first, last), path_, ": its manifest calls ", dataset.tensor, ' ', describe(first),
                  " and ", describe(last));
    }
}

std::map<std::string, StoredMatrix> CheckpointReader::tensors() const {
  std::map<std::string, StoredMatrix> all;
  for (const auto& [name, parts] : parts_) {
    StoredMatrix& whole = all[name] = parts.front().dataset->matrix;
    whole.name = name;
    whole.rows = whole.whole_rows;
    whole.cols = whole.whole_cols;
    whole.first_row = whole.first_col = 0;
  }
  return all;
}

std::vector<CheckpointReader::Piece> CheckpointReader::find(const StoredMatrix& wanted) const {
  const auto stored = parts_.find(wanted.name);
  check_input(stored != parts_.end(), path_, ": has no ", wanted.name, ": another model or another dtype");
  const StoredMatrix& found = stored->second.front().dataset->matrix;
  check_input(same_tensor(found, wanted), path_, ": ", wanted.name, " is ", describe(found), ", expected ",
              describe(wanted), ": another model or another dtype");
  std::vector<Piece> pieces;
  std::vector<Slab> missing = {slab_of(wanted)};
  if (is_empty(missing.front())) return pieces;
  for (const Part& part : stored->second) {
    std::vector<Slab> still_missing;
    for (const Slab& slab : missing) {
      const Slab hit = intersection(slab, slab_of(part.dataset->matrix));
      if (is_empty(hit)) {
        still_missing.push_back(slab);
      } else {
        pieces.push_back({part, hit});
        add_rest(still_missing, slab, hit);
      }
    }
    missing = std::move(still_missing);
    if (missing.empty()) return pieces;
  }
  const Slab& hole = missing.front();
  fail_input(path_, ": lacks rows ", hole.first_row, " to ", hole.first_row + hole.rows - 1, ", columns ",
             hole.first_col, " to ", hole.first_col + hole.cols - 1, " of ", wanted.name, " (", describe(found), ')');
}

void CheckpointReader::check_holds(const StoredMatrix& wanted) const { find(wanted); }

const Hdf5Reader& CheckpointReader::open(const StoredShard& shard) {
  std::unique_ptr<Hdf5Reader>& file = files_[&shard];
  if (!file) file = std::make_unique<Hdf5Reader>(std::filesystem::path(path_) / shard.file);
  return *file;
}

void CheckpointReader::read(const StoredMatrix& wanted, std::span<std::byte> to) {
  const std::size_t width = size_of(wanted.dtype);
  check(to.size() == std::size_t(wanted.rows * wanted.cols) * width, "checkpoint: ", to.size(), " bytes for ",
        wanted.name, " [", wanted.rows, ", ", wanted.cols, ']');
  for (const Piece& piece : find(wanted)) {
    const StoredMatrix& matrix = piece.part.dataset->matrix;
    const Hdf5Reader& file = open(*piece.part.shard);
    check_input(file.describe(matrix.name) == matrix, path_, ": ", piece.part.shard->file, ": ", matrix.name,
                " is not what the manifest says");
    const Slab& slab = piece.slab;
    const std::int64_t first = (slab.first_row - wanted.first_row) * wanted.cols + slab.first_col - wanted.first_col;
    file.read(matrix, {slab.first_row - matrix.first_row, slab.first_col - matrix.first_col, slab.rows, slab.cols},
              to.data() + std::size_t(first) * width, wanted.cols);
  }
}

}  // namespace distill
