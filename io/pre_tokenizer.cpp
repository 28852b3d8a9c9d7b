#include "io/pre_tokenizer.h"

#include <algorithm>
#include <utility>

#include "io/unicode_reference.h"
#include "io/unicode_reference_tables.h"
#include "io/utf8.h"

namespace distill {

namespace {

using Behavior = SplitStep::Behavior;
using Piece = PreTokenizerScratch::Piece;
using Match = PreTokenizerScratch::Match;

// All matches of the piece [begin, end) and what lies between them, in order. An empty match right behind another match
// is none.
void find_all(const Regex& regex, std::string_view text, PreTokenizerScratch& scratch) {
  std::vector<Match>& matches = scratch.matches;
  matches.clear();
  std::size_t done = 0;
  bool any = false;
  for (std::size_t from = 0; from <= text.size();) {
    const Regex::Match match = regex.find(scratch.regex, text, from);
    if (match.begin == std::string_view::npos) break;
    if (match.begin == match.end && any && match.end == done) {
      from += from < text.size() ? utf8_length(text[from]) : 1;
      continue;
    }
    if (done < match.begin) matches.push_back({done, match.begin, false});
    matches.push_back({match.begin, match.end, true});
    from = done = match.end;
    any = true;
  }
  if (done < text.size()) matches.push_back({done, text.size(), false});
}

// Joins matches with their neighbours as the behaviour says. `join` gets the previous piece to enlarge, in order of
// travel.
template <class Iterator, class Join>
void merge(Iterator begin, Iterator end, Behavior behavior, std::vector<Piece>& pieces, const Join& join) {
  const std::size_t first = pieces.size();
  bool previous = false;
  for (Iterator match = begin; match != end; ++match) {
    const bool joins = behavior == Behavior::contiguous ? match->matched == previous : match->matched && !previous;
    if (joins && pieces.size() > first)
      join(pieces.back(), *match);
    else
      pieces.push_back({match->begin, match->end});
    previous = match->matched;
  }
}

// The pieces that the matches leave, appended.
void make_pieces(const std::vector<Match>& matches, Behavior behavior, std::vector<Piece>& pieces) {
  const auto to_the_right = [](Piece& piece, const Match& match) { piece.end = match.end; };
  const auto to_the_left = [](Piece& piece, const Match& match) { piece.begin = match.begin; };
  const std::size_t first = pieces.size();
  switch (behavior) {
    case Behavior::isolated:
      for (const Match& match : matches) pieces.push_back({match.begin, match.end});
      break;
    case Behavior::removed:
      for (const Match& match : matches)
        if (!match.matched) pieces.push_back({match.begin, match.end});
      break;
    case Behavior::contiguous:
    case Behavior::merged_with_previous:
      merge(matches.begin(), matches.end(), behavior, pieces, to_the_right);
      break;
    case Behavior::merged_with_next:
      merge(matches.rbegin(), matches.rend(), behavior, pieces, to_the_left);
      std::reverse(pieces.begin() + static_cast<std::ptrdiff_t>(first), pieces.end());
      break;
  }
}

// Puts a space before each piece that does not start with one.
void add_prefix_spaces(std::string_view text, PreTokenizerScratch& scratch) {
  std::string& prefixed = scratch.prefixed;
  prefixed.clear();
  for (Piece& piece : scratch.pieces) {
    const std::size_t begin = prefixed.size();
    if (text[piece.begin] != ' ') prefixed.push_back(' ');
    prefixed.append(text, piece.begin, piece.end - piece.begin);
    piece = {begin, prefixed.size()};
  }
}

}  // namespace

PreTokenizer::PreTokenizer(const TokenizerFile& file) : add_prefix_space_(file.add_prefix_space) {
  for (const SplitStep& step : file.splits) splits_.push_back(make_step(step, file.path));
  for (const SplitStep& step : file.byte_level_split) byte_level_split_.push_back(make_step(step, file.path));
}

PreTokenizer::Step PreTokenizer::make_step(const SplitStep& step, const std::string& path) {
  Regex regex = step.kind == SplitStep::Pattern::literal   ? Regex::literal(step.pattern)
                : step.kind == SplitStep::Pattern::numeric ? Regex::unchecked(std::string("[") + numeric_class + "]")
                                                           : Regex(step.pattern, path + ": " + step.field);
  return {std::move(regex), step.behavior, step.invert, step.kind == SplitStep::Pattern::numeric};
}

void PreTokenizer::apply(const Step& step, std::string_view text, PreTokenizerScratch& scratch) {
  scratch.next.clear();
  for (const Piece& piece : scratch.pieces) {
    find_all(step.regex, text.substr(piece.begin, piece.end - piece.begin), scratch);
    if (step.invert)
      for (Match& match : scratch.matches) match.matched = !match.matched;
    const std::size_t first = scratch.next.size();
    make_pieces(scratch.matches, step.behavior, scratch.next);
    for (std::size_t i = first; i < scratch.next.size(); ++i) {
      scratch.next[i].begin += piece.begin;
      scratch.next[i].end += piece.begin;
    }
  }
  std::erase_if(scratch.next, [](const Piece& piece) { return piece.begin == piece.end; });
  scratch.pieces.swap(scratch.next);
}

std::string_view PreTokenizer::cut(std::string_view text, PreTokenizerScratch& scratch) const {
  scratch.pieces.clear();
  if (text.empty()) return text;
  scratch.pieces.push_back({0, text.size()});
  const auto apply_all = [&](const std::vector<Step>& steps) {
    const std::string_view categories = with_reference_categories(text, scratch.categories);
    for (const Step& step : steps) apply(step, step.numeric ? text : categories, scratch);
  };
  apply_all(splits_);
  if (add_prefix_space_) {
    add_prefix_spaces(text, scratch);
    text = scratch.prefixed;
  }
  if (!byte_level_split_.empty()) apply_all(byte_level_split_);
  return text;
}

}  // namespace distill
