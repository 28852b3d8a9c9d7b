// Bytes per second of one thread of the tokenizer, on a text file line by line. tokenizer_reference.py does the same
// with the PyPI package tokenizers.
//   tokenizer_bench FOLDER TEXT [repetitions]     FOLDER: with a tokenizer.json; TEXT: such as a JSON lines file
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <string>
#include <vector>

#include "io/tokenizer.h"

namespace {

std::vector<std::string> read_lines(const char* path) {
  std::ifstream in(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void run(const char* folder, const char* text, int repetitions) {
  auto start = std::chrono::steady_clock::now();
  const auto tokenizer = distill::Tokenizer::load(folder);
  std::printf("loaded in %.2f s\n", seconds_since(start));
  const std::vector<std::string> lines = read_lines(text);
  for (int i = 0; i < repetitions; ++i) {
    std::size_t bytes = 0, tokens = 0;
    start = std::chrono::steady_clock::now();
    for (const std::string& line : lines) {
      bytes += line.size();
      tokens += tokenizer.encode(line).size();
    }
    std::printf("%zu lines, %zu tokens, %.2f MB/s\n", lines.size(), tokens,
                static_cast<double>(bytes) / seconds_since(start) / 1e6);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: tokenizer_bench FOLDER TEXT [repetitions]\n");
    return 2;
  }
  try {
    run(argv[1], argv[2], argc > 3 ? std::atoi(argv[3]) : 3);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "tokenizer_bench: %s\n", error.what());
    return 2;
  }
}
