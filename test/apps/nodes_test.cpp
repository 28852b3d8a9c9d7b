// The program on two nodes (tools/pretend_nodes.sh): the grid across them, and what happens when one vanishes.
#include <algorithm>
#include <catch2/catch.hpp>
#include <chrono>
#include <filesystem>
#include <stdexcept>
#include <thread>
#include <utility>

#include "test/support/process.h"
#include "test/support/workshop.h"

using namespace distill::test;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

const std::string nodes_script = DISTILL_SOURCE_DIR "/tools/pretend_nodes.sh";

// One teacher, and the run on one rank that the others must equal, for all cases.
const Workshop& workshop() {
  static const Workshop shop({.student_layers = 2});
  static const bool is_ready = [] {
    shop.make_teacher();
    const auto one = shop.train("one");
    INFO(one.output);
    REQUIRE(one.code == 0);
    return true;
  }();
  return is_ready ? shop : throw std::logic_error("no workshop");
}

// distill on so many ranks of each node ("2") or of node 0, 1, … ("3,1").
std::vector<std::string> command(const std::string& ranks, std::vector<std::string> arguments) {
  std::vector<std::string> words{"OMP_NUM_THREADS=1", nodes_script, "run", ranks, DISTILL_PROGRAM};
  if (arguments.front() == "check") {
    words.push_back("check");
    arguments.erase(arguments.begin());
  }
  words.insert(words.end(), {"--config", workshop().path("run.yaml")});
  words.insert(words.end(), arguments.begin(), arguments.end());
  return words;
}
Process::Result run(const std::string& ranks, const std::vector<std::string>& arguments) {
  return Process(command(ranks, arguments)).wait();
}

// Both roles are cut alike.
std::vector<std::string> both_roles(const std::string& setting) {
  return {"student.strategy_args.strategy_config." + setting, "teacher.strategy_args.strategy_config." + setting};
}

void check_equals_one_rank(const std::string& name) {
  const auto a = workshop().losses("one"), b = workshop().losses(name);
  REQUIRE(a.size() == 6);
  REQUIRE(b.size() == 6);
  for (std::size_t i = 0; i < a.size(); ++i) CHECK(std::stod(a[i]) == Approx(std::stod(b[i])).epsilon(1e-5));
}

}  // namespace

TEST_CASE("each node has students and teachers, partners are neighbours") {
  const auto check = run("2", {"check"});
  INFO(check.output);
  CHECK(check.code == 0);
  CHECK_THAT(check.output, Contains("grid: tp 1, dp 2, pp 1, 4 ranks\n"
                                    "  rank  role     tp  dp  pp  partner  node\n"
                                    "     0  student   0   0   0        1  node0\n"
                                    "     1  teacher   0   0   0        0  node0\n"
                                    "     2  student   0   1   0        3  node1\n"
                                    "     3  teacher   0   1   0        2  node1\n"));
}

TEST_CASE("data parallel across nodes gives the losses of one rank") {
  const auto two = run("2", {"exp_name=dp2", "student.training_args.per_device_train_batch_size=2"});
  INFO(two.output);
  REQUIRE(two.code == 0);
  check_equals_one_rank("dp2");
}

TEST_CASE("a pipeline across nodes gives the losses of one rank, logits through shared memory or as messages") {
  const std::string way = GENERATE("ipc+nccl", "nccl-only");
  auto arguments = both_roles("pipeline_model_parallel_size=2");
  arguments.insert(arguments.end(), {"exp_name=pp2-" + way, "logits_transfer_backend=" + way});
  const auto two = run("2", arguments);
  INFO(two.output);
  REQUIRE(two.code == 0);
  CHECK_THAT(two.output, Contains("     2  student   0   0   1        3  node1\n"));
  check_equals_one_rank("pp2-" + way);
}

// One rank a node, so that nothing in their world goes through shared memory.
TEST_CASE("groups and the logits channel by messages between nodes") {
  for (const auto& [program, test] :
       {std::pair{DISTILL_COMMUNICATOR_TEST, "the world of this process is a group"},
        std::pair{DISTILL_MESSAGE_CHANNEL_TEST, "a channel by messages in the world of this process"}}) {
    const auto result = Process({nodes_script, "run", "1", program, test, "--use-colour", "no"}).wait();
    INFO(result.output);
    CHECK(result.code == 0);
    CHECK(occurrences(result.output, " passed") == 2);  // each rank says so
  }
}

TEST_CASE("what does not fit the nodes is said once, with the node's name") {
  const auto refused = [](const std::string& ranks, std::vector<std::string> arguments, const std::string& message) {
    arguments.push_back("exp_name=wrong");
    const auto result = run(ranks, arguments);
    INFO(result.output);
    CHECK(result.code == 2);
    CHECK(occurrences(result.output, message) == 1);
    CHECK_FALSE(fs::exists(workshop().path("wrong")));
  };
  refused("1,3", {},
          "distill: 1 rank on node0 cannot be split into as many students as teachers; "
          "distill_loss_weight: 0 trains without a teacher on any number; no grid fits 1 + 3 ranks on the nodes, "
          "which are halved; grids (tp×pp×dp) that fit these models and 2 + 2 ranks on the nodes: 1×1×2, 1×2×1; "
          "2 + 4 ranks on the nodes: 1×1×3");
  refused(
      "2", both_roles("tensor_model_parallel_size=2"),
      "distill: 2 ranks on node0 cannot be cut into groups of tp_size 2 for students and for teachers (a group stays "
      "inside a node): start 4 ranks on node0; grids (tp×pp×dp) that fit these models and 2 + 2 ranks on the nodes: "
      "1×1×2, 1×2×1");
}

namespace {

// tools/pretend_nodes.sh with these words.
Process::Result nodes(std::vector<std::string> words) {
  words.insert(words.begin(), nodes_script);
  return Process(words).wait();
}

// Shared memory of node 0, "64k". That of MPI is elsewhere then.
void give_shared_memory(const std::string& size) {
  REQUIRE(nodes({"on", "0", "mount", "-o", "remount,size=" + size, "/dev/shm"}).code == 0);
}
std::vector<std::string> with_mpi_memory_elsewhere(std::vector<std::string> words) {
  const auto program = std::find(words.begin(), words.end(), DISTILL_PROGRAM);
  const std::string elsewhere[] = {"--mca", "btl_vader_backing_directory", workshop().path("")};
  words.insert(program, std::begin(elsewhere), std::end(elsewhere));
  return words;
}

}  // namespace

TEST_CASE("too little shared memory for the world, or for the groups of one role, is one message and code 2") {
  const auto tp2 = both_roles("tensor_model_parallel_size=2");
  const auto refused = [&](const std::string& size, const std::string& message) {
    give_shared_memory(size);
    auto arguments = tp2;
    arguments.push_back("exp_name=scarce");
    const auto result = Process(with_mpi_memory_elsewhere(command("4,0", arguments))).wait();
    INFO(result.output);
    CHECK(result.code == 2);
    CHECK(occurrences(result.output, "distill: ") == 1);
    CHECK_THAT(result.output, Contains("distill: " + message) && Contains(" bytes of shared memory, /dev/shm has "));
    return result.output;
  };
  refused("64k", "group world of 4 ranks needs ");
  // The world has its memory and those of the students and of the teachers as well, but only one of the two tp groups.
  const std::string late = refused("19m", "group tp 0 of ");
  CHECK_THAT(late, Contains("a node needs 24.50 MiB of shared memory for groups of ranks and "));
  give_shared_memory("256m");
}

namespace {

using Clock = std::chrono::steady_clock;

// Steps done at the newest checkpoint; 0 without one.
int newest_step(const std::string& name) {
  int newest = 0;
  std::error_code none_yet;
  for (const auto& entry : fs::directory_iterator(workshop().path(name + "/checkpoints"), none_yet))
    if (const std::string file = entry.path().filename(); file.starts_with("step-"))
      newest = std::max(newest, std::stoi(file.substr(5)));
  return newest;
}

struct Loss {
  Clock::time_point when;
  int code;
  std::string output;
};

// How soon ranks and mpirun see that a node is gone.
struct Watch {
  std::string keepalive;  // of pretend_nodes.sh
  std::vector<std::string> settings;
};
const Watch quick{"1 1 5", {"peer_dead_after=3s"}}, as_the_readme_says{"2 1 22", {}};

// What the run on two nodes says and returns when, in its midst, this is done to node 1.
Loss lose_node(const std::string& name, const std::vector<std::string>& deed, const Watch& watch) {
  std::vector<std::string> arguments{"exp_name=" + name, "student.training_args.per_device_train_batch_size=2",
                                     "max_steps=100000", "max_ckpt_to_keep=2"};
  arguments.insert(arguments.end(), watch.settings.begin(), watch.settings.end());
  std::vector<std::string> words = command("2", arguments);
  words.insert(words.begin(), "KEEPALIVE=" + watch.keepalive);
  Process run(words);
  for (int i = 0; i < 12000 && newest_step(name) < 4; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  const auto start = Clock::now();
  const auto done = nodes(deed);
  INFO(done.output);
  CHECK(done.code == 0);
  const auto result = run.wait();
  CHECK(Clock::now() - start < std::chrono::seconds(30));
  // That of mpirun, which saw it, or that of a rank.
  INFO(result.output);
  CHECK((result.code == 205 || result.code == 3));
  return {start, result.code, result.output};
}

// Whether all ranks on a node are gone within 30 s of its loss.
bool ends_on(const std::string& node, Clock::time_point lost) {
  while (Clock::now() - lost < std::chrono::seconds(30)) {
    const auto processes = nodes({"on", node, "sh", "-c", "cat /proc/[0-9]*/cmdline"}).output;
    const auto shows = [&](const std::string& part) { return processes.find(part) != std::string::npos; };
    if (shows("_node") && !shows(workshop().path("run.yaml"))) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  return false;
}

// By the first rank of node 0, waiting or not.
void check_says_that_node_1_is_lost(const std::string& output, const std::string& seconds) {
  CHECK_THAT(output, Contains("distill: rank 0 on node0") && Contains("rank 2 on node1") &&
                         Contains("has shown no sign of life for " + seconds + ".") &&
                         Contains("like all ranks of its node"));
}

}  // namespace

TEST_CASE("a node that loses power ends the run, and its newest checkpoint resumes on the other") {
  const auto lost = lose_node("powerless", {"kill", "1"}, quick);
  CHECK(nodes({"restart", "1"}).code == 0);
  INFO(lost.output);
  check_says_that_node_1_is_lost(lost.output, "3");
  const int done = newest_step("powerless");
  REQUIRE(done >= 4);
  const auto resumed =
      run("2,0", {"exp_name=powerless", "resume_from_checkpoint=true", "max_steps=" + std::to_string(done + 2)});
  INFO(resumed.output);
  CHECK(resumed.code == 0);
  CHECK_THAT(resumed.output, Contains("resumed from ") && Contains("after step " + std::to_string(done)));
}

// With the settings a user has.
TEST_CASE("a node whose cable is out ends the run, on both sides") {
  const auto lost = lose_node("unplugged", {"link", "1", "down"}, as_the_readme_says);
  INFO(lost.output);
  check_says_that_node_1_is_lost(lost.output, "20");
  CHECK(ends_on("1", lost.when));
  CHECK(nodes({"link", "1", "up"}).code == 0);
}
