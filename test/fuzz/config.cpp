// A configuration, and after a byte 0 an override. What is read is written and read again as the same.
#include <array>

#include "io/config_file.h"
#include "test/fuzz/fuzz.h"

using namespace distill;
using namespace distill::test;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  const std::string_view all = text_of(bytes, size);
  const std::size_t end = std::min(all.find('\0'), all.size());
  const std::string yaml(all.substr(0, end));
  std::vector<std::string> overrides;
  if (end < size) overrides.emplace_back(all.substr(end + 1));
  ConfigFile file;
  if (!is_accepted([&] { file = parse_config(yaml, "x.yaml", overrides); })) return 0;
  is_accepted([&] { check_config(file, {}); });
  const ConfigFile again = parse_config(to_yaml(file.config), "x.yaml", {});
  claim(again.config == file.config, "a configuration reads back as it was written");
  return 0;
}
