// Random damage to the bytes of a file, the same in every run.
#pragma once

#include <random>
#include <string>

namespace distill::test {

// One to three of: a byte changed, a bit flipped, bytes cut out, bytes doubled, the end cut off.
inline std::string damaged(std::string bytes, std::mt19937& random) {
  const auto below = [&](std::size_t n) { return std::size_t(random() % n); };
  for (std::size_t left = 1 + below(3); left > 0 && !bytes.empty(); --left) {
    const std::size_t at = below(bytes.size()), length = 1 + below(std::min<std::size_t>(bytes.size() - at, 16));
    switch (below(5)) {
      case 0:
        bytes[at] = char(below(256));
        break;
      case 1:
        bytes[at] = char(bytes[at] ^ (1 << below(8)));
        break;
      case 2:
        bytes.erase(at, length);
        break;
      case 3:
        bytes.insert(at, bytes.substr(at, length));
        break;
      default:
        bytes.resize(at);
    }
  }
  return bytes;
}

}  // namespace distill::test
