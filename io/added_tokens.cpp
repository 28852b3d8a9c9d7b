#include "io/added_tokens.h"

#include <algorithm>

#include "io/unicode_reference.h"
#include "io/utf8.h"

namespace distill {

namespace {

// Where the character that ends at `end` begins.
std::size_t character_before(std::string_view text, std::size_t end) {
  std::size_t at = end - 1;
  while ((static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
  return at;
}

bool first_byte_less(const std::pair<char, std::int32_t>& edge, char byte) { return edge.first < byte; }

}  // namespace

// A word character as Unicode's recommendations for regular expressions define it.
AddedTokenFinder::AddedTokenFinder(const std::vector<AddedToken>& tokens)
    : tokens_(tokens),
      trie_(1),
      word_(Regex::unchecked(R"(\A[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d}])")),
      space_(Regex::unchecked(R"(\A(?!\x{180e})\s)")) {
  for (std::size_t index = 0; index < tokens_.size(); ++index) {
    const std::string& content = tokens_[index].content;
    std::int32_t node = 0;
    for (const char byte : content) {
      auto& next = trie_[static_cast<std::size_t>(node)].next;
      auto edge = std::lower_bound(next.begin(), next.end(), byte, first_byte_less);
      if (edge == next.end() || edge->first != byte) {
        edge = next.insert(edge, {byte, static_cast<std::int32_t>(trie_.size())});
        node = edge->second;
        trie_.emplace_back();
      } else {
        node = edge->second;
      }
    }
    Node& last = trie_[static_cast<std::size_t>(node)];
    if (last.token < 0) last.token = static_cast<std::int32_t>(index);
    if (!content.empty()) starts_[static_cast<unsigned char>(content[0])] = true;
  }
}

std::pair<std::int32_t, std::size_t> AddedTokenFinder::longest_at(std::string_view text, std::size_t at) const {
  std::pair<std::int32_t, std::size_t> longest = {-1, 0};
  const Node* node = &trie_[0];
  for (std::size_t end = at; end < text.size();) {
    const auto edge = std::lower_bound(node->next.begin(), node->next.end(), text[end], first_byte_less);
    if (edge == node->next.end() || edge->first != text[end]) break;
    node = &trie_[static_cast<std::size_t>(edge->second)];
    ++end;
    if (node->token >= 0) longest = {node->token, end - at};
  }
  return longest;
}

bool AddedTokenFinder::touches_word(std::string_view text, std::size_t begin, std::size_t end,
                                    RegexScratch& scratch) const {
  std::string buffer;
  const auto is_word = [&](std::size_t at) {
    const std::string_view character = with_reference_categories(text.substr(at, utf8_length(text[at])), buffer);
    return word_.find(scratch, character, 0).begin == 0;
  };
  return (begin > 0 && is_word(character_before(text, begin))) || (end < text.size() && is_word(end));
}

void AddedTokenFinder::cut(std::string_view text, RegexScratch& scratch, std::vector<Piece>& pieces) const {
  const auto is_space = [&](std::size_t at) { return space_.find(scratch, text.substr(at), 0).begin == 0; };
  std::size_t done = 0;  // everything before is in pieces
  for (std::size_t at = 0; at < text.size();) {
    if (!starts_[static_cast<unsigned char>(text[at])]) {
      ++at;
      continue;
    }
    const auto [index, length] = longest_at(text, at);
    if (index < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<std::size_t>(index)];
    std::size_t begin = at, end = at + length;
    at = end;
    if (token.single_word && touches_word(text, begin, end, scratch)) continue;
    if (token.lstrip)
      for (std::size_t before; begin > done && is_space(before = character_before(text, begin));) begin = before;
    if (token.rstrip)
      while (end < text.size() && is_space(end)) end += utf8_length(text[end]);
    if (done < begin) pieces.push_back({done, begin, -1});
    pieces.push_back({begin, end, token.id});
    done = end;
  }
  if (done < text.size()) pieces.push_back({done, text.size(), -1});
}

}  // namespace distill
