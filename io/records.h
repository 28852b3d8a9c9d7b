// Question/answer records from JSON files: an array of objects, or JSON lines (one object per line). Which of the two
// is decided by the file's first character, not by its name. README.md says what is tolerated.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace distill {

// Names of the fields of a record; an empty name means that there is no such field.
struct RecordFields {
  std::string question = "question", answer = "answer";  // required, strings
  std::string prompt, system;                            // may be missing or null in a record
};

struct Record {
  std::string system, prompt, question, answer;
};

struct Records {
  std::vector<Record> records;          // of all files, in order
  std::int64_t bad = 0;                 // records left out
  std::vector<std::string> complaints;  // about the first few of them: "file:line: record n: what is wrong"

  // Counts and complaints in a few lines, for a log or an error.
  std::string describe_bad() const;
};

// Bad records (unreadable JSON, bytes that are not UTF-8, a missing field, a wrong type) are all counted; without
// skip_bad any of them is an input error, as are a file that cannot be read or holds no record, and no usable record at
// all.
Records read_records(const std::vector<std::string>& files, const RecordFields& fields, bool skip_bad);

}  // namespace distill
