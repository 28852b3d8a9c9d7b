#include "io/tensorboard_sink.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <span>
#include <string_view>
#include <utility>

#include "core/error.h"
#include "io/crc32c.h"

namespace distill {

namespace {

constexpr std::string_view file_prefix = "events.out.tfevents.";
constexpr std::string_view file_version = "brain.Event:2";

// Fields of TensorFlow's event.proto and summary.proto.
namespace event {
constexpr int wall_time = 1, step = 2, version = 3, summary = 5, session_log = 7;
}
namespace summary {
constexpr int value = 1;
}
namespace summary_value {
constexpr int tag = 1, simple_value = 2;
}
namespace session_log {
constexpr int status = 1;
constexpr std::uint64_t start = 1;
}  // namespace session_log

// A protobuf message as it grows, field by field.
class Message {
 public:
  Message& number(int field, std::uint64_t value) {
    varint(std::uint64_t(field) << 3);
    varint(value);
    return *this;
  }
  Message& f64(int field, double value) {
    varint(std::uint64_t(field) << 3 | 1);
    return fixed(std::bit_cast<std::uint64_t>(value), 8);
  }
  Message& bytes(int field, std::string_view value) {
    varint(std::uint64_t(field) << 3 | 2);
    varint(value.size());
    bytes_ += value;
    return *this;
  }
  Message& f32(int field, float value) {
    varint(std::uint64_t(field) << 3 | 5);
    return fixed(std::bit_cast<std::uint32_t>(value), 4);
  }
  // Little-endian, as all of this is.
  Message& fixed(std::uint64_t value, int size) {
    for (int i = 0; i < size; ++i) bytes_ += char(value >> (8 * i));
    return *this;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  void varint(std::uint64_t value) {
    for (; value >= 0x80; value >>= 7) bytes_ += char(value | 0x80);
    bytes_ += char(value);
  }

  std::string bytes_;
};

std::uint32_t masked_crc(std::string_view bytes) {
  const std::uint32_t crc = crc32c(std::as_bytes(std::span(bytes)));
  return ((crc >> 15) | (crc << 17)) + 0xa282ead8;
}

// A record of a TFRecord file: length, its checksum, data, their checksum.
std::string framed(std::string_view data) {
  std::string out = Message().fixed(data.size(), 8).bytes();
  out += Message().fixed(masked_crc(out), 4).bytes();
  out += data;
  return out + Message().fixed(masked_crc(data), 4).bytes();
}

// The seconds in the name of an event file; 0 for other files.
std::int64_t seconds_in(std::string_view name) {
  std::int64_t seconds = 0;
  if (name.starts_with(file_prefix))
    std::from_chars(name.data() + file_prefix.size(), name.data() + name.size(), seconds);
  return seconds;
}

// TensorBoard reads files in the order of their names, so a start that the clock puts before an older one is dated
// after.
std::string new_file(const std::string& folder, double now) {
  auto seconds = std::int64_t(now);
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored))
    seconds = std::max(seconds, seconds_in(entry.path().filename().string()) + 1);
  std::array<char, 256> host{};
  gethostname(host.data(), host.size() - 1);
  std::array<char, 24> digits{};
  std::snprintf(digits.data(), digits.size(), "%010lld", static_cast<long long>(seconds));
  return std::filesystem::path(folder) / text(file_prefix, digits.data(), '.', host.data(), '.', getpid());
}

}  // namespace

TensorboardSink::TensorboardSink(const std::string& folder, std::int64_t resumed_step, double now, Warn warn)
    : file_(new_file(folder, now), std::move(warn)) {
  file_.append(framed(Message().f64(event::wall_time, now).bytes(event::version, file_version).bytes()));
  const Message start = Message().number(session_log::status, session_log::start);
  file_.append(framed(Message()
                          .f64(event::wall_time, now)
                          .number(event::step, std::uint64_t(resumed_step) + 1)  // the first that is dropped
                          .bytes(event::session_log, start.bytes())
                          .bytes()));
}

void TensorboardSink::write(const MetricRecord& record) {
  Message values;
  for (const auto& [name, value] : record.values)
    values.bytes(summary::value,
                 Message().bytes(summary_value::tag, name).f32(summary_value::simple_value, float(value)).bytes());
  file_.append(framed(Message()
                          .f64(event::wall_time, record.wall_time)
                          .number(event::step, std::uint64_t(record.step))
                          .bytes(event::summary, values.bytes())
                          .bytes()));
}

}  // namespace distill
