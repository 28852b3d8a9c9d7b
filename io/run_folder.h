// The folder of a run: used by one run at a time, with a mark when that is finished.
#pragma once

#include <cstdint>
#include <string>

namespace distill {

class RunFolder {
 public:
  // Makes the folder where it is missing and locks it until the process ends. A folder that another run holds is an
  // input error that names that run.
  explicit RunFolder(const std::string& path);
  ~RunFolder();
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;

  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

  // The file `finished` in the folder, for job scripts.
  void mark_finished(std::int64_t step) const;
  void clear_finished() const;

 private:
  std::string path_;
  int lock_ = -1;
};

}  // namespace distill
