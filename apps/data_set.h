// The records of a run as token sequences: read and encoded by one rank of each node, seen by all.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "core/communicator.h"
#include "core/train/samples.h"
#include "io/config_file.h"
#include "io/tokenizer.h"

namespace distill {

using Say = std::function<void(const std::string&)>;  // a line for the user

struct DataCounts {
  std::int64_t bad = 0, truncated = 0, left_out = 0;  // records
  std::int64_t supervised = 0;                        // positions, all samples
  int longest = 0;                                    // tokens
  std::array<char, 33> hash{};                        // of all samples (io/hash.h), with its closing 0
};

struct DataSet : DataCounts {
  Samples samples;
  std::string bad_records;  // what is wrong with the first of the bad ones
  std::string file;         // that `distill encode` wrote and that it was read from; empty: encoded by this run
  std::string warning;      // why a file that is there was not used
};

// Files of records and how they were configured.
struct DataFiles {
  std::string_view key;  // where the files are named, for messages
  std::vector<std::string> files;
  std::string template_name;
};

// What `distill encode` writes for these settings and files: <output_dir>/encoded/<key>.h5. All of them are read.
std::filesystem::path encoded_path(const ConfigFile& file, const DataFiles& source);

// The data of this process alone: read where `distill encode` has been, else encoded by `threads`.
DataSet read_data(const ConfigFile& file, const DataFiles& source, const Tokenizer& tokenizer, int threads,
                  const Say& progress);

// Long work that some ranks do while the others wait for as long as it takes and leave them their cores: run_together
// with the threads that such a rank may use.
void work_for_all(Communicator& world, int threads, const std::function<void(int threads)>& work);

// The same for all ranks of world, one copy in each node; all of them call it. What is wrong is a CommonError.
DataSet read_data_once(Communicator& world, const ConfigFile& file, const DataFiles& source, const Tokenizer& tokenizer,
                       int threads, const Say& progress);

}  // namespace distill
