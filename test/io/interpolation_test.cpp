#include "io/interpolation.h"

#include <catch2/catch.hpp>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "test/support/refusal.h"

using namespace distill;

namespace {

// The value of key "a".
YamlNode resolved(const std::string& document) {
  YamlNode root = parse_yaml(document, "x.yaml");
  link_parents(root);
  Interpolation interpolation(root);
  return interpolation.expand(*root.find("a"));
}

std::string refused(const std::string& document) {
  return test::refusal("", [&] { resolved(document); });
}

}  // namespace

TEST_CASE("interpolation agrees with OmegaConf") {
  setenv("DISTILL_GOLDEN", "from the environment", 1);
  unsetenv("DISTILL_UNSET");
  std::ifstream in(DISTILL_SOURCE_DIR "/test/golden/interpolation.json");
  const nlohmann::json cases = nlohmann::json::parse(in);
  REQUIRE(cases.size() > 50);
  for (const auto& golden : cases) {
    const std::string document = golden["document"];
    INFO(document);
    if (golden.contains("error")) {
      CHECK_THROWS_AS(resolved(document), Error);
    } else if (golden["value"].is_null()) {
      CHECK(resolved(document).kind == YamlNode::Kind::null);
    } else {
      const YamlNode value = resolved(document);
      CHECK(value.kind == YamlNode::Kind::scalar);
      CHECK(value.scalar == golden["value"].get<std::string>());
    }
  }
}

TEST_CASE("a reference keeps the kind of what it refers to") {
  CHECK(resolved("a: ${b}\nb: [1, '${c}']\nc: 2").items[1].scalar == "2");
  CHECK(resolved("a: ${b}\nb: {c: 1}").kind == YamlNode::Kind::map);
}

TEST_CASE("a section that hydra would take from another file is empty") {
  CHECK(resolved("defaults: [../config/zero3@_here_, other]\na: ${zero3}").kind == YamlNode::Kind::null);
  CHECK(resolved("defaults: [../config/zero3@_here_, other]\na: ${other.key}").kind == YamlNode::Kind::null);
}

TEST_CASE("wrong references say which") {
  unsetenv("DISTILL_UNSET");
  CHECK(refused("\na: ${b.c}\n") ==
        "x.yaml:2: a: ${b.c} refers to 'b.c', which is given neither in the file nor on the command line");
  CHECK(refused("a: ${..b}\n") == "x.yaml:1: a: ${..b} has too many dots: it leaves the file");
  CHECK(refused("a: ${}\n") == "x.yaml:1: a: ${} names no key");
  CHECK(refused("a: x${b\nb: 1\n") == "x.yaml:1: a: '${' is not closed in 'x${b'");
  CHECK(refused("a: ${b}\nb: ${c}\nc: ${b}\n") == "x.yaml:2: b: refers to itself: b -> c -> b");
  CHECK(refused("a: ${a}\n") == "x.yaml:1: a: refers to itself: a -> a");
  CHECK(refused("a: ['${a}']\n") == "x.yaml:1: a[0]: ${a} refers to the section it is in");
  CHECK(refused("a: ${b.c}\nb: {c: '${b}'}\n") == "x.yaml:2: b.c: ${b} refers to the section it is in");
  CHECK(refused("a: x${b}\nb: [1]\n") == "x.yaml:1: a: ${b} is a list and cannot be part of a text");
  CHECK(refused("a: x${b}\nb: ~\n") == "x.yaml:1: a: ${b} is nothing and cannot be part of a text");
  CHECK(refused("a: ${now:%Y}\n") == "x.yaml:1: a: unknown resolver 'now': expected ${key} or ${oc.env:NAME,default}");
  CHECK(refused("a: ${oc.env:DISTILL_UNSET}\n") ==
        "x.yaml:1: a: the environment variable DISTILL_UNSET is not set; ${oc.env:DISTILL_UNSET,default} gives it a "
        "default");
  CHECK(refused("a: ${oc.env:A,b,c}\n") ==
        "x.yaml:1: a: ${oc.env:A,b,c}: expected ${oc.env:NAME} or ${oc.env:NAME,default}");
  CHECK(refused("a: '${oc.env:}'\n") == "x.yaml:1: a: ${oc.env:}: expected ${oc.env:NAME} or ${oc.env:NAME,default}");
}

TEST_CASE("a long chain of references ends") {
  std::string document = "a: ${k0}\n";
  for (int i = 0; i < 200; ++i) document += text("k", i, ": ${k", i + 1, "}\n");
  CHECK_THAT(refused(document), Catch::Contains("is a chain of more than 100 references"));
}

TEST_CASE("an escaped text resolves to itself") {
  for (const char* literal : {"plain", "${b}", "\\${b}", "\\\\${b}", "a\\b", "${", "$", "x${y}z${w}", "\\", "${${"}) {
    YamlNode root = parse_yaml("a: x\n", "x.yaml");
    root.find("a")->scalar = escape_interpolation(literal);
    link_parents(root);
    Interpolation interpolation(root);
    CHECK(interpolation.resolve(*root.find("a")).scalar == literal);
  }
}
