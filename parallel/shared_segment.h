// POSIX shared memory of one node: reserved when made, so that a full /dev/shm is an error at the start and not a crash
// later, and nameless as soon as everybody has it, so that nothing stays behind whatever happens.
#pragma once

#include <cstddef>
#include <string>

namespace distill {

class SharedSegment {
 public:
  SharedSegment() = default;
  // New, zeroed. purpose starts the error message: "the logits channel (4 slots of …)".
  static SharedSegment create(std::size_t bytes, const std::string& purpose);
  // One that another process has made.
  static SharedSegment open(const std::string& name, std::size_t bytes);
  // Removes what processes of this user that were killed have left of segments with a name: those that no maker holds.
  static void remove_leftovers();
  SharedSegment(SharedSegment&& other) noexcept;
  SharedSegment& operator=(SharedSegment&& other) noexcept;
  ~SharedSegment();

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  const std::string& name() const { return name_; }  // for open()
  // Takes the name away; the memory lives until the last process lets it go. The maker's destructor does so too.
  void unlink();

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  std::string name_;
  bool is_linked_ = false;
};

}  // namespace distill
