// The program on grids under mpirun: the same run as on one rank, whatever travels between teacher and student, resumed
// on the same and on another grid, and stopped by a signal to any of its ranks. Tags: [host] computes nothing, so that
// the device makes no difference; [few] is run on the virtual GPU each time, the others by hand (test/README.md).
#include <catch2/catch.hpp>
#include <chrono>
#include <cmath>
#include <thread>

#include "io/safetensors.h"
#include "test/support/workshop.h"

using namespace distill::test;
namespace fs = std::filesystem;

namespace {

// A global batch of 8 as four micro-batches of two on one rank.
const Words base = {"max_steps=10",
                    "save_steps=0",
                    "eval_steps=5",
                    "student.training_args.per_device_train_batch_size=2",
                    "student.training_args.gradient_accumulation_steps=4",
                    "student.infer_batch_size=3"};

std::vector<float> weights(const Workshop& shop, const std::string& name) {
  const distill::SafetensorsFile file(shop.path(name + "/export/model.safetensors"));
  std::vector<float> all;
  for (const auto& [_, tensor] : file.tensors()) {
    const std::size_t n = tensor.bytes.size() / sizeof(float);
    all.resize(all.size() + n);
    std::copy_n(tensor.bytes.data(), n * sizeof(float), reinterpret_cast<char*>(all.data() + all.size() - n));
  }
  return all;
}

// As design section 10 wants it: losses and norms to 1e-5, weights to 1e-5 of their norm.
void check_like(const Workshop& shop, const std::string& name, const std::string& one) {
  for (const char* metric : {"train/loss", "student/grad_norm", "student/val_loss", "student/val_distill_loss",
                             "student/val_perplexity", "student/val_top1_agreement"}) {
    const auto a = column(shop.path("logs/" + one + "/metrics.csv"), metric),
               b = column(shop.path("logs/" + name + "/metrics.csv"), metric);
    REQUIRE(a.size() == b.size());
    for (std::size_t i = 0; i < a.size(); ++i) {
      CAPTURE(metric, i);
      REQUIRE(a[i].empty() == b[i].empty());
      if (!a[i].empty()) CHECK(std::stod(b[i]) == Approx(std::stod(a[i])).epsilon(1e-5));
    }
  }
  const auto a = weights(shop, one), b = weights(shop, name);
  REQUIRE(a.size() == b.size());
  double off = 0, squares = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    off += std::pow(double(a[i]) - b[i], 2);
    squares += double(a[i]) * a[i];
  }
  CHECK(std::sqrt(off) <= 1e-5 * std::sqrt(squares));
}

void train(const Workshop& shop, const std::string& name, const Words& overrides, int ranks) {
  const auto result = shop.train(name, base + overrides, ranks);
  INFO(result.output);
  REQUIRE(result.code == 0);
}

}  // namespace

TEST_CASE("a run on any grid is the run on one rank", "[e2e]") {
  const Workshop shop({.teacher_layers = 4, .student_layers = 4});
  shop.make_teacher();
  train(shop, "one", {"device=cpu"}, 0);
  struct Case {
    std::string name;
    int ranks;
    Words overrides;
  };
  const std::vector<Case> cases = {
      {"tp2", 4, tp(2)},
      {"tp4-sp", 8, tp(4) + strategy("sequence_parallel=true") + Words{"student.use_sequence_packing=false"}},
      {"pp3", 6, pp(3) + strategy("recompute_granularity=selective")},
      {"pp4-hidden", 8, pp(4) + Words{"teacher_payload=hidden"}},
      {"tp2-pp2-messages", 8, tp(2) + pp(2) + Words{"logits_transfer_backend=nccl-only"}},
      {"dp2", 4, accumulation(2)},
      {"dp4-whole", 8, accumulation(1) + strategy("use_distributed_optimizer=false")},
      {"all", 16, tp(2) + pp(2) + accumulation(2) + strategy("sequence_parallel=true")},
  };
  for (const Case& c : cases) {
    CAPTURE(c.name);
    train(shop, c.name, c.overrides, c.ranks);
    check_like(shop, c.name, "one");
  }
}

TEST_CASE("untied models on a grid without a teacher", "[e2e][sanitized][few]") {
  const Workshop shop({.student_layers = 3, .tied = false});
  const Words plain = {"distill_loss_weight=0"};
  train(shop, "one", plain + Words{"device=cpu"}, 0);
  train(shop, "grid", plain + tp(2) + pp(3), 6);
  check_like(shop, "grid", "one");
}

TEST_CASE("padding gives the numbers of packing", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  train(shop, "packed", {}, 2);
  train(shop, "padded", {"student.use_sequence_packing=false"}, 2);
  check_like(shop, "padded", "packed");
}

TEST_CASE("logits and hidden states, by memory and by messages, give the same bits", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  const Words precision = {"teacher.model_args.dtype=bf16", "logits_topk=5"};
  train(shop, "one", precision, 0);
  for (const std::string payload : {"logits", "hidden", "auto"})
    for (const std::string transfer : {"ipc+nccl", "nccl-only"}) {
      const std::string name = payload + "-" + transfer;
      CAPTURE(name);
      train(shop, name, precision + Words{"teacher_payload=" + payload, "logits_transfer_backend=" + transfer}, 2);
      CHECK(shop.losses(name) == shop.losses("one"));
      CHECK(shop.weights(name) == shop.weights("one"));
    }
}

// Bytes per supervised position: columns of the shard, or hidden size, times two in bf16. The real vocabulary of 4080
// ids is 4096 columns, on two ranks 2048 each.
TEST_CASE("no byte travels that need not", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  const auto bytes_per_position = [&](const std::string& name, const Words& overrides, int ranks) {
    const auto result = shop.train(name, Words{"max_steps=1", "teacher.model_args.dtype=bf16"} + overrides, ranks);
    INFO(result.output);
    REQUIRE(result.code == 0);
    const auto metric = [&](const char* key) {
      return std::stod(column(shop.path("logs/" + name + "/metrics.csv"), key).front());
    };
    return metric("system/channel_bytes") / metric("system/supervised");
  };
  CHECK(bytes_per_position("logits", {"teacher_payload=logits"}, 2) == 4096 * 2);
  CHECK(bytes_per_position("cut", Words{"teacher_payload=logits"} + tp(2), 4) == 2 * 2048 * 2);
  CHECK(bytes_per_position("hidden", {"teacher_payload=hidden"}, 2) == 32 * 2);
  CHECK(bytes_per_position("messages", {"teacher_payload=logits", "logits_transfer_backend=nccl-only"}, 2) == 4096 * 2);
}

TEST_CASE("a grid resumes bit for bit, and another grid goes on within rounding", "[e2e][sanitized]") {
  const Workshop shop({.teacher_layers = 2, .student_layers = 2});
  shop.make_teacher();
  const Words grid = tp(2) + pp(2) + accumulation(2), half = {"save_steps=5", "max_steps=10"};
  const auto whole = shop.train("whole", base + grid + half, 16);
  INFO(whole.output);
  REQUIRE(whole.code == 0);
  const auto copy = [&](const std::string& name) {
    for (const std::string folder : {"", "logs/"})
      fs::copy(shop.path(folder + "whole"), shop.path(folder + name),
               fs::copy_options::recursive | fs::copy_options::copy_symlinks);
    fs::remove_all(shop.path(name + "/checkpoints/step-000010"));
    fs::remove_all(shop.path(name + "/export"));
  };
  copy("same");
  const auto same = shop.train("same", base + grid + half + Words{"resume_from_checkpoint=true"}, 16);
  INFO(same.output);
  REQUIRE(same.code == 0);
  CHECK(shop.losses("same") == shop.losses("whole"));
  CHECK(shop.weights("same") == shop.weights("whole"));
  for (const auto& [name, overrides, ranks] :
       {std::tuple<std::string, Words, int>{"one", {}, 0}, {"pp2", pp(2), 4}, {"dp4", accumulation(1), 8}}) {
    CAPTURE(name);
    copy(name);
    const auto other = shop.train(name, base + overrides + half + Words{"resume_from_checkpoint=true"}, ranks);
    INFO(other.output);
    REQUIRE(other.code == 0);
    CHECK_THAT(other.output, Catch::Contains("resumed from"));
    check_like(shop, name, "whole");
  }
}

TEST_CASE("a signal to any rank saves and leaves with 85", "[e2e]") {
  // A wide feed-forward layer: products whose kernels lay hands on the stack pointer while a signal comes in.
  const Workshop shop({.teacher_layers = 2, .student_layers = 2, .feed_forward = 2048});
  shop.make_teacher();
  const int rank = GENERATE(0, 1, 2, 3), number = GENERATE(SIGUSR1, SIGTERM);
  CAPTURE(rank, number);
  Process run(shop.training("stopped", Words{"max_steps=100000", "save_steps=0", "eval_steps=0"} + pp(2), 4));
  const fs::path csv = shop.path("logs/stopped/metrics.csv");
  for (int i = 0; i < 3000 && !(fs::exists(csv) && shop.losses("stopped").size() > 1); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  const pid_t process = run.child_with("OMPI_COMM_WORLD_RANK=" + std::to_string(rank));
  REQUIRE(process > 0);
  for (int i = 0; i < 20; ++i) kill(process, number);
  const auto result = run.wait();
  INFO(result.output);
  CHECK(result.code == 85);
  CHECK(occurrences(result.output, "stopped by a signal after step") == 1);
  CHECK_FALSE(fs::is_empty(shop.path("stopped/checkpoints")));
}

TEST_CASE("a run that is never finite ends with 4, said once", "[e2e][few]") {
  const int ranks = GENERATE(0, 2, 4);
  const Workshop shop;
  shop.make_teacher();
  const auto result = shop.train("wild",
                                 accumulation(1) + Words{"student.training_args.per_device_train_batch_size=2",
                                                         "student.training_args.learning_rate=1e30", "max_steps=60",
                                                         "save_steps=1", "student.training_args.warmup_steps=0"},
                                 ranks);
  INFO(result.output);
  CHECK(result.code == 4);
  CHECK(occurrences(result.output, "not finite in 5 steps in a row") == 1);
  CHECK_FALSE(fs::exists(shop.path("wild/finished")));
}

TEST_CASE("grids that do not fit the models are refused with those that do", "[e2e][host]") {
  const Workshop shop({.teacher_layers = 2, .student_layers = 4});
  shop.make_teacher();
  const auto refused = [&](const Words& overrides, const char* ranks, const std::string& message) {
    const auto result =
        Process(shop.command(Words{"check", "--config", shop.path("run.yaml"), "--ranks", ranks} + overrides)).wait();
    INFO(result.output);
    CHECK(result.code == 2);
    CHECK(occurrences(result.output, message) == 1);
  };
  refused(tp(3), "6",
          "tensor_model_parallel_size: the student's 4 attention heads are no multiple of tp_size 3; grids (tp×pp×dp) "
          "that fit these models and 6 ranks: 1×1×3");
  refused(pp(4), "8",
          "pipeline_model_parallel_size: the teacher's 2 layers are fewer than pp_size 4; grids (tp×pp×dp) that fit "
          "these models and 8 ranks: 1×1×4, 1×2×2, 2×1×2, 2×2×1, 4×1×1");
  refused({}, "3",
          "3 ranks cannot be split into as many students as teachers; distill_loss_weight: 0 trains "
          "without a teacher on any number; no grid fits 3 ranks, which are halved; grids (tp×pp×dp) that fit "
          "these models and 2 ranks: 1×1×1; 4 ranks: 1×1×2, 1×2×1, 2×1×1");
  refused(
      tp(4), "12",
      "12 ranks cannot be cut into groups of tp_size 4 for students and for teachers (a group stays inside a node): "
      "start 8 or 16 ranks; grids (tp×pp×dp) that fit these models and 12 ranks: 1×1×6, 2×1×3, 1×2×3");
  refused(Words{"distill_loss_weight=0"} + pp(2), "3",
          "grids (tp×pp×dp) that fit this model and 3 ranks: 1×1×3, 1×3×1");
}

TEST_CASE("check says what a slot of the ring holds, and when a node has too little shared memory", "[e2e][host]") {
  const Workshop shop;
  shop.make_teacher();
  const auto check = [&](const Words& overrides) {
    const auto result = Process(shop.command(Words{"check", "--config", shop.path("run.yaml"), "--ranks", "2",
                                                   "device=cpu", "logits_chunk=16", "logits_ring_slots=3"} +
                                             overrides))
                            .wait();
    INFO(result.output);
    CHECK(result.code == 0);
    return result.output;
  };
  // f32: 16 positions of 4096 columns, or of hidden size 32.
  const std::string logits = check({"teacher_payload=logits"}), hidden = check({"teacher_payload=hidden"});
  CHECK_THAT(logits, Catch::Contains("a ring of 3 × 256.00 KiB of logits in shared memory"));
  CHECK_THAT(hidden, Catch::Contains("a ring of 3 × 2.00 KiB of hidden states in shared memory"));
  CHECK_THAT(check({}), Catch::Contains("a ring of 3 × 256.00 KiB of logits or 2.00 KiB of hidden states in shared"));
  CHECK_THAT(logits + hidden, !Catch::Contains("warning:"));
  CHECK_THAT(check({"logits_ring_slots=1000000000", "teacher_payload=hidden"}),
             Catch::Contains(" for logits channels, /dev/shm has ") && Catch::Contains("lower logits_chunk"));
}
