// Configuration files: YAML and `key=value` overrides to a Config and back, and the help text. See configs in
// io/README.md.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/config.h"

namespace distill {

struct ConfigFile {
  Config config;                                            // defaults filled in
  std::vector<std::string> warnings;                        // one line each; to be shown once, not once per rank
  std::string name;                                         // the file, for messages
  std::map<std::string, std::string, std::less<>> written;  // dotted key → "x.yaml:12"; keys that were not defaulted

  // Where a key was written: what a message about its value begins with. The file itself for a default.
  std::string where(std::string_view key) const;
  // Runs work, which reads what the value of a key points to: its input errors get the key in front.
  void reading(std::string_view key, const std::function<void()>& work) const;
};

// Everything that can be said without opening what the configuration points to has been checked: an unknown key, a
// wrong type, a value out of range, a broken rule or something this binary lacks is an input error that says where it
// was written.
ConfigFile read_config(const std::filesystem::path& file, std::span<const std::string> overrides,
                       const Capabilities& capabilities);

// The two halves. parse_config takes text, each value is checked for itself; `name` stands for the file in messages,
// its stem is the default of exp_name. check_config checks the rules between keys and what the binary can do.
ConfigFile parse_config(const std::string& content, const std::filesystem::path& name,
                        std::span<const std::string> overrides);
void check_config(const ConfigFile& file, const Capabilities& capabilities);

// All keys, defaults included, as a file that reads back to an equal Config.
std::string to_yaml(const Config& config);

// One line a key: dotted key, default, allowed values, meaning.
std::string config_help();

}  // namespace distill
