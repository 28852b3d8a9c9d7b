// The program with device: cuda on the virtual GPU: the runs of the CPU, in any order that streams allow; every error
// of a device with one message and its code. Race check off: the kernels' own tests have it on.
#include <algorithm>
#include <catch2/catch.hpp>
#include <fstream>
#include <set>

#include "test/support/workshop.h"

using namespace distill::test;
using Catch::Contains;
namespace fs = std::filesystem;

namespace {

using Words = std::vector<std::string>;

Words operator+(Words a, const Words& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

const Words small = {"max_steps=3",     "save_steps=0",       "eval_steps=3",
                     "peak_flops=1e12", "sequence_length=32", "student.training_args.per_device_train_batch_size=2"};
const Words cuda = {"device=cuda"}, cpu = {"device=cpu"};

Words both_roles(const std::string& key, int value) {
  Words words;
  for (const char* role : {"student", "teacher"})
    words.push_back(std::string(role) + ".strategy_args.strategy_config." + key + "=" + std::to_string(value));
  return words;
}

// environment: NAME=value.
Process::Result run(const Workshop& shop, const std::string& name, const Words& overrides, int ranks,
                    const Words& environment = {}) {
  return Process(Words{"VIRTUAL_GPU_RACES=off"} + environment + shop.training(name, small + overrides, ranks)).wait();
}
void train(const Workshop& shop, const std::string& name, const Words& overrides, int ranks,
           const Words& environment = {}) {
  const auto result = run(shop, name, overrides, ranks, environment);
  INFO(result.output);
  REQUIRE(result.code == 0);
}

void check_like(const Workshop& shop, const std::string& name, const std::string& other) {
  for (const char* metric : {"train/loss", "student/grad_norm", "student/val_loss"}) {
    const auto a = column(shop.path("logs/" + other + "/metrics.csv"), metric),
               b = column(shop.path("logs/" + name + "/metrics.csv"), metric);
    REQUIRE(a.size() == b.size());
    for (std::size_t i = 0; i < a.size(); ++i) {
      CAPTURE(metric, i);
      REQUIRE(a[i].empty() == b[i].empty());
      if (!a[i].empty()) CHECK(std::stod(b[i]) == Approx(std::stod(a[i])).epsilon(1e-5));
    }
  }
}

Words seed(int number) { return {"VIRTUAL_GPU_SEED=" + std::to_string(number)}; }

// One rank on the CPU, then any number of GPUs in the orders of these seeds.
void check_orders(int first_seed, int last_seed) {
  const Workshop shop;
  shop.make_teacher();
  train(shop, "cpu", cpu, 0);
  train(shop, "one", cuda, 0, seed(first_seed));
  check_like(shop, "one", "cpu");
  for (int s = first_seed; s <= last_seed; ++s) {
    CAPTURE(s);
    const std::string number = std::to_string(s);
    // Whether the teacher's logits are made here or on another GPU, the bits are the same.
    train(shop, "two" + number, cuda, 2, seed(s));
    CHECK(shop.losses("two" + number) == shop.losses("one"));
    CHECK(shop.weights("two" + number) == shop.weights("one"));
  }
}

}  // namespace

TEST_CASE("one GPU and two are the CPU's run within rounding, and each other's bits", "[e2e]") { check_orders(1, 2); }
TEST_CASE("the same in twenty orders of streams", "[.][full]") { check_orders(1, 20); }

TEST_CASE("partners that share a GPU, have no peer access or send messages get the same bits", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  const Words run_of = cuda + Words{"teacher.model_args.dtype=bf16"};
  train(shop, "one", run_of, 0);
  struct Case {
    std::string name;
    Words overrides, environment;
  };
  for (const Case& c : std::vector<Case>{{"shared", {}, {"VIRTUAL_GPU_DEVICES=1"}},
                                         {"apart", {}, {"VIRTUAL_GPU_PEER_ACCESS=0"}},
                                         {"hidden", {"teacher_payload=hidden"}, {}},
                                         {"messages", {"logits_transfer_backend=nccl-only"}, {}}}) {
    CAPTURE(c.name);
    train(shop, c.name, run_of + c.overrides, 2, c.environment);
    CHECK(shop.losses(c.name) == shop.losses("one"));
    CHECK(shop.weights(c.name) == shop.weights("one"));
  }
}

TEST_CASE("a grid of GPUs is the run on one CPU", "[e2e]") {
  const Workshop shop({.teacher_layers = 2, .student_layers = 2});
  shop.make_teacher();
  train(shop, "cpu", cpu, 0);
  const Words one_micro_batch = {"student.training_args.gradient_accumulation_steps=1"};
  struct Case {
    std::string name;
    Words overrides;
    int ranks;
  };
  for (const Case& c : std::vector<Case>{
           {"tp2", both_roles("tp_size", 2), 4}, {"pp2", both_roles("pp_size", 2), 4}, {"dp2", one_micro_batch, 4}}) {
    CAPTURE(c.name);
    train(shop, c.name, cuda + c.overrides, c.ranks);
    check_like(shop, c.name, "cpu");
  }
}

TEST_CASE("a run on GPUs resumes bit for bit", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  const Words saving = cuda + Words{"save_steps=2", "max_steps=4"};
  train(shop, "whole", saving, 2);
  for (const std::string folder : {"", "logs/"})
    fs::copy(shop.path(folder + "whole"), shop.path(folder + "again"), fs::copy_options::recursive);
  fs::remove_all(shop.path("again/checkpoints/step-000004"));
  fs::remove_all(shop.path("again/export"));
  train(shop, "again", saving + Words{"resume_from_checkpoint=true"}, 2);
  CHECK(shop.losses("again") == shop.losses("whole"));
  CHECK(shop.weights("again") == shop.weights("whole"));
}

TEST_CASE("what is wrong with the GPUs is one message with code 2, and auto does without", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  struct Case {
    std::string name, message;
    Words environment;
    int ranks;
  };
  const std::vector<Case> cases = {
      {"none", "device: cuda: rank 0: no GPU is visible (CUDA_VISIBLE_DEVICES=)", {"CUDA_VISIBLE_DEVICES="}, 2},
      {"few",
       "device: cuda: node 0 shows 1 GPU to 4 ranks: expected 4, or 2 where a student and its teacher share one",
       {"VIRTUAL_GPU_DEVICES=1"},
       4},
      {"driver",
       "the NVIDIA driver is for CUDA 12.4 and this program for CUDA 13.0: install a newer driver",
       {"VIRTUAL_GPU_DRIVER=12040"},
       2}};
  for (const Case& c : cases) {
    CAPTURE(c.name);
    const auto result = run(shop, c.name, cuda, c.ranks, c.environment);
    INFO(result.output);
    CHECK(result.code == 2);
    CHECK(occurrences(result.output, c.message) == 1);
    CHECK_FALSE(fs::exists(shop.path(c.name + "/checkpoints")));
  }
  const auto automatic = run(shop, "auto", {"max_steps=1"}, 2, {"CUDA_VISIBLE_DEVICES="});
  INFO(automatic.output);
  CHECK(automatic.code == 0);
  CHECK(occurrences(automatic.output, "device: cpu (no GPU is visible") == 1);
}

TEST_CASE("too little GPU memory says for what, how much was asked and what is free", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  const auto result = run(shop, "full", cuda, 0, {"VIRTUAL_GPU_MEMORY=2"});
  INFO(result.output);
  CHECK(result.code == 2);
  CHECK(occurrences(result.output, "out of memory") == 1);
  CHECK_THAT(result.output, Contains("the student's model") && Contains(" bytes asked for, ") && Contains(" free"));
}

TEST_CASE("a GPU that is lost ends the run with one message, and the newest checkpoint is whole", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  const Words saving = cuda + Words{"save_steps=1", "max_steps=6"};
  const std::string call = GENERATE("cudaLaunchKernelExC:4000", "cudaEventSynchronize:300");
  CAPTURE(call);
  const auto lost = run(shop, "lost", saving, 0, {"VIRTUAL_GPU_FAIL=" + call + ":cudaErrorECCUncorrectable"});
  INFO(lost.output);
  CHECK(lost.code == 1);
  CHECK(occurrences(lost.output, "cudaErrorECCUncorrectable") == 1);
  const auto resumed = run(shop, "lost", saving + Words{"resume_from_checkpoint=true"}, 0);
  INFO(resumed.output);
  CHECK(resumed.code == 0);
  CHECK_THAT(resumed.output, !Contains("passed over"));
}

namespace {

const Words saving_run = {"device=cuda", "save_steps=1", "max_steps=2"};

// A run in which a call of one rank fails: NAME:count. It ends by itself, with one message, and what it saved is whole.
void check_failure(const Workshop& shop, const std::string& call, int failing_rank, int ranks) {
  CAPTURE(call, failing_rank, ranks);
  for (const std::string folder : {"failing", "logs/failing"}) fs::remove_all(shop.path(folder));
  const std::string plan = "VIRTUAL_GPU_FAIL=" + call + ":cudaErrorInvalidValue";
  Words words = shop.training("failing", small + saving_run, ranks);
  const auto program = std::find(words.begin(), words.end(), DISTILL_PROGRAM);
  const Words on_rank = {
      "sh", "-c",
      "test ${OMPI_COMM_WORLD_RANK:-0} != " + std::to_string(failing_rank) + " || export " + plan + "; exec \"$@\"",
      "sh"};
  words.insert(program, on_rank.begin(), on_rank.end());
  const auto result = Process(Words{"VIRTUAL_GPU_RACES=off", "timeout", "120", "env"} + words).wait();
  INFO(result.output);
  CHECK((result.code == 1 || result.code == 2));
  CHECK(occurrences(result.output, "distill: ") == 1);
  const std::string saved = shop.path("failing/checkpoints");
  if (!fs::exists(saved) || fs::is_empty(saved)) return;
  const auto inspected = Process(shop.command({"inspect", shop.path("failing")})).wait();
  INFO(inspected.output);
  CHECK(inspected.code == 0);
}

// Calls that give back what is no longer wanted: nothing depends on them, and a destructor cannot report.
bool gives_back(const std::string& call) {
  for (const char* part : {"Free", "Destroy", "Close", "GetLastError", "Abort", "Finalize", "*"})
    if (call.find(part) != std::string::npos) return true;
  return false;
}

}  // namespace

TEST_CASE("a call that fails ends the run with one message, nothing hangs, and what was saved is whole", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  for (const char* call : {"cudaStreamCreateWithFlags:1", "cudaMalloc:9", "cudaMemcpyAsync:60", "cublasLtMatmul:30",
                           "cudaLaunchKernelExC:900", "cudaEventRecord:200"})
    check_failure(shop, call, 0, 0);
  check_failure(shop, "cudaIpcGetMemHandle:1", 1, 2);
  check_failure(shop, "cudaIpcOpenMemHandle:1", 0, 2);
  check_failure(shop, "cudaLaunchKernelExC:500", 1, 2);
}

TEST_CASE("every call of the start and of a step fails once", "[.][full]") {
  const Workshop shop;
  shop.make_teacher();
  for (const int ranks : {0, 2}) {
    const std::string file = shop.path("calls-" + std::to_string(ranks));
    train(shop, "counted-" + std::to_string(ranks), saving_run, ranks, {"VIRTUAL_GPU_CALLS=" + file});
    std::ifstream counts(file);
    std::string call;
    for (long count = 0; counts >> call >> count;) {
      if (gives_back(call)) continue;
      for (const long n : std::set<long>{1, 2, count / 4, count / 2, count - 1, count})
        if (n > 0)
          for (int rank = 0; rank < std::max(ranks, 1); ++rank)
            check_failure(shop, call + ":" + std::to_string(n), rank, ranks);
    }
  }
}

TEST_CASE("check shows the GPU of every rank", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  const auto result = Process(shop.command({"check", "--config", shop.path("run.yaml"), "device=cuda"}, 2)).wait();
  INFO(result.output);
  CHECK(result.code == 0);
  CHECK_THAT(result.output, Contains("0 (Virtual H100 80GB HBM3, 4 GiB, 0000:10:00.0)") &&
                                Contains("1 (Virtual H100 80GB HBM3, 4 GiB, 0000:11:00.0)"));
}
