// What the fuzz targets share: files out of the fuzzer's bytes, and a claim that ends the process where it does not
// hold.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "core/error.h"

namespace distill::test {

// A folder in memory that is there as long as the process, and rewritten by every input.
class FuzzFolder {
 public:
  FuzzFolder() {
    const bool has_memory = std::filesystem::is_directory("/dev/shm");
    path_ = (has_memory ? std::filesystem::path("/dev/shm") : std::filesystem::temp_directory_path()) /
            "distill-fuzz-XXXXXX";
    if (mkdtemp(path_.data()) == nullptr) std::abort();
  }
  ~FuzzFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  FuzzFolder(const FuzzFolder&) = delete;
  FuzzFolder& operator=(const FuzzFolder&) = delete;

  const std::string& path() const { return path_; }
  std::string write(const std::string& name, std::string_view bytes) const {
    const std::string file = path_ + "/" + name;
    if (!std::ofstream(file, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size())).flush()) std::abort();
    return file;
  }

 private:
  std::string path_;
};

// What must hold for every input.
inline void claim(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}

// Runs work, which may only refuse the input: any other error is a crash.
template <class Work>
bool is_accepted(const Work& work) {
  try {
    work();
    return true;
  } catch (const Error& error) {
    claim(error.code() == ExitCode::bad_input, error.what());
    return false;
  }
}

inline std::string_view text_of(const std::uint8_t* bytes, std::size_t size) {
  return {reinterpret_cast<const char*>(bytes), size};
}

}  // namespace distill::test
