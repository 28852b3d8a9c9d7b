// Kill -9 of any rank at any moment, again and again: once the run comes to its end, it is the run that was never
// killed, although it went on from checkpoints. Tag [full] is the long campaign, run by hand. DISTILL_KILL_SEED repeats
// the moments of a run of this test as far as the machine does.
#include <catch2/catch.hpp>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <random>
#include <thread>

#include "io/csv_sink.h"
#include "io/hdf5_sink.h"
#include "test/support/workshop.h"

using namespace distill::test;
namespace fs = std::filesystem;

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

struct Layout {
  std::string name;
  int ranks;  // 0: without mpirun
  Words overrides;
};

const Layout one{"one", 0, {}}, two{"two", 2, {}},
    data_parallel{"dp2", 4, {"student.training_args.gradient_accumulation_steps=1"}}, pipeline{"pp2", 4, pp(2)},
    tensor_parallel{"tp2", 4, tp(2)};

unsigned seed() {
  const char* given = std::getenv("DISTILL_KILL_SEED");
  const unsigned value = given ? unsigned(std::strtoul(given, nullptr, 10)) : std::random_device{}();
  std::cout << "DISTILL_KILL_SEED=" << value << std::endl;
  return value;
}

// One layout of ranks: its run without a kill, and one that is killed as often as asked.
class Victim {
 public:
  Victim(const Workshop& shop, Layout layout, const std::string& dtype) : shop_(shop), layout_(std::move(layout)) {
    layout_.name += "-" + dtype;
    layout_.overrides = layout_.overrides + Words{"max_steps=20",
                                                  "save_steps=3",
                                                  "eval_steps=4",
                                                  "max_ckpt_to_keep=2",
                                                  "resume_from_checkpoint=true",
                                                  "student.model_args.dtype=" + dtype};
    const auto start = Clock::now();
    Process run(shop_.training(name("whole"), layout_.overrides, layout_.ranks));
    wait_for_checkpoint(run, "whole");
    const auto first_checkpoint = Clock::now();
    const auto whole = run.wait();
    whole_takes_ = Clock::now() - start;
    rest_takes_ = Clock::now() - first_checkpoint;
    INFO(whole.output);
    REQUIRE(whole.code == 0);
  }

  // Kills until that many hit, every other one only once there is a checkpoint, and so the last one. A run that comes
  // to its end before is checked and begun anew, the last one brought to it.
  void survive(int kills, std::mt19937& random) {
    REQUIRE(kills % 2 == 0);
    forget();
    resumes_ = 0;
    for (int hits = 0, starts = 0; hits < kills; ++starts) {
      REQUIRE(starts < 20 * kills);
      const bool waits = hits % 2 == 1;
      const Seconds most = waits ? rest_takes_ / 2 : whole_takes_,
                    moment = most * std::uniform_real_distribution<>(0, 1)(random);
      const int rank = layout_.ranks == 0 ? 0 : std::uniform_int_distribution<>(0, layout_.ranks - 1)(random);
      if (is_killed(rank, moment, waits)) {
        ++hits;
      } else {
        check_same();
        forget();
      }
    }
    const bool goes_on = has_checkpoint("killed");
    const auto last = run("killed");
    INFO(last.output);
    REQUIRE(last.code == 0);
    count_resume(last.output, goes_on);
    check_same();
    std::cout << layout_.name << ": " << resumes_ << " of " << kills << " kills were resumed from a checkpoint"
              << std::endl;
    CHECK(resumes_ > 0);
  }

 private:
  void forget() const {
    fs::remove_all(shop_.path(name("killed")));
    fs::remove_all(shop_.path("logs/" + name("killed")));
  }
  std::string name(const std::string& kind) const { return layout_.name + "-" + kind; }
  Process::Result run(const std::string& kind) const {
    return shop_.train(name(kind), layout_.overrides, layout_.ranks);
  }

  bool has_checkpoint(const std::string& kind) const {
    std::error_code none;
    for (const auto& entry : fs::directory_iterator(shop_.path(name(kind) + "/checkpoints"), none))
      if (fs::exists(entry.path() / "manifest.json") && !entry.path().filename().string().starts_with('.')) return true;
    return false;
  }
  void wait_for_checkpoint(const Process& run, const std::string& kind) const {
    while (!has_checkpoint(kind) && run.is_running()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  // A start after a kill.
  void count_resume(const std::string& output, bool goes_on) {
    const std::string words = " after step ";
    const std::size_t from = output.find("resumed from "),
                      at = from == std::string::npos ? from : output.find(words, from);
    if (at != std::string::npos && std::atoi(output.c_str() + at + words.size()) > 0) ++resumes_;
    if (goes_on) CHECK_THAT(output, !Catch::Contains("starting at step 0"));
  }

  // False where the run was over before. The moment begins with the run or, if it `waits`, with its first checkpoint.
  bool is_killed(int rank, Seconds moment, bool waits) {
    const bool goes_on = has_checkpoint("killed");
    Process run(shop_.training(name("killed"), layout_.overrides, layout_.ranks));
    if (waits) wait_for_checkpoint(run, "killed");
    std::this_thread::sleep_for(moment);
    bool is_sent = true;
    if (layout_.ranks == 0) {
      run.signal(SIGKILL);
    } else {
      const std::string variable = "OMPI_COMM_WORLD_RANK=" + std::to_string(rank);
      pid_t process = 0;
      while ((process = run.child_with(variable)) == 0 && run.is_running())
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      is_sent = process != 0 && kill(process, SIGKILL) == 0;
    }
    end_hung_mpirun(run);
    const auto result = run.wait();
    std::cout << layout_.name << ": rank " << rank << " after " << moment.count() << " s: code " << result.code
              << std::endl;
    INFO(result.output);
    // A resume that a kill made impossible would be bad input; what nobody killed ends well.
    CHECK(result.code != 2);
    if (!is_sent) CHECK(result.code == 0);
    count_resume(result.output, goes_on);
    return result.code != 0;
  }

  // mpirun of Open MPI 4.1.4 now and then stays in its own clean-up for ever (a lock in PMIx_server_finalize) when all
  // ranks have ended.
  static void end_hung_mpirun(const Process& run) {
    auto last_seen = Clock::now();
    while (run.is_running()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      if (run.has_children()) last_seen = Clock::now();
      if (Clock::now() - last_seen < std::chrono::seconds(30)) continue;
      std::cout << "mpirun hangs after its ranks have ended" << std::endl;
      run.signal(SIGKILL);
      return;
    }
  }

  void check_same() const {
    CAPTURE(layout_.name);
    CHECK(shop_.weights(name("killed")) == shop_.weights(name("whole")));
    const auto csv = [&](const std::string& kind) { return shop_.path("logs/" + name(kind) + "/metrics.csv"); };
    for (const char* metric : {"step", "train/loss", "train/train_distill_loss", "student/grad_norm", "student/lr",
                               "student/val_loss", "system/samples", "system/tokens", "student/skipped_steps"}) {
      CAPTURE(metric);
      CHECK(column(csv("killed"), metric).size() == 20);
      CHECK(column(csv("killed"), metric) == column(csv("whole"), metric));
    }
    const auto lines = distill::read_csv_metrics(csv("killed")),
               points = distill::read_hdf5_metrics(shop_.path("logs/" + name("killed") + "/metrics.h5"));
    REQUIRE(lines.size() == points.size());
    for (std::size_t i = 0; i < lines.size(); ++i) {
      CAPTURE(lines[i].name);
      REQUIRE(lines[i].points.size() == points[i].points.size());
      for (std::size_t j = 0; j < lines[i].points.size(); ++j)
        CHECK(lines[i].points[j].value == points[i].points[j].value);
    }
  }

  const Workshop& shop_;
  Layout layout_;
  Seconds whole_takes_{}, rest_takes_{};  // from the start, from the first checkpoint
  int resumes_ = 0;                       // starts that went on from a checkpoint
};

}  // namespace

TEST_CASE("a dozen kills of any rank at any moment change nothing", "[e2e]") {
  const Workshop shop({.student_layers = 2});
  shop.make_teacher();
  std::mt19937 random(seed());
  for (const Layout& layout : {one, two, data_parallel}) Victim(shop, layout, "fp32").survive(4, random);
}

// About ten minutes on two cores.
TEST_CASE("a hundred kills", "[full]") {
  const Workshop shop({.student_layers = 2});
  shop.make_teacher();
  std::mt19937 random(seed());
  for (const std::string dtype : {"bf16", "fp32"})
    for (const Layout& layout : {one, two, data_parallel, pipeline, tensor_parallel}) {
      Victim victim(shop, layout, dtype);
      for (int round = 0; round < 2; ++round) victim.survive(6, random);
    }
}
