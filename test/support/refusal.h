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

// The Error that work throws; one that fits no expectation when it throws none. Without Catch's macros, which a rank
// that is a thread cannot use.
template <class Work>
Error error_of(const Work& work) {
  try {
    work();
  } catch (const Error& error) {
    return error;
  }
  return Error(ExitCode::ok, "no error");
}

// The message of the Error that work throws, which must have this exit code; "no error" when it throws none.
template <class Work>
std::string refusal(const std::string& folder, const Work& work, ExitCode code = ExitCode::bad_input) {
  const Error error = error_of(work);
  if (error.code() != ExitCode::ok) CHECK(error.code() == code);
  return without(error.what(), folder);
}

}  // namespace distill::test
