// Versions of the libraries that files are read and written with, for --version.
#pragma once

#include <string>

namespace distill {

// "yaml-cpp 0.7, PCRE2 10.42, …"
std::string io_library_versions();

}  // namespace distill
