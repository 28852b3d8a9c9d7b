#include "io/durable_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <vector>

#include "core/error.h"

namespace distill {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view partial_suffix = ".partial", removed_suffix = ".removed", replaced_suffix = ".replaced";

[[noreturn]] void fail_errno(const char* what, const std::string& path) {
  const int error = errno;
  fail(path, ": cannot ", what, ": ", std::strerror(error));
}

// folder/name → folder/.name.suffix
std::string hidden_neighbour(const std::string& path, std::string_view suffix) {
  const fs::path full(path);
  return full.parent_path() / text('.', full.filename().string(), suffix);
}

std::string parent_of(const std::string& path) {
  const fs::path parent = fs::path(path).parent_path();
  return parent.empty() ? "." : parent.string();
}

void rename_or_fail(const std::string& from, const std::string& to) {
  if (rename(from.c_str(), to.c_str()) != 0) fail_errno("rename to it", to);
}

// False where the file system cannot.
bool exchange_names(const std::string& a, const std::string& b) {
  if (renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) == 0) return true;
  if (errno != EINVAL && errno != ENOSYS && errno != EOPNOTSUPP) fail_errno("take its name", b);
  return false;
}

std::string without_trailing_slash(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

bool exists(const std::string& path) {
  std::error_code ignored;
  return fs::exists(fs::symlink_status(path, ignored));
}

// Deletes what lies under a hidden name, so that no half of it keeps that name. What cannot be deleted now is left for
// the next time.
void discard(const std::string& hidden, const std::string& path) {
  const std::string removed = hidden_neighbour(path, removed_suffix);
  std::error_code ignored;
  fs::remove_all(removed, ignored);
  fs::rename(hidden, removed, ignored);
  fs::remove_all(removed, ignored);
}

// After a kill in the middle of a replacement: the older folder, unless the new one has the name.
void settle_replacement(const std::string& path) {
  const std::string older = hidden_neighbour(path, replaced_suffix);
  if (!exists(older)) return;
  if (exists(path)) return discard(older, path);
  rename_or_fail(older, path);
  sync_path(parent_of(path));
}

}  // namespace

DurableFile::DurableFile(const std::string& path) : path_(path), partial_(text(path, partial_suffix)) {
  descriptor_ = open(partial_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (descriptor_ < 0) fail_errno("create", partial_);
}

DurableFile::~DurableFile() {
  if (descriptor_ < 0) return;
  close(descriptor_);
  unlink(partial_.c_str());
}

void DurableFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(descriptor_, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_errno("write", partial_);
    bytes = bytes.subspan(std::size_t(n));
  }
}

void DurableFile::commit() {
  if (fsync(descriptor_) != 0) fail_errno("write", partial_);
  rename_or_fail(partial_, path_);
  close(descriptor_);
  descriptor_ = -1;
  sync_path(parent_of(path_));
}

DurableFolder::DurableFolder(const std::string& path)
    : path_(without_trailing_slash(path)), partial_(hidden_neighbour(path_, partial_suffix)) {
  settle_replacement(path_);
  std::error_code error;
  fs::remove_all(partial_, error);
  fs::create_directories(partial_, error);
  if (error) fail(partial_, ": cannot create: ", error.message());
}

DurableFolder::~DurableFolder() {
  std::error_code ignored;
  if (!partial_.empty()) fs::remove_all(partial_, ignored);
}

bool DurableFolder::replaces() const { return exists(path_); }

void DurableFolder::commit() {
  sync_path(partial_);
  std::string older;
  if (!replaces()) {
    rename_or_fail(partial_, path_);
  } else if (exchange_names(partial_, path_)) {
    older = partial_;
  } else {
    older = hidden_neighbour(path_, replaced_suffix);
    rename_or_fail(path_, older);
    if (rename(partial_.c_str(), path_.c_str()) != 0) {
      const int reason = errno;
      rename_or_fail(older, path_);
      errno = reason;
      fail_errno("rename to it", path_);
    }
  }
  partial_.clear();
  sync_path(parent_of(path_));
  if (!older.empty()) discard(older, path_);
}

void write_durably(const std::string& path, std::string_view content) {
  DurableFile file(path);
  file.write(content);
  file.commit();
}

void replace_link(const std::string& path, const std::string& target) {
  std::error_code none;
  if (fs::read_symlink(path, none) == target) return;
  const std::string fresh = hidden_neighbour(path, partial_suffix);
  fs::remove(fresh, none);
  if (symlink(target.c_str(), fresh.c_str()) != 0) fail_errno("create", fresh);
  rename_or_fail(fresh, path);
  sync_path(parent_of(path));
}

void sync_path(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail_errno("open", path);
  const int result = fsync(descriptor);
  close(descriptor);
  // Some file systems cannot flush a folder and say so; their renames are as durable as they get.
  if (result != 0 && errno != EINVAL) fail_errno("flush", path);
}

void remove_folder(const std::string& path) {
  const std::string old = hidden_neighbour(without_trailing_slash(path), removed_suffix);
  std::error_code ignored;
  fs::remove_all(old, ignored);
  rename_or_fail(path, old);
  fs::remove_all(old, ignored);
}

void remove_leftovers(const std::string& parent) {
  std::vector<fs::path> all;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(parent, error)) all.push_back(entry.path());
  for (const fs::path& path : all) {
    const std::string name = path.filename();
    std::error_code ignored;
    if (name.starts_with('.') && (name.ends_with(partial_suffix) || name.ends_with(removed_suffix)))
      fs::remove_all(path, ignored);
    if (const std::string before = name_before_replacement(name); !before.empty())
      settle_replacement(path.parent_path() / before);
  }
}

std::string name_before_replacement(std::string_view name) {
  if (!name.starts_with('.') || !name.ends_with(replaced_suffix) || name.size() <= 1 + replaced_suffix.size())
    return "";
  return std::string(name.substr(1, name.size() - 1 - replaced_suffix.size()));
}

}  // namespace distill
