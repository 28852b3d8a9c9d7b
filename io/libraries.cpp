#include "io/libraries.h"

#include <utf8proc.h>

#include <nlohmann/json.hpp>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "core/error.h"
#include "io/hdf5.h"

namespace distill {

std::string io_library_versions() {
  return text("yaml-cpp ", YAML_CPP_VERSION, ", nlohmann-json ", NLOHMANN_JSON_VERSION_MAJOR, ".",
              NLOHMANN_JSON_VERSION_MINOR, ".", NLOHMANN_JSON_VERSION_PATCH, ", HDF5 ", hdf5_version(), ", PCRE2 ",
              PCRE2_MAJOR, ".", PCRE2_MINOR, ", utf8proc ", utf8proc_version());
}

}  // namespace distill
