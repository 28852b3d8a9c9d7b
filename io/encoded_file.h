// Encoded records in an HDF5 file, written once and read by later runs (README.md, "Encoded data").
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "core/train/samples.h"

namespace distill {

struct EncodedData {
  Samples samples;
  std::int64_t bad = 0, truncated = 0, left_out = 0;  // records
};

// Names what would come out: a hash of the version of the format, of words that say how records are encoded, and of
// the names and bytes of files, in this order. 32 hexadecimal digits.
std::string encoding_key(std::span<const std::string> words, std::span<const std::string> files);

// Complete or absent, whatever happens. Returns the size of the file in bytes. Failures throw (exit code internal).
std::uint64_t write_encoded(const std::string& path, const EncodedData& data);

// Whatever is wrong with the file is an input error: another version, damage, ids that the vocabulary lacks.
EncodedData read_encoded(const std::string& path, std::int64_t vocabulary);

}  // namespace distill
