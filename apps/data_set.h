// The records of a run as token sequences: read and encoded by one rank of each node, seen by all.
#pragma once

#include <cstdint>
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
};

struct DataSet : DataCounts {
  Samples samples;
  std::string bad_records;  // what is wrong with the first of the bad ones
};

// Files of records and how they were configured.
struct DataFiles {
  std::string_view key;  // where the files are named, for messages
  std::vector<std::string> files;
  std::string template_name;
};

// The data of this process alone, encoded by `threads`.
DataSet read_data(const ConfigFile& file, const DataFiles& source, const Tokenizer& tokenizer, int threads,
                  const Say& progress);

// The same for all ranks of world, one copy in each node; all of them call it. What is wrong is a CommonError.
DataSet read_data_once(Communicator& world, const ConfigFile& file, const DataFiles& source, const Tokenizer& tokenizer,
                       int threads, const Say& progress);

}  // namespace distill
