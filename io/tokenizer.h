// Text to token ids and back, by the tokenizer.json of a Hugging Face folder: byte-level BPE as Qwen, Llama 3, SmolLM
// and GPT-2 use it. Ids are those of the reference library (README.md says how exactly).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace distill {

class Tokenizer {
 public:
  // A folder with a tokenizer.json, or such a file. One that is damaged or needs something that is not supported is an
  // input error that names file and field.
  static Tokenizer load(const std::string& folder_or_file);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Nothing is put before or after; added and special tokens in the text are recognised. Bytes that are not UTF-8 count
  // as U+FFFD. May be called from several threads at once.
  std::vector<std::int32_t> encode(std::string_view text) const;

  // Bytes that are not UTF-8 become U+FFFD; ids without a token (padding of the model's vocabulary) give nothing.
  std::string decode(std::span<const std::int32_t> ids, bool skip_special) const;

  // The real vocabulary: 1 + the largest id of a token, added and special tokens included.
  std::int32_t vocabulary_size() const;
  // By the token's text as written in the file.
  std::optional<std::int32_t> id_of(std::string_view token) const;
  std::optional<std::string> token_of(std::int32_t id) const;

  // What keeps two tokenizers from giving the same ids, in words; empty if nothing does.
  friend std::string first_difference(const Tokenizer& a, const Tokenizer& b);

 private:
  struct Parts;
  explicit Tokenizer(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

}  // namespace distill
