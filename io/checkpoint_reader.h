// The tensors of a checkpoint in any rectangles, from whichever files of whichever grid hold them.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/checkpoint_manifest.h"

namespace distill {

class CheckpointReader {
 public:
  // Where several files hold the same elements, `nearest` comes first. What the manifest says is checked here and in
  // check_holds; bytes are not, and HDF5 is not made for damaged files: check_shard comes before read.
  CheckpointReader(std::string path, CheckpointManifest manifest, std::string_view nearest = "");

  const std::string& path() const { return path_; }
  const CheckpointManifest& manifest() const { return manifest_; }
  // By name, with their whole shapes.
  std::map<std::string, StoredMatrix> tensors() const;

  // `wanted`: a rectangle of the tensor wanted.name. An input error where an element of it is nowhere, or where the
  // tensor has another type or whole shape.
  void check_holds(const StoredMatrix& wanted) const;
  // The rectangle, row-major.
  void read(const StoredMatrix& wanted, std::span<std::byte> to);

 private:
  struct Part {
    const StoredShard* shard;
    const StoredDataset* dataset;
  };
  // What is read from where.
  struct Piece {
    Part part;
    Slab slab;  // of the whole tensor
  };
  std::vector<Piece> find(const StoredMatrix& wanted) const;
  const Hdf5Reader& open(const StoredShard& shard);

  std::string path_;
  CheckpointManifest manifest_;
  std::map<std::string, std::vector<Part>> parts_;  // by tensor; never empty
  std::map<const StoredShard*, std::unique_ptr<Hdf5Reader>> files_;
};

}  // namespace distill
