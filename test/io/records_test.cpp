#include "io/records.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <filesystem>
#include <random>

#include "core/error.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using distill::test::ScratchFolder;

namespace {

const RecordFields plain;

// Reads one file of this content, leaving bad records out; complaints lose the folder's name.
Records read(const std::string& content, const RecordFields& fields = plain) {
  const ScratchFolder folder;
  Records records = read_records({folder.write("f", content)}, fields, true);
  for (std::string& complaint : records.complaints) complaint.erase(0, folder.path().size());
  return records;
}

std::string refusal(const std::string& content, const RecordFields& fields = plain, bool skip_bad = false) {
  const ScratchFolder folder;
  const std::string path = folder.write("f", content);
  try {
    read_records({path}, fields, skip_bad);
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::bad_input);
    std::string message = error.what();
    for (std::size_t at; (at = message.find(folder.path())) != std::string::npos;)
      message.erase(at, folder.path().size());
    return message;
  }
  return "no error";
}

using Strings = std::vector<std::string>;

Strings answers(const Records& records) {
  Strings all;
  for (const Record& record : records.records) all.push_back(record.answer);
  return all;
}

// A record with this answer, as JSON.
std::string good(const std::string& answer) { return R"({"question": "q", "answer": ")" + answer + R"("})"; }

}  // namespace

TEST_CASE("JSON lines and arrays are told apart by content", "[records]") {
  CHECK(answers(read(good("1") + "\n" + good("2") + "\n")) == Strings{"1", "2"});
  CHECK(answers(read(good("1") + "\n" + good("2"))) == Strings{"1", "2"});  // no line break at the end
  CHECK(answers(read("[" + good("1") + "," + good("2") + "]")) == Strings{"1", "2"});
  CHECK(answers(read("\n  [\n  " + good("1") + ",\n  " + good("2") + "\n]\n")) == Strings{"1", "2"});
}

TEST_CASE("a byte order mark, CRLF and blank lines are tolerated", "[records]") {
  CHECK(answers(read("\xef\xbb\xbf" + good("1") + "\r\n\r\n  \r\n" + good("2") + "\r\n")) == Strings{"1", "2"});
  CHECK(answers(read("\xef\xbb\xbf[\r\n" + good("1") + ",\r\n" + good("2") + "\r\n]\r\n")) == Strings{"1", "2"});
}

TEST_CASE("a pretty-printed array with nested values that look like structure", "[records]") {
  const Records records = read(R"([
  {
    "tags": [{"question": 1}, "]", "}, {"],
    "question": "a \"quoted\" {[,",
    "meta": {"answer": [1, 2, {"x": null}]},
    "answer": "back\\slash\\"
  },
  {"answer": "two", "question": "b"}
])");
  CHECK(records.bad == 0);
  REQUIRE(records.records.size() == 2);
  CHECK(records.records[0].question == R"(a "quoted" {[,)");
  CHECK(records.records[0].answer == R"(back\slash\)");
  CHECK(records.records[1].answer == "two");
}

TEST_CASE("fields have names of the user's choice, prompt and system are optional", "[records]") {
  const RecordFields fields{.question = "q", .answer = "a", .prompt = "p", .system = "s"};
  const Records records = read(
      R"({"q": "1", "a": "2", "p": "3", "s": "4", "question": 5}
{"q": "6", "a": "7", "p": null}
{"q": "", "a": ""}
{"q": "first", "q": "last", "a": 1, "a": "9"}
)",
      fields);
  REQUIRE(records.records.size() == 4);
  CHECK(records.bad == 0);
  CHECK(records.records[0].question == "1");
  CHECK(records.records[0].answer == "2");
  CHECK(records.records[0].prompt == "3");
  CHECK(records.records[0].system == "4");
  CHECK(records.records[1].prompt.empty());
  CHECK(records.records[1].system.empty());
  CHECK(records.records[3].question == "last");  // of a repeated field the last counts, as in Python
  CHECK(records.records[3].answer == "9");
}

TEST_CASE("without their keys, prompt and system are not read", "[records]") {
  const Records records = read(R"({"question": "q", "answer": "a", "": 1, "prompt": 5, "system": "s"})");
  REQUIRE(records.records.size() == 1);
  CHECK(records.records[0].system.empty());
}

TEST_CASE("text of every kind comes through", "[records]") {
  const Records records = read(R"({"question": "\u0000\u00e9\ud83d\ude00\n\/", "answer": "日本語 😀"})");
  REQUIRE(records.records.size() == 1);
  CHECK(records.records[0].question == std::string("\0é😀\n/", 9));
  CHECK(records.records[0].answer == "日本語 😀");
}

TEST_CASE("an escaped surrogate without its partner becomes U+FFFD", "[records]") {
  const auto decoded = [](const std::string& escaped) { return answers(read(good(escaped))).at(0); };
  CHECK(decoded(R"(a\ud800b)") == "a\ufffdb");
  CHECK(decoded(R"(\uDFFF)") == "\ufffd");
  CHECK(decoded(R"(\ud800\ud83d\ude00)") == "\ufffd😀");
  CHECK(decoded(R"(\ude00\ud83d)") == "\ufffd\ufffd");
  CHECK(decoded(R"(\ud83d\u0041)") == "\ufffd\x41");
  CHECK(decoded(R"(\\ud800)") == R"(\ud800)");  // an escaped backslash, then letters
  CHECK(decoded(R"(\\\ud800)") == "\\\ufffd");
  CHECK(decoded(R"(\ud7ff\ue000)") == "\ud7ff\ue000");
  CHECK(read("[" + good(R"(\ud800)") + "]").bad == 0);
}

TEST_CASE("each kind of bad record is reported with file, line and record", "[records]") {
  const auto complaint = [](const std::string& bad) {
    const Records records = read(good("1") + "\n\n" + bad + "\n" + good("2"));
    CHECK(answers(records) == Strings{"1", "2"});
    REQUIRE(records.bad == 1);
    REQUIRE(records.complaints.size() == 1);
    return records.complaints[0];
  };
  CHECK(complaint(R"({"q": "x", "answer": "y"})") ==
        R"(f:3: record 2: field "question" is missing; the record has "q", "answer")");
  CHECK(complaint(R"({"question": "x", "answers": ["y"]})") ==
        R"(f:3: record 2: field "answer" is missing; the record has "question", "answers")");
  CHECK(complaint("{}") == R"(f:3: record 2: field "question" is missing; the record has no field)");
  CHECK(complaint(R"({"a":1,"b":1,"c":1,"d":1,"e":1,"f":1,"g":1,"h":1,"i":1})") ==
        R"(f:3: record 2: field "question" is missing; the record has "a", "b", "c", "d", "e", "f", "g", "h", …)");
  CHECK(complaint(R"({"question": "x", "answer": 3.5})") ==
        R"(f:3: record 2: field "answer" is a number, expected a string)");
  CHECK(complaint(R"({"question": -1, "answer": "x"})") ==
        R"(f:3: record 2: field "question" is a number, expected a string)");
  CHECK(complaint(R"({"question": null, "answer": "x"})") ==
        R"(f:3: record 2: field "question" is null, expected a string)");
  CHECK(complaint(R"({"question": "x", "answer": ["y"]})") ==
        R"(f:3: record 2: field "answer" is an array, expected a string)");
  CHECK(complaint(R"({"question": {"question": "x"}, "answer": "y"})") ==
        R"(f:3: record 2: field "question" is an object, expected a string)");
  CHECK(complaint(R"({"question": true, "answer": "y"})") ==
        R"(f:3: record 2: field "question" is a boolean, expected a string)");
  CHECK(complaint(R"(["question", "answer"])") == "f:3: record 2: is an array, expected an object");
  CHECK(complaint(R"("question")") == "f:3: record 2: is a string, expected an object");
  CHECK(complaint("17") == "f:3: record 2: is a number, expected an object");
  CHECK(complaint("null") == "f:3: record 2: is null, expected an object");
  CHECK(complaint(R"({"question": "x" "answer": "y"})") ==
        "f:3: record 2: bad JSON at line 3, column 25: syntax error while parsing object - unexpected string literal; "
        "expected '}'");
  CHECK(complaint(R"({"question": "x", "answer": "y)") ==
        "f:3: record 2: bad JSON at line 3, column 31: syntax error while parsing value - invalid string: missing "
        "closing "
        "quote");
  CHECK(complaint(R"({"question": "x", "answer": "y"},)") ==
        "f:3: record 2: bad JSON at line 3, column 33: syntax error while parsing value - unexpected ','; expected end "
        "of "
        "input");
  CHECK(complaint("{\"question\": \"x\", \"answer\": \"caf\xe9\"}") ==
        "f:3: record 2: bad JSON at line 3, column 34: syntax error while parsing value - invalid string: ill-formed "
        "UTF-8 "
        "byte");
  CHECK(complaint("{\"question\": \"\xed\xa0\x80\", \"answer\": \"y\"}") ==  // a surrogate encoded in UTF-8
        "f:3: record 2: bad JSON at line 3, column 16: syntax error while parsing value - invalid string: ill-formed "
        "UTF-8 "
        "byte");
  CHECK(complaint(R"({"question": 1e999, "answer": "x"})") ==
        "f:3: record 2: bad JSON at line 3, column 18: number overflow parsing '1e999'");
  CHECK(complaint("plain text").substr(0, 44) == "f:3: record 2: bad JSON at line 3, column 1:");
}

TEST_CASE("prompt and system of a wrong type are bad records", "[records]") {
  RecordFields fields;
  fields.prompt = "p";
  fields.system = "s";
  const Records records = read(R"({"question": "q", "answer": "a", "p": 1}
{"question": "q", "answer": "a", "s": ["x"]}
{"question": "q", "answer": "a", "p": "x", "s": "x"})",
                               fields);
  CHECK(records.complaints == Strings{R"(f:1: record 1: field "p" is a number, expected a string)",
                                      R"(f:2: record 2: field "s" is an array, expected a string)"});
}

TEST_CASE("a bad record of an array does not hide the others", "[records]") {
  const auto check_middle = [](const std::string& bad, const std::string& complaint) {
    INFO(bad);
    const Records records =
        read("[\n  " + good("1") + ",\n  " + bad + ",\n  " + good("2") + ",\n  " + good("3") + "\n]\n");
    CHECK(answers(records) == Strings{"1", "2", "3"});
    CHECK(records.bad == 1);
    CHECK(records.complaints.at(0).substr(0, complaint.size()) == complaint);
  };
  check_middle(R"({"question": 1, "answer": "x"})", R"(f:3: record 2: field "question" is a number)");
  check_middle("17", "f:3: record 2: is a number, expected an object");
  check_middle(R"({"question": "x", "answer" "y"})", "f:3: record 2: bad JSON at line 3, column 32: ");
  check_middle(R"({"question": "x", "answer": "y)",
               "f:3: record 2: bad JSON at line 3, column 34: ");  // quote never closed
  check_middle(R"({"question": x", "answer": "y"})", "f:3: record 2: bad JSON at line 3, column 16: ");  // odd quotes
  check_middle(R"({"question": "x", "answer": "y\)", "f:3: record 2: bad JSON at line 3, ");
  check_middle(R"({"question": "x", "answer": "y")", "f:3: record 2: bad JSON at line 4, ");  // brace never closed
  check_middle(R"({"question": ["x", "answer": "y"})", "f:3: record 2: bad JSON at line 3, ");
  check_middle(R"({"question": "x", "answer": "y"}})", "f:3: record 2: bad JSON at line 3, ");
  check_middle("{\"question\": \"x\",\n    \"answer\": oops\n  }", "f:3: record 2: bad JSON at line 4, column 15: ");
}

TEST_CASE("a missing comma between records costs the record before it", "[records]") {
  const Records records = read("[\n" + good("1") + "\n" + good("2") + ",\n" + good("3") + "\n]");
  CHECK(answers(records) == Strings{"2", "3"});
  CHECK(records.complaints == Strings{"f:2: record 1: bad JSON at line 3, column 1: syntax error while parsing value - "
                                      "unexpected '{'; expected end of input"});
}

TEST_CASE("many records that never end are each reported, in linear time", "[records]") {
  std::string content = "[\n";
  for (int i = 0; i < 20000; ++i) content += "{\"question\": \"q\", \"answer\": \"a\",\n";
  const Records records = read(content + good("last") + "\n]");
  CHECK(records.bad == 20000);
  CHECK(answers(records) == Strings{"last"});
}

TEST_CASE("damaged ends of an array are reported", "[records]") {
  const auto check_end = [](const std::string& content, const std::string& complaint) {
    INFO(content);
    const Records records = read(content);
    CHECK(answers(records) == Strings{"1"});
    CHECK(records.bad == 1);
    CHECK(records.complaints.at(0) == complaint);
  };
  check_end("[\n" + good("1"), "f:2: record 2: the file ends before the closing ']' of the array");
  check_end("[\n" + good("1") + ",\n", "f:3: record 2: the file ends before the closing ']' of the array");
  check_end("[\n" + good("1") + ",\n{\"question\": \"cu",
            "f:3: record 2: bad JSON at line 3, column 17: syntax error while parsing value - invalid string: missing "
            "closing "
            "quote");
  check_end("[\n" + good("1") + ",\n]\n", "f:3: record 2: is empty: a comma before the closing ']'");
  check_end("[\n" + good("1") + "]\n\n" + good("2"), "f:4: record 2: text after the closing ']' of the array");
}

TEST_CASE("bad records are refused unless they are to be skipped", "[records]") {
  std::string content = good("1") + "\n";
  for (int i = 0; i < 7; ++i) content += "{}\n";
  const std::string described =
      "7 of 8 records cannot be used:\n"
      "  f:2: record 2: field \"question\" is missing; the record has no field\n"
      "  f:3: record 3: field \"question\" is missing; the record has no field\n"
      "  f:4: record 4: field \"question\" is missing; the record has no field\n"
      "  f:5: record 5: field \"question\" is missing; the record has no field\n"
      "  f:6: record 6: field \"question\" is missing; the record has no field\n"
      "  and 2 more";
  CHECK(refusal(content) == described + "\nMend them, or leave them out with data_args.skip_bad_records: true.");
  const Records records = read(content);
  CHECK(records.records.size() == 1);
  CHECK(records.describe_bad() == described);
  CHECK(refusal("{}\n", plain, true) ==
        "1 of 1 records cannot be used:\n  f:1: record 1: field \"question\" is missing; the record has no field\nNone "
        "is left.");
}

TEST_CASE("files without records and files that cannot be read are refused", "[records]") {
  CHECK(refusal("") == "f: is empty, expected a JSON array or JSON lines");
  CHECK(refusal("\xef\xbb\xbf") == "f: is empty, expected a JSON array or JSON lines");
  CHECK(refusal(" \n\n") == "f: holds only white space, expected a JSON array or JSON lines");
  CHECK(refusal(" [ ] ") == "f: has no record: the array is empty");
  CHECK(refusal("\xff\xfe{") == "f: is UTF-16, expected UTF-8");
  CHECK(refusal("\xfe\xff") == "f: is UTF-16, expected UTF-8");

  const ScratchFolder folder;
  CHECK_THROWS_WITH(read_records({}, plain, true), "no data file is given (data_args.file_name)");
  CHECK_THROWS_WITH(read_records({folder.path("gone.json")}, plain, true),
                    folder.path("gone.json") + ": cannot open: No such file or directory");
  std::filesystem::create_directory(folder.path("sub"));
  CHECK_THROWS_WITH(read_records({folder.path("sub")}, plain, true),
                    folder.path("sub") + ": is a folder, expected a file");
  CHECK_THROWS_WITH(read_records({"/dev/null"}, plain, true), "/dev/null: is not a regular file");
}

TEST_CASE("many files are read in the order given, each with its own numbers", "[records]") {
  const ScratchFolder folder;
  const std::string first = folder.write("b.txt", "[" + good("1") + "]");
  const std::string second = folder.write("a.json", good("2") + "\n{}\n" + good("3"));
  const Records records = read_records({first, second}, plain, true);
  CHECK(answers(records) == Strings{"1", "2", "3"});
  CHECK(records.complaints == Strings{second + ":2: record 2: field \"question\" is missing; the record has no field"});
}

TEST_CASE("whatever bytes a file is damaged with, reading ends with records or an input error", "[records]") {
  const ScratchFolder folder;
  std::mt19937 random(1);  // its values are fixed by the standard, unlike those of distributions
  const std::string lines = good("1") + "\r\n" + good(R"(\ud83d\ude00 \\)") + "\n" + good("3") + "\n";
  const std::string array =
      "[\n  " + good("1") + ",\n  {\"question\": \"é\", \"x\": [{}, 1.5], \"answer\": \"2\"},\n  " + good("3") + "\n]";
  const std::string pieces = std::string("\"\\{}[],:\n\r \xff\xed u0") + '\0';
  for (int i = 0; i < 3000; ++i) {
    std::string content = i % 2 == 0 ? lines : array;
    for (unsigned edits = 1 + random() % 4; edits > 0; --edits) {
      const std::size_t at = random() % content.size();
      if (random() % 2 == 0)
        content[at] = pieces[random() % pieces.size()];
      else
        content.erase(at, 1 + random() % 8);
    }
    try {
      const Records records = read_records({folder.write(text("f", i), content)}, plain, true);
      REQUIRE(std::int64_t(records.complaints.size()) == std::min<std::int64_t>(records.bad, 5));
    } catch (const Error& error) {
      REQUIRE(error.code() == ExitCode::bad_input);
    }
  }
}
