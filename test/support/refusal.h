// The message of an input error, with the scratch folder's name taken out of it.
#pragma once

#include <catch2/catch.hpp>
#include <string>

#include "core/error.h"

namespace distill::test {

inline std::string without(std::string message, const std::string& part) {
  if (part.empty()) return message;
  for (std::size_t at = message.find(part); at != std::string::npos; at = message.find(part, at))
    message.erase(at, part.size());
  return message;
}

// Runs work, which must throw an Error with this exit code.
template <class Work>
std::string refusal(const std::string& folder, const Work& work, ExitCode code = ExitCode::bad_input) {
  try {
    work();
  } catch (const Error& error) {
    CHECK(error.code() == code);
    return without(error.what(), folder);
  }
  return "no error";
}

}  // namespace distill::test
