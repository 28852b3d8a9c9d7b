#include "io/mapped_file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>

#include "test/support/limit.h"
#include "test/support/refusal.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;

namespace {

// Address space that this process takes, in bytes.
rlim_t address_space() {
  std::ifstream pages("/proc/self/statm");
  rlim_t count = 0;
  pages >> count;
  return count * rlim_t(sysconf(_SC_PAGESIZE));
}

}  // namespace

TEST_CASE("a file is seen as its bytes", "[mapped_file]") {
  const ScratchFolder folder;
  CHECK(MappedFile(folder.write("file", "a\nb")).bytes() == "a\nb");
  CHECK(MappedFile(folder.write("empty", "")).bytes().empty());
}

TEST_CASE("what cannot be mapped is named", "[mapped_file]") {
  const ScratchFolder folder;
  const auto refused = [&](const std::string& name) {
    return refusal(folder.path(), [&] { const MappedFile file(folder.path(name)); });
  };
  CHECK(refused("nothing") == "nothing: cannot open: No such file or directory");
  std::filesystem::create_directory(folder.path("folder"));
  CHECK(refused("folder") == "folder: is a folder, expected a file");
  REQUIRE(mkfifo(folder.path("pipe").c_str(), 0600) == 0);
  CHECK(refused("pipe") == "pipe: is not a regular file");
  // Larger than the address space that is left.
  folder.write("large", "");
  std::filesystem::resize_file(folder.path("large"), std::uintmax_t{64} << 30);
  const Limit limit(RLIMIT_AS, address_space() + (rlim_t{256} << 20));
  CHECK(refused("large") == "large: cannot read: Cannot allocate memory");
}
