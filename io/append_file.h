// A file that grows by whole pieces: each is written at once and complete, or not at all.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace distill {

class AppendFile {
 public:
  using Warn = std::function<void(const std::string&)>;

  // Opens or creates; what cannot be opened is an input error.
  AppendFile(const std::string& path, Warn warn);
  ~AppendFile();
  AppendFile(const AppendFile&) = delete;
  AppendFile& operator=(const AppendFile&) = delete;

  const std::string& path() const { return path_; }
  // Bytes that an older file of the name brought along, and complete pieces since.
  std::int64_t size() const { return end_; }
  void cut(std::int64_t size);
  // A piece that cannot be written (the disk is full) is left out and reported once.
  void append(std::string_view piece);
  // Makes what was appended before durable; a failure is reported once. Another thread may call it meanwhile.
  void sync();

 private:
  std::string path_;
  Warn warn_;
  bool warned_ = false;       // of append()
  bool sync_warned_ = false;  // of sync()
  int descriptor_ = -1;
  std::int64_t end_ = 0;
};

}  // namespace distill
