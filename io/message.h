// One turn of a conversation, as chat templates render it.
#pragma once

#include <string_view>

namespace distill {

struct Message {
  std::string_view role;  // "system", "user" or "assistant"
  std::string_view content;
};

}  // namespace distill
