// A tokenizer.json, and after a byte 0 a text for it. Without one, a text that has something of everything.
#include "io/tokenizer.h"

#include "test/fuzz/fuzz.h"

using namespace distill;
using namespace distill::test;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  static const FuzzFolder folder;
  const std::string_view all = text_of(bytes, size);
  const std::size_t end = std::min(all.find('\0'), all.size());
  const std::string file = folder.write("tokenizer.json", all.substr(0, end));
  const std::string_view input =
      end < size ? all.substr(end + 1)
                 : "a ab  abc's 12345 \n\r\n\t<s> e\u0301\u00e9 \U0001f600\u0e33\u200d \xff\xc3 aaaaaaaaaaaaaaaa";
  is_accepted([&] {
    const Tokenizer tokenizer = Tokenizer::load(file);
    const auto ids = tokenizer.encode(input);
    for (const std::int32_t id : ids)
      claim(id >= 0 && id < tokenizer.vocabulary_size() && tokenizer.token_of(id), "ids are of the vocabulary");
    const std::string back = tokenizer.decode(ids, false);
    tokenizer.decode(ids, true);
    const Tokenizer same = Tokenizer::load(file);
    claim(first_difference(tokenizer, same).empty(), "a tokenizer is equal to itself");
    claim(tokenizer.encode(input) == ids, "the same text gives the same ids");
  });
  return 0;
}
