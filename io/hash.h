// A 128-bit hash of bytes (XXH3), to tell contents apart; not against people who want two of them to be equal.
#pragma once

#include <string>
#include <string_view>

struct XXH3_state_s;

namespace distill {

class Hasher {
 public:
  Hasher();
  ~Hasher();
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;

  // Where one piece ends and the next begins counts too.
  void add(std::string_view piece);
  std::string hex() const;  // 32 digits

 private:
  XXH3_state_s* state_;
};

}  // namespace distill
