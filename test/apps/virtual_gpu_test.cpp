// The program with device: cuda on the virtual GPU: the runs of the CPU, in any order that streams allow; every error
// of a device with one message and its code. Race check off: the kernels' own tests have it on.
#include <algorithm>
#include <catch2/catch.hpp>
#include <chrono>
#include <cmath>
#include <csignal>
#include <fstream>
#include <map>
#include <set>
#include <thread>

#include "test/support/workshop.h"

using namespace distill::test;
using Catch::Contains;
namespace fs = std::filesystem;

namespace {

// As little work as shows something: every kernel of a GPU is run thread by thread.
const Words small = {"max_steps=3",
                     "save_steps=0",
                     "eval_steps=3",
                     "peak_flops=1e12",
                     "sequence_length=32",
                     "student.training_args.per_device_train_batch_size=2",
                     "student.training_args.gradient_accumulation_steps=2"};
const Words cuda = {"device=cuda"}, cpu = {"device=cpu"};

// A workshop with a teacher and three records to validate with.
class Shop : public Workshop {
 public:
  explicit Shop(const WorkshopModels& models = {}) : Workshop(models) {
    make_teacher();
    std::istringstream records(contents(path("validation.jsonl")));
    std::string three, line;
    for (int i = 0; i < 3 && std::getline(records, line); ++i) three += line + "\n";
    write("validation.jsonl", three);
  }
};

// environment: NAME=value.
Words command(const Workshop& shop, const std::string& name, const Words& overrides, int ranks,
              const Words& environment = {}) {
  return Words{"VIRTUAL_GPU_RACES=off"} + environment + shop.training(name, small + overrides, ranks);
}
Process::Result run(const Workshop& shop, const std::string& name, const Words& overrides, int ranks,
                    const Words& environment = {}) {
  return Process(command(shop, name, overrides, ranks, environment)).wait();
}
void train(const Workshop& shop, const std::string& name, const Words& overrides, int ranks,
           const Words& environment = {}) {
  const auto result = run(shop, name, overrides, ranks, environment);
  INFO(result.output);
  REQUIRE(result.code == 0);
}

std::vector<double> numbers(const Workshop& shop, const std::string& run, const std::string& metric) {
  std::vector<double> values;
  for (const std::string& cell : column(shop.path("logs/" + run + "/metrics.csv"), metric))
    values.push_back(cell.empty() ? 0 : std::stod(cell));
  return values;
}

void check_like(const Workshop& shop, const std::string& name, const std::string& other, double tolerance = 1e-5) {
  for (const char* metric : {"train/loss", "student/grad_norm", "student/val_loss"}) {
    const auto a = numbers(shop, other, metric), b = numbers(shop, name, metric);
    REQUIRE(a.size() == b.size());
    for (std::size_t i = 0; i < a.size(); ++i) {
      CAPTURE(metric, i);
      CHECK(b[i] == Approx(a[i]).epsilon(tolerance));
    }
  }
}

Words seed(int number) { return {"VIRTUAL_GPU_SEED=" + std::to_string(number)}; }

// One rank on the CPU, then any number of GPUs in the orders of these seeds.
void check_orders(int first_seed, int last_seed) {
  const Shop shop;
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
  const Shop shop;
  const Words run_of = cuda + Words{"teacher.model_args.dtype=bf16", "max_steps=2", "eval_steps=0"};
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

namespace {

struct GridCase {
  std::string name;
  Words overrides;
  int ranks;
};

const std::vector<GridCase> small_grids = {{"tp2", tp(2), 4}, {"pp2", pp(2), 4}, {"dp2", accumulation(1), 4}};
const std::vector<GridCase> large_grids = {
    {"sequence-parallel", tp(2) + pp(2) + accumulation(1) + strategy("sequence_parallel=true"), 16},
    {"whole-optimizer", tp(2) + pp(2) + accumulation(1) + strategy("use_distributed_optimizer=false"), 16},
    {"padded", tp(2) + strategy("sequence_parallel=true") + Words{"student.use_sequence_packing=false"}, 4},
    {"messages", tp(2) + pp(2) + Words{"logits_transfer_backend=nccl-only"}, 8},
    {"hidden", pp(2) + Words{"teacher_payload=hidden"}, 4}};

void train_grid(const Shop& shop, const std::string& name, const GridCase& grid, const Words& all, int order = 1) {
  train(shop, name, cuda + all + grid.overrides, grid.ranks, Words{"VIRTUAL_GPU_DEVICES=16"} + seed(order));
}

void check_grids(const std::vector<GridCase>& grids, const Words& all = {}, double tolerance = 1e-5) {
  const Shop shop({.teacher_layers = 2, .student_layers = 2});
  train(shop, "cpu", cpu + all, 0);
  for (const GridCase& grid : grids) {
    CAPTURE(grid.name);
    train_grid(shop, grid.name, grid, all);
    check_like(shop, grid.name, "cpu", tolerance);
  }
}

}  // namespace

TEST_CASE("a grid of GPUs is the run on one CPU", "[e2e]") { check_grids(small_grids); }
TEST_CASE("larger grids of GPUs are the run on one CPU", "[.][full]") { check_grids(large_grids); }

TEST_CASE("grids in twenty orders of streams are the run on one CPU, with the same bits in each", "[.][full]") {
  const Shop shop({.teacher_layers = 2, .student_layers = 2});
  train(shop, "cpu", cpu, 0);
  std::vector<GridCase> grids = small_grids;
  grids.insert(grids.end(), large_grids.begin(), large_grids.end());
  for (int order = 1; order <= 20; ++order)
    for (const GridCase& grid : grids) {
      CAPTURE(order, grid.name);
      const std::string name = grid.name + std::to_string(order), first = grid.name + "1";
      train_grid(shop, name, grid, {}, order);
      check_like(shop, name, "cpu");
      CHECK(shop.losses(name) == shop.losses(first));
      CHECK(shop.weights(name) == shop.weights(first));
    }
}

// Rounding of bf16 is 2⁻⁸ of a number; loss and norm are sums of many whose errors are independent.
TEST_CASE("grids of GPUs in bf16 with hidden states are the run on one CPU", "[.][full]") {
  check_grids({{"tp2", tp(2), 4}, {"pp2", pp(2), 4}, {"all", tp(2) + pp(2) + accumulation(1), 16}},
              {"student.model_args.dtype=bf16", "teacher.model_args.dtype=bf16", "teacher_payload=hidden"}, 4e-3);
}

// A stage that expected a gradient before its first forward would wait for a stage that waits for that forward.
TEST_CASE("a pipeline gets going where the first launch of a kernel waits for all that was begun", "[e2e]") {
  const Shop shop({.teacher_layers = 2, .student_layers = 2});
  const Words alone = {"distill_loss_weight=0", "max_steps=1", "eval_steps=0"};
  train(shop, "cpu", cpu + alone, 0);
  train(shop, "stages", cuda + pp(2) + alone, 2, {"VIRTUAL_GPU_LAZY_LOADING=1"});
  check_like(shop, "stages", "cpu");
}

TEST_CASE("a run on GPUs resumes bit for bit", "[e2e]") {
  const Shop shop;
  const Words saving = cuda + Words{"save_steps=1", "max_steps=2"};
  train(shop, "whole", saving, 2);
  for (const std::string folder : {"", "logs/"})
    fs::copy(shop.path(folder + "whole"), shop.path(folder + "again"), fs::copy_options::recursive);
  fs::remove_all(shop.path("again/checkpoints/step-000002"));
  fs::remove_all(shop.path("again/export"));
  train(shop, "again", saving + Words{"resume_from_checkpoint=true"}, 2);
  CHECK(shop.losses("again") == shop.losses("whole"));
  CHECK(shop.weights("again") == shop.weights("whole"));
}

TEST_CASE("what is wrong with the GPUs is one message with code 2, and auto does without", "[e2e]") {
  const Shop shop;
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
       2},
      {"translation",
       "the NVIDIA driver is for CUDA 13.0 and this program for CUDA 13.1, which has no machine code for GPU 0, "
       "Virtual "
       "H100 80GB HBM3, of compute capability 10.3: install a newer driver, or build with "
       "-DCMAKE_CUDA_ARCHITECTURES=103",
       {"VIRTUAL_GPU_RUNTIME=13010", "VIRTUAL_GPU_CAPABILITY=103"},
       0},
      {"exclusive",
       "device: cuda: ranks 0 and 1 would share GPU 0 of node 0, whose compute mode is Exclusive_Process: expected a "
       "GPU for each rank",
       {"VIRTUAL_GPU_COMPUTE_MODE=3", "VIRTUAL_GPU_DEVICES=1"},
       2},
      {"prohibited",
       "GPU 0, Virtual H100 80GB HBM3, takes no process: its compute mode is Prohibited; nvidia-smi -c DEFAULT changes "
       "that; CUDA_VISIBLE_DEVICES can leave it out",
       {"VIRTUAL_GPU_COMPUTE_MODE=2"},
       0}};
  for (const Case& c : cases) {
    CAPTURE(c.name);
    const auto result = run(shop, c.name, cuda, c.ranks, c.environment);
    INFO(result.output);
    CHECK(result.code == 2);
    CHECK(occurrences(result.output, c.message) == 1);
    CHECK_FALSE(fs::exists(shop.path(c.name + "/checkpoints")));
  }
  // An older driver of the same major version runs machine code; two ranks have an exclusive GPU each.
  train(shop, "well", {"max_steps=1", "device=cuda"}, 2, {"VIRTUAL_GPU_RUNTIME=13010", "VIRTUAL_GPU_COMPUTE_MODE=3"});
  const auto automatic = run(shop, "auto", {"max_steps=1"}, 2, {"CUDA_VISIBLE_DEVICES="});
  INFO(automatic.output);
  CHECK(automatic.code == 0);
  CHECK(occurrences(automatic.output, "device: cpu (no GPU is visible") == 1);
}

TEST_CASE("too little GPU memory says for what, how much was asked and what is free", "[e2e]") {
  const Shop shop;
  const auto result = run(shop, "full", cuda, 0, {"VIRTUAL_GPU_MEMORY=1"});
  INFO(result.output);
  CHECK(result.code == 2);
  CHECK(occurrences(result.output, "out of memory") == 1);
  CHECK_THAT(result.output, Contains("the student's model") && Contains(" bytes asked for, ") && Contains(" free"));
}

namespace {

// A checkpoint after each of two steps.
const Words saving_run = cuda + Words{"save_steps=1", "max_steps=2", "eval_steps=2"};

// What every rank runs as `words` say is run by `shell`, a script that ends with the program as "$@" and knows RANK.
Words through_shell(Words words, const std::string& shell) {
  const Words before = {"sh", "-c", "RANK=${OMPI_COMM_WORLD_RANK:-0}; " + shell + " exec \"$@\"", "sh"};
  words.insert(std::find(words.begin(), words.end(), program()), before.begin(), before.end());
  return words;
}

// How often each rank makes each call in a run of `ranks` ranks that succeeds.
std::vector<std::map<std::string, long>> calls_of(const Workshop& shop, const Words& overrides, int ranks) {
  const std::string file = shop.path("calls");
  for (const std::string folder : {"counted", "logs/counted"}) fs::remove_all(shop.path(folder));
  const auto result =
      Process(through_shell(command(shop, "counted", overrides, ranks), "export VIRTUAL_GPU_CALLS=" + file + "-$RANK;"))
          .wait();
  INFO(result.output);
  REQUIRE(result.code == 0);
  std::vector<std::map<std::string, long>> all(std::size_t(std::max(ranks, 1)));
  for (std::size_t rank = 0; rank < all.size(); ++rank) {
    std::ifstream counts(file + "-" + std::to_string(rank));
    std::string call;
    for (long count = 0; counts >> call >> count;) all[rank][call] = count;
    fs::remove(file + "-" + std::to_string(rank));
  }
  return all;
}

// A run in which the `count`th call of this name fails on one rank. It ends by itself, with one message, and what it
// saved is whole. One rank alone leaves nothing behind on the device, unless that is lost: the virtual GPU looks when
// the process ends, but not when MPI_Abort ends it, as it does several ranks.
void check_failure(const Workshop& shop, const Words& overrides, const std::string& call, long count, int failing_rank,
                   int ranks, const std::string& error = "cudaErrorInvalidValue") {
  CAPTURE(call, count, failing_rank, ranks);
  for (const std::string folder : {"failing", "logs/failing"}) fs::remove_all(shop.path(folder));
  const std::string plan = "VIRTUAL_GPU_FAIL=" + call + ":" + std::to_string(count) + ":" + error;
  const Words words = through_shell(command(shop, "failing", overrides, ranks),
                                    "test $RANK != " + std::to_string(failing_rank) + " || export " + plan + ";");
  const auto result = Process(Words{"timeout", "120", "env"} + words).wait();
  INFO(result.output);
  CHECK((result.code == 1 || result.code == 2));
  CHECK(occurrences(result.output, "distill: ") == 1);
  CHECK(occurrences(result.output, "virtual GPU: ") == 0);
  const std::string saved = shop.path("failing/checkpoints");
  const auto is_whole = [](const fs::path& entry) { return entry.filename().string().starts_with("step-"); };
  if (!fs::exists(saved) || std::none_of(fs::directory_iterator(saved), {}, is_whole)) return;
  const auto inspected = Process(shop.command({"inspect", shop.path("failing")})).wait();
  INFO(inspected.output);
  CHECK(inspected.code == 0);
}

// Calls that give back what is no longer wanted, or wait before that: nothing depends on them, and a destructor cannot
// report.
bool gives_back(const std::string& call) {
  for (const char* part : {"Free", "Destroy", "Close", "StreamSynchronize", "GetLastError", "Abort", "Finalize", "*"})
    if (call.find(part) != std::string::npos) return true;
  return false;
}

void check_every_call(const Workshop& shop, const Words& overrides, int ranks, const std::set<int>& failing_ranks) {
  const auto calls = calls_of(shop, overrides, ranks);
  for (const int rank : failing_ranks)
    for (const auto& [call, count] : calls[std::size_t(rank)]) {
      if (gives_back(call) || call.starts_with("cudaIpc")) continue;  // without those of Ipc a run goes on
      for (const long n : std::set<long>{1, (count + 1) / 2, count})
        check_failure(shop, overrides, call, n, rank, ranks);
    }
}

}  // namespace

TEST_CASE("where GPUs are closed to other processes one warning says so, and the run has the same bits", "[e2e]") {
  const Shop shop;
  const Words run_of = cuda + Words{"max_steps=2", "eval_steps=0"};
  train(shop, "one", run_of, 0);
  const auto fails = [](const std::string& rank, const std::string& call) {
    return "test $RANK != " + rank + " || export VIRTUAL_GPU_FAIL=" + call + ":1:cudaErrorInvalidValue;";
  };
  struct Case {
    std::string name, call, shell;
  };
  for (const Case& c : std::vector<Case>{
           {"hidden", "cudaIpcOpenMemHandle", "export VIRTUAL_GPU_ISOLATED=1 CUDA_VISIBLE_DEVICES=$RANK;"},
           {"memory", "cudaIpcGetMemHandle", fails("1", "cudaIpcGetMemHandle")},
           {"events", "cudaIpcOpenEventHandle", fails("1", "cudaIpcOpenEventHandle")}}) {
    const auto result = Process(through_shell(command(shop, c.name, run_of, 2), c.shell)).wait();
    INFO(result.output);
    CHECK(result.code == 0);
    CHECK(occurrences(result.output, "warning: ") == 1);
    CHECK_THAT(result.output,
               Contains("(" + c.call + ": cudaErrorInvalidValue (invalid argument)): the logits are copied"));
    CHECK(shop.losses(c.name) == shop.losses("one"));
    CHECK(shop.weights(c.name) == shop.weights("one"));
  }
}

TEST_CASE("a GPU that is lost ends the run with one message, and the newest checkpoint is whole", "[e2e]") {
  const Shop shop;
  const auto calls = calls_of(shop, saving_run, 0)[0];
  // In the first step and behind the first checkpoint.
  const long launches = calls.at("cudaLaunchKernelExC") * 3 / 4;
  const std::string plan = "VIRTUAL_GPU_FAIL=cudaLaunchKernelExC:" + std::to_string(launches);
  const auto lost = run(shop, "lost", saving_run, 0, {plan + ":cudaErrorECCUncorrectable"});
  INFO(lost.output);
  CHECK(lost.code == 1);
  CHECK(occurrences(lost.output, "cudaErrorECCUncorrectable") == 1);
  CHECK(fs::exists(shop.path("lost/checkpoints/step-000001")));
  const auto resumed = run(shop, "lost", saving_run + Words{"resume_from_checkpoint=true"}, 0);
  INFO(resumed.output);
  CHECK(resumed.code == 0);
  CHECK_THAT(resumed.output, Contains("resumed from") && !Contains("passed over"));
}

TEST_CASE("a call that fails ends the run with one message, nothing hangs, and what was saved is whole", "[e2e]") {
  const Shop shop;
  const auto one = calls_of(shop, saving_run, 0)[0];
  for (const char* call : {"cudaStreamCreateWithFlags", "cudaMalloc", "cublasLtMatmul", "cudaLaunchKernelExC"})
    check_failure(shop, saving_run, call, (one.at(call) + 1) / 2, 0, 0);
  check_failure(shop, saving_run, "cudaIpcOpenMemHandle", 1, 0, 2, "cudaErrorECCUncorrectable");
  const auto two = calls_of(shop, saving_run, 2);
  // Its student sees a channel that was closed, or a process that is gone, and leaves it to the teacher to say why.
  check_failure(shop, saving_run, "cudaLaunchKernelExC", two[1].at("cudaLaunchKernelExC") / 2, 1, 2);
  check_failure(shop, saving_run, "cudaMemcpyAsync", two[1].at("cudaMemcpyAsync"), 1, 2);
  check_failure(shop, saving_run, "cudaMemcpyAsync", two[0].at("cudaMemcpyAsync"), 0, 2);  // after the first checkpoint
  CHECK(fs::exists(shop.path("failing/checkpoints/step-000001")));
}

TEST_CASE("a GPU of a grid that is lost ends all ranks", "[e2e]") {
  const Shop shop({.teacher_layers = 2, .student_layers = 2});
  const Words grid = saving_run + tp(2);
  const auto calls = calls_of(shop, grid, 4);
  check_failure(shop, grid, "cudaLaunchKernelExC", calls[1].at("cudaLaunchKernelExC") * 3 / 4, 1, 4,
                "cudaErrorECCUncorrectable");
  CHECK(fs::exists(shop.path("failing/checkpoints/step-000001")));
  // NCCL says it where it is next asked, and not where the other rank went.
  check_failure(shop, grid, "ncclAllReduce", calls[0].at("ncclAllReduce") / 2, 0, 4, "1");
  // While the first rank waits for this one's part of the student that is exported.
  check_failure(shop, grid, "cudaMalloc", calls[1].at("cudaMalloc"), 1, 4);
}

TEST_CASE("a rank that stops while others wait for it on their GPUs is noticed", "[e2e]") {
  const Shop shop({.teacher_layers = 2, .student_layers = 2});
  const int rank = GENERATE(1, 2);  // a student and a teacher
  const Words endless = {"max_steps=100000", "eval_steps=0", "peer_dead_after=1s", "peer_timeout=10m"};
  Process run(command(shop, "silent", cuda + tp(2) + endless, 4));
  const fs::path csv = shop.path("logs/silent/metrics.csv");
  for (int i = 0; i < 6000 && !(fs::exists(csv) && shop.losses("silent").size() > 1); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  const pid_t process = run.child_with("OMPI_COMM_WORLD_RANK=" + std::to_string(rank));
  REQUIRE(process > 0);
  REQUIRE(kill(process, SIGSTOP) == 0);
  const auto result = run.wait();
  INFO(result.output);
  CHECK(result.code == 3);
  CHECK_THAT(result.output, Contains("rank " + std::to_string(rank) + " on ") && Contains("sign of life"));
}

TEST_CASE("every call of the start and of a step fails once", "[.][full]") {
  const Shop shop;
  check_every_call(shop, saving_run, 0, {0});
  check_every_call(shop, saving_run, 2, {0, 1});
}

TEST_CASE("every call of a grid fails once", "[.][full]") {
  const Shop shop({.teacher_layers = 2, .student_layers = 2});
  check_every_call(shop, saving_run + tp(2) + pp(2), 8, {0, 3, 7});
}

// Bytes per supervised position: columns of the shard, or hidden size, times two in bf16. The real vocabulary of 4080
// ids is 4096 columns, on two ranks 2048 each.
TEST_CASE("no byte travels between GPUs that need not", "[e2e]") {
  const Shop shop;
  const auto bytes_per_position = [&](const std::string& name, const Words& overrides, int ranks) {
    train(shop, name, cuda + Words{"max_steps=1", "eval_steps=0", "teacher.model_args.dtype=bf16"} + overrides, ranks);
    return numbers(shop, name, "system/channel_bytes")[0] / numbers(shop, name, "system/supervised")[0];
  };
  CHECK(bytes_per_position("logits", {"teacher_payload=logits"}, 2) == 4096 * 2);
  CHECK(bytes_per_position("cut", Words{"teacher_payload=logits"} + tp(2), 4) == 2 * 2048 * 2);
  CHECK(bytes_per_position("hidden", {"teacher_payload=hidden"}, 2) == 32 * 2);
}

TEST_CASE("check shows the GPU of every rank", "[e2e]") {
  const Shop shop;
  const Words check = {"check", "--config", shop.path("run.yaml")};
  const auto result = Process(shop.command(check, 2)).wait();  // device: auto
  INFO(result.output);
  CHECK(result.code == 0);
  CHECK_THAT(result.output, Contains("0 (Virtual H100 80GB HBM3, 4 GiB, 0000:10:00.0)") &&
                                Contains("1 (Virtual H100 80GB HBM3, 4 GiB, 0000:11:00.0)"));
  // The ring is in GPU memory, however little shared memory there is.
  CHECK_THAT(result.output, Contains(" of hidden states in GPU memory per student"));
  const auto planned =
      Process(shop.command(check + cuda + Words{"--ranks", "2", "logits_ring_slots=1000000000"})).wait();
  INFO(planned.output);
  CHECK_THAT(planned.output, Contains(" in GPU memory per student") && !Contains("/dev/shm"));
}
