// The folder of a run, and where else it writes: used by one run at a time, with a mark when that is finished.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <string>
#include <vector>

namespace distill {

// A folder that this process alone writes into until the lock is destroyed.
class FolderLock {
 public:
  using Warn = std::function<void(const std::string&)>;
  // Makes the folder where it is missing. One that another run holds is an input error that names that run; a file
  // system that knows no locks is a warning.
  FolderLock(const std::string& path, const Warn& warn);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int descriptor_ = -1;
};

class RunFolder {
 public:
  // Locks the folder and the `others` that the run writes into. Several names of one folder count once.
  RunFolder(const std::string& path, const std::vector<std::string>& others, const FolderLock::Warn& warn);

  const std::string& path() const { return locks_.front().path(); }
  std::string file(const std::string& name) const { return path() + "/" + name; }

  // The file `finished` in the folder, for job scripts.
  void mark_finished(std::int64_t step) const;
  void clear_finished() const;

 private:
  std::list<FolderLock> locks_;
};

}  // namespace distill
