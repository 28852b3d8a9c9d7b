// Versions of the libraries that files are read and written with, for --version.
#pragma once

#include <string>

namespace distill {

// "yaml-cpp 0.7.0, nlohmann-json 3.11.2, …"
std::string io_library_versions();

}  // namespace distill
