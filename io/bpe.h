// Byte-pair encoding: words of bytes to token ids by merge rules, lowest rank first, leftmost first.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "io/tokenizer_file.h"

namespace distill {

// The ids of short words seen before: a table with one place for each hash, so it stays as large as it is.
class WordCache {
 public:
  struct Entry {
    static constexpr std::size_t longest_word = 22, most_ids = 10;
    std::uint8_t length = 0, count = 0;  // of the word in bytes, of ids
    std::array<char, longest_word> word;
    std::array<std::int32_t, most_ids> ids;
  };

  // The place of the word, which may hold another one. The word is not longer than longest_word.
  Entry& place(std::string_view word);

 private:
  static constexpr std::size_t places = std::size_t{1} << 14;
  std::vector<Entry> entries_ = std::vector<Entry>(places);
};

struct BpeScratch {
  struct Symbol {
    std::int32_t id, previous, next;  // positions; −1 at the ends; id −1: merged into its left neighbour
  };
  struct Candidate {
    std::int32_t rank, position, result;
  };
  std::vector<Symbol> symbols;
  std::vector<Candidate> heap;
  WordCache cache;
};

class BytePairEncoder {
 public:
  explicit BytePairEncoder(const TokenizerFile& file);

  // Appends the ids of a word.
  void encode(std::string_view word, BpeScratch& scratch, std::vector<std::int32_t>& ids) const;

 private:
  struct Merge {
    std::uint64_t pair = no_pair;
    std::int32_t rank, result;
  };
  static constexpr std::uint64_t no_pair = ~std::uint64_t{0};

  static std::uint64_t pair_of(std::int32_t left, std::int32_t right) {
    return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint32_t>(right);
  }
  // Where the pair is, or the free slot where it would be.
  std::size_t slot_of(std::uint64_t pair) const;
  void start_symbols(std::string_view word, BpeScratch& scratch) const;
  void add_candidate(std::int32_t position, BpeScratch& scratch) const;
  void merge_all(BpeScratch& scratch) const;

  std::vector<Merge> table_;  // open addressing; its size is a power of two
  int shift_ = 0;             // from hash to slot
  std::array<std::int32_t, 256> id_of_byte_;
  std::int32_t unknown_ = -1;
  bool fuse_unknown_ = false;
  std::unordered_map<std::string, std::int32_t> whole_words_;  // only with ignore_merges
};

}  // namespace distill
