#include "io/bpe.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <optional>

#include "io/byte_level.h"

namespace distill {

namespace {

// For std::push_heap and std::pop_heap: the largest element, which comes first, has the lowest rank, then position.
bool comes_later(const BpeScratch::Candidate& a, const BpeScratch::Candidate& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
}

}  // namespace

WordCache::Entry& WordCache::place(std::string_view word) {
  return entries_[std::hash<std::string_view>{}(word) & (places - 1)];
}

BytePairEncoder::BytePairEncoder(const TokenizerFile& file)
    : unknown_(file.unknown.value_or(-1)), fuse_unknown_(file.fuse_unknown) {
  id_of_byte_.fill(-1);
  for (std::size_t id = 0; id < file.tokens.size(); ++id) {
    if (!file.tokens[id]) continue;
    const std::optional<std::string> bytes = bytes_of_token(*file.tokens[id]);
    if (!bytes) continue;
    if (bytes->size() == 1) id_of_byte_[static_cast<unsigned char>((*bytes)[0])] = static_cast<std::int32_t>(id);
    if (file.ignore_merges) whole_words_.emplace(*bytes, static_cast<std::int32_t>(id));
  }
  const std::size_t slots = std::bit_ceil(2 * file.merges.size() + 2);
  shift_ = 64 - std::countr_zero(slots);
  table_.resize(slots);
  for (std::size_t rank = 0; rank < file.merges.size(); ++rank) {
    const MergeRule& rule = file.merges[rank];
    const std::uint64_t pair = pair_of(rule.left, rule.right);
    table_[slot_of(pair)] = {pair, static_cast<std::int32_t>(rank), rule.result};
  }
}

std::size_t BytePairEncoder::slot_of(std::uint64_t pair) const {
  std::size_t slot = (pair * 0x9e3779b97f4a7c15u) >> shift_;
  while (table_[slot].pair != pair && table_[slot].pair != no_pair) slot = (slot + 1) & (table_.size() - 1);
  return slot;
}

void BytePairEncoder::encode(std::string_view word, BpeScratch& scratch, std::vector<std::int32_t>& ids) const {
  using Entry = WordCache::Entry;
  Entry* entry = word.size() <= Entry::longest_word ? &scratch.cache.place(word) : nullptr;
  if (entry != nullptr && word == std::string_view(entry->word.data(), entry->length)) {
    ids.insert(ids.end(), entry->ids.data(), entry->ids.data() + entry->count);
    return;
  }
  const std::size_t first = ids.size();
  const auto whole = whole_words_.empty() ? whole_words_.end() : whole_words_.find(std::string(word));
  if (whole != whole_words_.end()) {
    ids.push_back(whole->second);
  } else {
    start_symbols(word, scratch);
    merge_all(scratch);
    for (const BpeScratch::Symbol& symbol : scratch.symbols)
      if (symbol.id >= 0) ids.push_back(symbol.id);
  }
  const std::size_t count = ids.size() - first;
  if (entry != nullptr && count <= Entry::most_ids) {
    entry->length = static_cast<std::uint8_t>(word.size());
    entry->count = static_cast<std::uint8_t>(count);
    std::memcpy(entry->word.data(), word.data(), word.size());
    std::copy_n(ids.begin() + static_cast<std::ptrdiff_t>(first), count, entry->ids.begin());
  }
}

void BytePairEncoder::start_symbols(std::string_view word, BpeScratch& scratch) const {
  scratch.symbols.clear();
  bool after_unknown = false;
  for (const char byte : word) {
    const std::int32_t known = id_of_byte_[static_cast<unsigned char>(byte)];
    const bool fused = known < 0 && after_unknown && fuse_unknown_;
    after_unknown = known < 0;
    const std::int32_t id = known >= 0 ? known : unknown_;
    if (id < 0 || fused) continue;
    const auto position = static_cast<std::int32_t>(scratch.symbols.size());
    scratch.symbols.push_back({id, position - 1, position + 1});
  }
  if (!scratch.symbols.empty()) scratch.symbols.back().next = -1;
}

// If the symbol at `position` can merge with its right neighbour.
void BytePairEncoder::add_candidate(std::int32_t position, BpeScratch& scratch) const {
  const BpeScratch::Symbol& left = scratch.symbols[static_cast<std::size_t>(position)];
  if (left.next < 0) return;
  const Merge& merge = table_[slot_of(pair_of(left.id, scratch.symbols[static_cast<std::size_t>(left.next)].id))];
  if (merge.pair == no_pair) return;
  scratch.heap.push_back({merge.rank, position, merge.result});
  std::push_heap(scratch.heap.begin(), scratch.heap.end(), comes_later);
}

void BytePairEncoder::merge_all(BpeScratch& scratch) const {
  std::vector<BpeScratch::Symbol>& symbols = scratch.symbols;
  std::vector<BpeScratch::Candidate>& heap = scratch.heap;
  heap.clear();
  for (std::size_t i = 0; i + 1 < symbols.size(); ++i) add_candidate(static_cast<std::int32_t>(i), scratch);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), comes_later);
    const BpeScratch::Candidate best = heap.back();
    heap.pop_back();
    BpeScratch::Symbol& left = symbols[static_cast<std::size_t>(best.position)];
    if (left.id < 0 || left.next < 0) continue;
    BpeScratch::Symbol& right = symbols[static_cast<std::size_t>(left.next)];
    // One of the two may have changed since the candidate was added.
    const Merge& merge = table_[slot_of(pair_of(left.id, right.id))];
    if (merge.pair == no_pair || merge.result != best.result) continue;
    left.id = best.result;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[static_cast<std::size_t>(left.next)].previous = best.position;
    if (left.previous >= 0) add_candidate(left.previous, scratch);
    add_candidate(best.position, scratch);
  }
}

}  // namespace distill
