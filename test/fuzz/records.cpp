// A file of records. Its first byte, where it is a digit, says which fields there are.
#include "io/records.h"
#include "test/fuzz/fuzz.h"

using namespace distill;
using namespace distill::test;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  static const FuzzFolder folder;
  std::string_view content = text_of(bytes, size);
  RecordFields fields{.question = "q", .answer = "a", .prompt = "", .system = ""};
  if (content.starts_with('1')) fields.prompt = "p";
  if (content.starts_with('2')) fields.system = "s";
  if (content.starts_with('1') || content.starts_with('2')) content.remove_prefix(1);
  const std::string file = folder.write("records.json", content);
  Records tolerant;
  const bool is_usable = is_accepted([&] { tolerant = read_records({file}, fields, true); });
  Records strict;
  const bool is_good = is_accepted([&] { strict = read_records({file}, fields, false); });
  claim(is_usable || !is_good, "what is good is usable");
  claim(is_good == (is_usable && tolerant.bad == 0), "bad records are refused unless they are to be skipped");
  if (is_usable) claim(!tolerant.records.empty(), "what is accepted has records");
  if (is_good) claim(strict.records.size() == tolerant.records.size(), "both ways give the same records");
  return 0;
}
