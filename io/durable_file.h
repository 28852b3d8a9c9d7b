// Files and folders that are complete or absent: written under a temporary name, flushed to the disk, renamed. What is
// not committed is removed.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

namespace distill {

class DurableFile {
 public:
  // Creates `path`.partial; throws (exit code internal) with path and reason, as all that follows.
  explicit DurableFile(const std::string& path);
  ~DurableFile();
  DurableFile(const DurableFile&) = delete;
  DurableFile& operator=(const DurableFile&) = delete;

  const std::string& path() const { return path_; }
  void write(std::span<const std::byte> bytes);
  void write(std::string_view bytes) { write(std::as_bytes(std::span(bytes))); }
  // Flushes and renames; an older file of that name is replaced.
  void commit();

 private:
  std::string path_, partial_;
  int descriptor_ = -1;
};

class DurableFolder {
 public:
  // The folder to write into is a hidden neighbour of `path`: .name.partial, made anew.
  explicit DurableFolder(const std::string& path);
  ~DurableFolder();
  DurableFolder(const DurableFolder&) = delete;
  DurableFolder& operator=(const DurableFolder&) = delete;

  const std::string& partial() const { return partial_; }
  // Whether there is an older folder of that name.
  bool replaces() const;
  // Renames the folder, whose files must have been flushed. An older folder of that name is replaced: at once where the
  // file system can exchange two names; elsewhere it bears the name .name.replaced for a moment, and keeps it where the
  // process is killed in that moment.
  void commit();

 private:
  std::string path_, partial_;
};

// Writes a whole small file durably.
void write_durably(const std::string& path, std::string_view content);
// Makes `path` a symbolic link to `target`; an older link or file of that name is replaced at once.
void replace_link(const std::string& path, const std::string& target);
// Flushes a file, or the names in a folder.
void sync_path(const std::string& path);
// Removes a folder so that no half of it can ever be seen under its name.
void remove_folder(const std::string& path);
// Removes what a killed process left of its temporary folders in `parent`, and gives a folder that was about to be
// replaced its name back.
void remove_leftovers(const std::string& parent);
// ".name.replaced" → "name"; empty for other names.
std::string name_before_replacement(std::string_view name);

}  // namespace distill
