#include "io/records.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <nlohmann/json.hpp>
#include <string_view>

#include "core/error.h"
#include "io/mapped_file.h"

namespace distill {

namespace {

using nlohmann::json;
using std::string_view;

constexpr std::int64_t most_complaints = 5;
constexpr string_view blanks = " \t\r\n";

// --- one record
// -----------------------------------------------------------------------------------------------------------

// Takes the named fields of a record out of the parser's events; the rest of the JSON is checked and passed over.
class RecordReader : public nlohmann::json_sax<json> {
 public:
  explicit RecordReader(const RecordFields& names)
      : fields_{{{&names.system, false}, {&names.prompt, false}, {&names.question, true}, {&names.answer, true}}} {}

  // Why the text is not JSON, and after how many bytes; empty when it is.
  const std::string& syntax_error() const { return syntax_error_; }
  std::size_t error_position() const { return error_position_; }

  // What is wrong with a record that is JSON; empty when nothing is.
  std::string complaint(string_view source) const {
    if (depth_zero_type_ != nullptr) return text("is ", depth_zero_type_, ", expected an object");
    for (const Field& field : fields_) {
      if (field.wrong_type != nullptr && (field.required || field.wrong_type != null_type))
        return text("field \"", *field.name, "\" is ", field.wrong_type, ", expected a string");
      if (field.required && !field.found) return text("field \"", *field.name, "\" is missing; ", fields_of(source));
    }
    return {};
  }

  Record take() {
    return {std::move(fields_[0].value), std::move(fields_[1].value), std::move(fields_[2].value),
            std::move(fields_[3].value)};
  }

  bool null() override { return value(null_type); }
  bool boolean(bool) override { return value("a boolean"); }
  bool number_integer(number_integer_t) override { return value("a number"); }
  bool number_unsigned(number_unsigned_t) override { return value("a number"); }
  bool number_float(number_float_t, const string_t&) override { return value("a number"); }
  bool binary(binary_t&) override { return value("binary data"); }
  bool string(string_t& content) override {
    if (depth_ == 0) depth_zero_type_ = "a string";
    if (depth_ == 1)
      for (Field& field : fields_)
        if (field.is_current) {
          field.value = content;
          field.wrong_type = nullptr;
          field.found = true;
        }
    return true;
  }
  bool start_object(std::size_t) override {
    if (depth_ > 0) value("an object");
    ++depth_;
    return true;
  }
  bool start_array(std::size_t) override {
    value("an array");
    ++depth_;
    return true;
  }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    if (depth_ == 1)
      for (Field& field : fields_) field.is_current = !field.name->empty() && *field.name == name;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const json::exception& error) override {
    error_position_ = position;
    syntax_error_ = error.what();
    // "[json.exception.parse_error.101] parse error at line 1, column 9: why; last read: '…'" → "why"
    if (const auto id = syntax_error_.find("] "); id != std::string::npos) syntax_error_.erase(0, id + 2);
    if (syntax_error_.starts_with("parse error at"))
      if (const auto colon = syntax_error_.find(": "); colon != std::string::npos) syntax_error_.erase(0, colon + 2);
    if (const auto last = syntax_error_.find("; last read:"); last != std::string::npos) syntax_error_.erase(last);
    return false;
  }

 private:
  static constexpr const char* null_type = "null";

  struct Field {
    const std::string* name;
    bool required;
    bool is_current = false;           // the next value at depth 1 is this field's
    bool found = false;                // as a string
    const char* wrong_type = nullptr;  // found as something else
    std::string value = {};
  };

  bool value(const char* type) {
    if (depth_ == 0) depth_zero_type_ = type;
    if (depth_ == 1)
      for (Field& field : fields_)
        if (field.is_current) field.wrong_type = type;
    return true;
  }
  bool close() {
    --depth_;
    return true;
  }
  static std::string fields_of(string_view source) {
    std::string list;
    std::size_t count = 0;
    const auto record = nlohmann::ordered_json::parse(source);
    for (const auto& [name, content] : record.items()) {
      if (++count > 8) return list + ", …";
      list += text(count == 1 ? "the record has \"" : ", \"", name, "\"");
    }
    return count == 0 ? "the record has no field" : list;
  }

  std::array<Field, 4> fields_;
  int depth_ = 0;
  const char* depth_zero_type_ = nullptr;  // of a record that is no object
  std::size_t error_position_ = 0;
  std::string syntax_error_;
};

// The code unit of an escape \uXXXX at `at`, or −1.
int escaped_unit(string_view source, std::size_t at) {
  if (at + 6 > source.size() || source[at] != '\\' || source[at + 1] != 'u') return -1;
  const char* const digits = source.data() + at + 2;
  unsigned unit = 0;
  const auto [end, error] = std::from_chars(digits, digits + 4, unit, 16);
  return error == std::errc() && end == digits + 4 ? int(unit) : -1;
}

// An escaped surrogate without its partner is no character, and the parser refuses it: it becomes the replacement
// character, as decoders of UTF-16 do. Same length, so positions in messages stay right.
string_view with_lone_surrogates_replaced(string_view source, std::string& buffer) {
  if (source.find("\\ud") == string_view::npos && source.find("\\uD") == string_view::npos) return source;
  buffer = source;
  for (std::size_t at = buffer.find('\\'); at != std::string::npos; at = buffer.find('\\', at)) {
    const int unit = escaped_unit(buffer, at);
    if (unit < 0) {
      at += 2;
      continue;
    }
    const int next = unit >= 0xd800 && unit < 0xdc00 ? escaped_unit(buffer, at + 6) : -1;
    const bool is_pair = next >= 0xdc00 && next < 0xe000;
    if (!is_pair && unit >= 0xd800 && unit < 0xe000) buffer.replace(at, 6, "\\ufffd");
    at += is_pair ? 12 : 6;
  }
  return buffer;
}

// --- one file ---

class FileReader {
 public:
  FileReader(Records& out, const RecordFields& fields, const std::string& path)
      : out_(out), fields_(fields), path_(path), file_(path), text_(file_.bytes()) {
    check_input(!text_.starts_with("\xff\xfe") && !text_.starts_with("\xfe\xff"), path_, ": is UTF-16, expected UTF-8");
    if (text_.starts_with("\xef\xbb\xbf")) text_.remove_prefix(3);  // byte order mark
  }

  void read() {
    const std::size_t first = text_.find_first_not_of(blanks);
    check_input(first != string_view::npos, path_, text_.empty() ? ": is empty" : ": holds only white space",
                ", expected a JSON array or JSON lines");
    if (text_[first] == '[')
      read_array(first + 1);
    else
      read_lines();
    check_input(count_ > 0, path_, ": has no record: the array is empty");
  }

 private:
  void read_lines() {
    for (std::size_t begin = 0; begin < text_.size();) {
      const std::size_t end = std::min(text_.find('\n', begin), text_.size());
      const string_view line = text_.substr(begin, end - begin);
      if (line.find_first_not_of(blanks) != string_view::npos) read_record(begin, line);
      begin = end + 1;
    }
  }

  // Records are told apart before they are parsed, so that one bad record does not hide the others.
  void read_array(std::size_t at) {
    for (bool is_first = true;; is_first = false) {
      at = skip_blanks(at);
      if (at == text_.size()) return complain_next(at, "the file ends before the closing ']' of the array");
      if (text_[at] == ']') {
        if (!is_first) complain_next(at, "is empty: a comma before the closing ']'");
        break;
      }
      const std::size_t end = element_end(at);
      if (!read_record(at, text_.substr(at, end - at))) {
        if (end == text_.size()) never_closed_ = true;
        if (const std::size_t line = next_record_line(at); line < end || end == text_.size()) {
          if (line == text_.size()) return;  // the bad record swallows the rest of the file
          at = line;
          continue;
        }
      }
      at = end;
      if (at == text_.size()) continue;
      if (text_[at] == ']') break;
      if (text_[at] == ',') ++at;
    }
    if (at = skip_blanks(at + 1); at < text_.size()) complain_next(at, "text after the closing ']' of the array");
  }

  std::size_t skip_blanks(std::size_t at) const { return std::min(text_.find_first_not_of(blanks, at), text_.size()); }

  // The ',' or ']' after the array element at `at`. A raw line break cannot be part of a string: there an unclosed one
  // ends.
  std::size_t element_end(std::size_t at) {
    const std::size_t limit = never_closed_ ? next_record_line(at) : text_.size();
    int depth = 0;
    bool in_string = false;
    for (; at < limit; ++at) {
      const char c = text_[at];
      if (in_string) {
        if (c == '\\' && at + 1 < limit && text_[at + 1] != '\n') {
          ++at;
        } else if (c == '"' || c == '\n') {
          in_string = false;
        }
      } else if (c == '"') {
        in_string = true;
      } else if (c == '{' || c == '[') {
        ++depth;
      } else if (depth == 0 && (c == ',' || c == ']')) {
        return at;
      } else if (depth > 0 && (c == '}' || c == ']')) {
        --depth;
      }
    }
    return limit;
  }

  // Where reading can go on after bad JSON: the next line that opens an object and is indented no deeper than the bad
  // record.
  std::size_t next_record_line(std::size_t at) {
    count_lines(at);
    const std::size_t indent = at - line_begin_;
    for (std::size_t line = text_.find('\n', at); line != string_view::npos; line = text_.find('\n', line)) {
      const std::size_t first = text_.find_first_not_of(" \t", ++line);
      if (first != string_view::npos && text_[first] == '{' && first - line <= indent) return first;
    }
    return text_.size();
  }

  // Whether the record is JSON; one that is, but has no question or answer, is a bad record with a known end.
  bool read_record(std::size_t begin, string_view source) {
    RecordReader reader(fields_);
    source = with_lone_surrogates_replaced(source, buffer_);
    ++count_;
    if (!json::sax_parse(source.begin(), source.end(), &reader)) {
      const string_view before = source.substr(0, std::max<std::size_t>(reader.error_position(), 1) - 1);
      count_lines(begin);
      const auto breaks = std::count(before.begin(), before.end(), '\n');
      const std::size_t column =
          breaks > 0 ? before.size() - before.rfind('\n') : begin - line_begin_ + before.size() + 1;
      complain(begin, text("bad JSON at line ", line_ + breaks, ", column ", column, ": ", reader.syntax_error()));
      return false;
    }
    if (const std::string why = reader.complaint(source); !why.empty())
      complain(begin, why);
    else
      out_.records.push_back(reader.take());
    return true;
  }

  void complain_next(std::size_t at, const std::string& what) {
    ++count_;
    complain(at, what);
  }
  void complain(std::size_t at, const std::string& what) {
    count_lines(at);
    if (++out_.bad <= most_complaints)
      out_.complaints.push_back(text(path_, ":", line_, ": record ", count_, ": ", what));
  }

  // Makes line_ (from 1) and line_begin_ those of `at`; calls go forwards through the file.
  void count_lines(std::size_t at) {
    for (; counted_ < at; ++counted_)
      if (text_[counted_] == '\n') {
        ++line_;
        line_begin_ = counted_ + 1;
      }
  }

  Records& out_;
  const RecordFields& fields_;
  const std::string& path_;
  MappedFile file_;
  string_view text_;
  std::string buffer_;
  std::int64_t count_ = 0;     // records so far, bad ones included
  bool never_closed_ = false;  // a record had no end: from there on records end at their lines, or each would be sought
                               // to the end of the file
  std::int64_t line_ = 1;
  std::size_t line_begin_ = 0, counted_ = 0;
};

}  // namespace

std::string Records::describe_bad() const {
  std::string lines = text(bad, " of ", bad + std::int64_t(records.size()), " records cannot be used:");
  for (const std::string& complaint : complaints) lines += "\n  " + complaint;
  if (const std::int64_t more = bad - std::int64_t(complaints.size()); more > 0)
    lines += text("\n  and ", more, " more");
  return lines;
}

Records read_records(const std::vector<std::string>& files, const RecordFields& fields, bool skip_bad) {
  check_input(!files.empty(), "no data file is given (data_args.file_name)");
  Records all;
  for (const std::string& file : files) FileReader(all, fields, file).read();
  check_input(all.bad == 0 || skip_bad, all.describe_bad(),
              "\nMend them, or leave them out with data_args.skip_bad_records: true.");
  check_input(!all.records.empty(), all.describe_bad(), "\nNone is left.");
  return all;
}

}  // namespace distill
