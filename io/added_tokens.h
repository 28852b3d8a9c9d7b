// Finds the added tokens of a tokenizer in text: leftmost first, the longest of those that start there.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "io/regex.h"
#include "io/tokenizer_file.h"

namespace distill {

class AddedTokenFinder {
 public:
  struct Piece {
    std::size_t begin, end;
    std::int32_t id;  // −1: ordinary text
  };

  // Contents are what is looked for: normalised where the token asks for it.
  explicit AddedTokenFinder(const std::vector<AddedToken>& tokens);

  // Cuts the text into tokens and what lies between them, appended to `pieces`. White space that a token strips belongs
  // to its piece.
  void cut(std::string_view text, RegexScratch& scratch, std::vector<Piece>& pieces) const;

 private:
  struct Node {
    std::int32_t token = -1;                          // index of the token that ends here
    std::vector<std::pair<char, std::int32_t>> next;  // by byte, sorted
  };

  // Index and length of the longest token at `at`; index −1 if none.
  std::pair<std::int32_t, std::size_t> longest_at(std::string_view text, std::size_t at) const;
  bool touches_word(std::string_view text, std::size_t begin, std::size_t end, RegexScratch& scratch) const;

  std::vector<AddedToken> tokens_;
  std::vector<Node> trie_;
  bool starts_[256] = {};  // first bytes of tokens
  Regex word_, space_;     // at the start of a text
};

}  // namespace distill
