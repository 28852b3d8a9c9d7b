// A whole file as read-only memory: pages are read when touched and shared between the processes of a machine.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace distill {

class MappedFile {
 public:
  // A file that is missing, unreadable or no regular file is an input error that names it.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::string_view bytes() const { return {data_, size_}; }

 private:
  const char* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace distill
