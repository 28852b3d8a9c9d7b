#include "io/tokenizer.h"

#include <algorithm>
#include <filesystem>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "core/error.h"
#include "io/added_tokens.h"
#include "io/bpe.h"
#include "io/byte_level.h"
#include "io/pre_tokenizer.h"
#include "io/tokenizer_file.h"
#include "io/unicode_reference.h"
#include "io/utf8.h"

namespace distill {

namespace {

// Everything that one call of encode writes to.
struct Scratch {
  PreTokenizerScratch words;
  BpeScratch bpe;
  std::vector<AddedTokenFinder::Piece> raw, normal;
  std::string normalized;
};

// Lends each calling thread a scratch; there are as many as there ever were calls at once.
class ScratchPool {
 public:
  class Loan {
   public:
    explicit Loan(ScratchPool& pool) : pool_(pool), scratch_(pool.take()) {}
    ~Loan() { pool_.give_back(std::move(scratch_)); }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    Scratch& operator*() { return *scratch_; }

   private:
    ScratchPool& pool_;
    std::unique_ptr<Scratch> scratch_;
  };

 private:
  std::unique_ptr<Scratch> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<Scratch>();
    std::unique_ptr<Scratch> last = std::move(free_.back());
    free_.pop_back();
    return last;
  }
  void give_back(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(scratch));
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> free_;
};

std::vector<AddedToken> tokens_to_find(const TokenizerFile& file, bool normalized) {
  std::vector<AddedToken> chosen;
  // The reference looks for special tokens first; it matters when two have the same normal form.
  for (const bool special : {true, false})
    for (const AddedToken& token : file.added_tokens)
      if (token.normalized == normalized && token.special == special) chosen.push_back(token);
  std::string buffer;
  if (normalized && file.nfc)
    for (AddedToken& token : chosen) token.content = std::string(to_nfc(token.content, buffer));
  return chosen;
}

}  // namespace

struct Tokenizer::Parts {
  explicit Parts(TokenizerFile read)
      : file(std::move(read)),
        raw_tokens(tokens_to_find(file, false)),
        normalized_tokens(tokens_to_find(file, true)),
        pre_tokenizer(file),
        encoder(file),
        tokens(std::move(file.tokens)) {
    for (const AddedToken& token : file.added_tokens) {
      const auto id = static_cast<std::size_t>(token.id);
      if (id >= tokens.size()) tokens.resize(id + 1);
      tokens[id] = token.content;
      if (id >= special.size()) special.resize(id + 1);
      special[id] = token.special;
    }
    for (std::size_t id = 0; id < tokens.size(); ++id)
      if (tokens[id]) id_of.emplace(*tokens[id], static_cast<std::int32_t>(id));
  }

  void encode_ordinary(std::string_view text, Scratch& scratch, std::vector<std::int32_t>& ids) const {
    const std::string_view cut = pre_tokenizer.cut(text, scratch.words);
    for (const auto& [begin, end] : scratch.words.pieces)
      encoder.encode(cut.substr(begin, end - begin), scratch.bpe, ids);
  }

  TokenizerFile file;  // without its tokens, which are below
  AddedTokenFinder raw_tokens, normalized_tokens;
  PreTokenizer pre_tokenizer;
  BytePairEncoder encoder;
  std::vector<std::optional<std::string>> tokens;  // by id, as written, added ones included
  std::vector<bool> special;                       // by id; false beyond its end
  std::unordered_map<std::string_view, std::int32_t> id_of;
  mutable ScratchPool pool;
};

Tokenizer::Tokenizer(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::load(const std::string& folder_or_file) {
  const std::filesystem::path path(folder_or_file);
  const std::filesystem::path file = std::filesystem::is_directory(path) ? path / "tokenizer.json" : path;
  return Tokenizer(std::make_unique<Parts>(read_tokenizer_file(file.string())));
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
  const Parts& parts = *parts_;
  std::string mended;
  if (valid_utf8_prefix(text) != text.size()) text = mended = replace_invalid_utf8(text);
  ScratchPool::Loan loan(parts.pool);
  Scratch& scratch = *loan;
  RegexScratch& regex = scratch.words.regex;
  std::vector<std::int32_t> ids;
  ids.reserve(text.size() / 3 + 4);

  scratch.raw.clear();
  parts.raw_tokens.cut(text, regex, scratch.raw);
  for (const auto& [begin, end, id] : scratch.raw) {
    if (id >= 0) {
      ids.push_back(id);
      continue;
    }
    std::string_view ordinary = text.substr(begin, end - begin);
    if (parts.file.nfc) ordinary = to_nfc(ordinary, scratch.normalized);
    scratch.normal.clear();
    parts.normalized_tokens.cut(ordinary, regex, scratch.normal);
    for (const auto& piece : scratch.normal) {
      if (piece.id >= 0)
        ids.push_back(piece.id);
      else
        parts.encode_ordinary(ordinary.substr(piece.begin, piece.end - piece.begin), scratch, ids);
    }
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special) const {
  std::string bytes;
  for (const std::int32_t id : ids) {
    const auto index = static_cast<std::size_t>(id);
    if (id < 0 || index >= parts_->tokens.size() || !parts_->tokens[index]) continue;
    if (skip_special && index < parts_->special.size() && parts_->special[index]) continue;
    const std::string& token = *parts_->tokens[index];
    bytes += bytes_of_token(token).value_or(token);
  }
  return replace_invalid_utf8(bytes);
}

std::int32_t Tokenizer::vocabulary_size() const { return static_cast<std::int32_t>(parts_->tokens.size()); }

std::optional<std::int32_t> Tokenizer::id_of(std::string_view token) const {
  const auto found = parts_->id_of.find(token);
  return found == parts_->id_of.end() ? std::nullopt : std::optional(found->second);
}

std::optional<std::string> Tokenizer::token_of(std::int32_t id) const {
  const auto index = static_cast<std::size_t>(id);
  return id >= 0 && index < parts_->tokens.size() ? parts_->tokens[index] : std::nullopt;
}

std::string first_difference(const Tokenizer& a, const Tokenizer& b) {
  const Tokenizer::Parts &left = *a.parts_, &right = *b.parts_;
  const auto token = [](const Tokenizer::Parts& parts, std::size_t id) {
    return id < parts.tokens.size() && parts.tokens[id] ? "\"" + *parts.tokens[id] + "\"" : std::string("no token");
  };
  for (std::size_t id = 0; id < std::max(left.tokens.size(), right.tokens.size()); ++id)
    if (token(left, id) != token(right, id))
      return text("id ", id, " is ", token(left, id), " in ", left.file.path, " and ", token(right, id), " in ",
                  right.file.path);
  const auto merge = [](const Tokenizer::Parts& parts, std::size_t rank) {
    if (rank >= parts.file.merges.size()) return std::string("absent");
    const MergeRule& rule = parts.file.merges[rank];
    return "\"" + *parts.tokens[static_cast<std::size_t>(rule.left)] + " " +
           *parts.tokens[static_cast<std::size_t>(rule.right)] + "\"";
  };
  for (std::size_t rank = 0; rank < std::max(left.file.merges.size(), right.file.merges.size()); ++rank)
    if (merge(left, rank) != merge(right, rank))
      return text("merge ", rank, " is ", merge(left, rank), " in ", left.file.path, " and ", merge(right, rank),
                  " in ", right.file.path);
  const std::pair<const char*, bool> rest[] = {
      {"normalizer", left.file.nfc == right.file.nfc},
      {"pre_tokenizer", left.file.splits == right.file.splits &&
                            left.file.add_prefix_space == right.file.add_prefix_space &&
                            left.file.byte_level_split == right.file.byte_level_split},
      {"added_tokens", left.file.added_tokens == right.file.added_tokens},
      {"model.ignore_merges", left.file.ignore_merges == right.file.ignore_merges},
      {"model.unk_token or model.fuse_unk",
       left.file.unknown == right.file.unknown && left.file.fuse_unknown == right.file.fuse_unknown}};
  for (const auto& [field, same] : rest)
    if (!same) return text(field, " differs between ", left.file.path, " and ", right.file.path);
  return "";
}

}  // namespace distill
