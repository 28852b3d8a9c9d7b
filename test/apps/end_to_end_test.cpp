// The program as a user runs it: train, distil on one rank and on two, stop, be killed, resume, and be told what is
// wrong.
#include <sys/ptrace.h>

#include <catch2/catch.hpp>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "io/csv_sink.h"
#include "io/hdf5_sink.h"
#include "io/run_folder.h"
#include "test/support/workshop.h"

using namespace distill::test;
namespace fs = std::filesystem;

namespace {

// A folder in which this user may not make files: `own`, or for root, who may everywhere, one that is mounted
// read-only. And the reason. Empty where there is none.
std::pair<std::string, std::string> not_writable(const std::string& own) {
  fs::create_directory(own);
  fs::permissions(own, fs::perms::owner_read | fs::perms::owner_exec);
  for (const std::string& folder : {own, std::string("/sys"), std::string("/proc/sys")})
    if (fs::is_directory(folder) && access(folder.c_str(), W_OK) != 0) return {folder, std::strerror(errno)};
  return {};
}

}  // namespace

TEST_CASE("one rank and two ranks give the same bits", "[e2e][sanitized]") {
  const Workshop shop;
  shop.make_teacher();
  const std::string dtype = GENERATE("fp32", "bf16");
  const std::string precision = "student.model_args.dtype=" + dtype;
  const auto one = shop.train("one-" + dtype, {precision}), two = shop.train("two-" + dtype, {precision}, 2);
  INFO(one.output << two.output);
  REQUIRE(one.code == 0);
  REQUIRE(two.code == 0);
  CHECK(shop.losses("one-" + dtype).size() == 6);
  CHECK(shop.losses("one-" + dtype) == shop.losses("two-" + dtype));
  CHECK(shop.weights("one-" + dtype) == shop.weights("two-" + dtype));
  CHECK(fs::exists(shop.path("two-" + dtype + "/finished")));
  for (const char* metric :
       {"student/val_loss", "student/val_distill_loss", "student/val_perplexity", "student/val_top1_agreement"}) {
    const auto a = column(shop.path("logs/one-" + dtype + "/metrics.csv"), metric);
    CHECK(a[2] != "");
    CHECK(a == column(shop.path("logs/two-" + dtype + "/metrics.csv"), metric));
  }
  CHECK_THAT(two.output, Catch::Contains("where the time went"));
}

TEST_CASE("every objective runs through the program, whole vocabulary and top-k", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  for (const std::string objective :
       {"forward_kl", "reverse_kl", "adaptive_kl", "skewed_forward_kl", "skewed_reverse_kl", "js_divergence"})
    for (const std::string topk : {"logits_topk=0", "logits_topk=8"}) {
      const auto result = shop.train("objective", {"kd_objective=" + objective, topk, "logits_topk_mode=tail",
                                                   "max_steps=1", "save_steps=0", "validation.data_args.file_name=~"});
      INFO(objective << topk << result.output);
      CHECK(result.code == 0);
      fs::remove_all(shop.path("objective"));
    }
}

TEST_CASE("data parallel without a teacher: two ranks with half the batch each equal one rank", "[e2e]") {
  const Workshop shop;
  const std::vector<std::string> plain{"distill_loss_weight=0", "student.training_args.gradient_accumulation_steps=1"};
  auto half = plain;
  half.push_back("student.training_args.per_device_train_batch_size=2");
  const auto one = shop.train("one", plain), two = shop.train("two", half, 2);
  INFO(one.output << two.output);
  REQUIRE(one.code == 0);
  REQUIRE(two.code == 0);
  const auto a = shop.losses("one"), b = shop.losses("two");
  REQUIRE(a.size() == b.size());
  for (std::size_t i = 0; i < a.size(); ++i) CHECK(std::stod(a[i]) == Approx(std::stod(b[i])).epsilon(1e-5));
}

TEST_CASE("sequences spread by work over ranks and micro-batches give the same losses", "[e2e]") {
  const Workshop shop;
  const std::vector<std::string> plain{"distill_loss_weight=0", "student.training_args.per_device_train_batch_size=3"};
  auto balanced = plain;
  balanced.push_back("student.sequence_packing_args.algorithm=load_balance");
  const auto cut = shop.train("cut", plain, 2), dealt = shop.train("dealt", balanced, 2);
  INFO(cut.output << dealt.output);
  REQUIRE(cut.code == 0);
  REQUIRE(dealt.code == 0);
  CHECK_THAT(dealt.output, Catch::Contains("dealt to ranks by work"));
  const auto a = shop.losses("cut"), b = shop.losses("dealt");
  REQUIRE(a.size() == 6);
  REQUIRE(b.size() == 6);
  for (std::size_t i = 0; i < a.size(); ++i) CHECK(std::stod(a[i]) == Approx(std::stod(b[i])).epsilon(1e-5));
}

TEST_CASE("records encoded beforehand give the same run, and damage is said and mended", "[e2e][sanitized]") {
  const Workshop shop;
  shop.make_teacher();
  const auto run = [&](const std::string& command, std::vector<std::string> overrides = {}, int ranks = 0) {
    std::vector<std::string> arguments{command, "--config", shop.path("run.yaml")};
    arguments.insert(arguments.end(), overrides.begin(), overrides.end());
    const auto result = Process(shop.command(arguments, ranks)).wait();
    INFO(result.output);
    CHECK(result.code == 0);
    return result.output;
  };
  const auto files = [&] {
    std::vector<fs::path> found;
    for (const auto& entry : fs::directory_iterator(shop.path("encoded"))) found.push_back(entry.path());
    return found;
  };
  CHECK_THAT(run("check"), !Catch::Contains("from " + shop.path("")));
  CHECK_FALSE(fs::exists(shop.path("encoded")));
  REQUIRE(shop.train("before").code == 0);

  const std::string first = run("encode", {}, 2);
  CHECK(occurrences(first, "training: " + shop.path("encoded/")) == 1);
  CHECK_THAT(first, Catch::Contains("60 records") && Catch::Contains("10 records") && Catch::Contains(" tokens, "));
  REQUIRE(files().size() == 2);
  CHECK(occurrences(run("encode"), "is there already") == 2);
  CHECK(occurrences(run("check"), "; from " + shop.path("encoded/")) == 2);
  // Another setting is another file.
  CHECK(occurrences(run("check", {"sequence_length=60"}), "; from ") == 0);
  CHECK(occurrences(run("check", {"question_key=answer"}), "; from ") == 0);

  const auto after = shop.train("after", {}, 2);
  INFO(after.output);
  REQUIRE(after.code == 0);
  CHECK(occurrences(after.output, "; from ") == 2);
  CHECK(shop.losses("after") == shop.losses("before"));
  CHECK(shop.weights("after") == shop.weights("before"));

  for (const fs::path& file : files()) {
    std::string bytes = contents(file);
    bytes[bytes.size() / 2] = char(bytes[bytes.size() / 2] ^ 1);
    std::ofstream(file, std::ios::binary) << bytes;
  }
  const std::string damaged = run("check");
  CHECK(occurrences(damaged, "the records are encoded again") == 2);
  CHECK(occurrences(damaged, "; from ") == 0);
  CHECK(occurrences(run("encode"), "the records are encoded again") == 2);
  CHECK(occurrences(run("check"), "; from ") == 2);
}

TEST_CASE("a killed run resumes bit for bit", "[e2e][sanitized]") {
  const int ranks = GENERATE(0, 2);
  const Workshop shop;
  shop.make_teacher();
  const auto whole = shop.train("whole", {"max_steps=12"}, ranks);
  INFO(whole.output);
  REQUIRE(whole.code == 0);
  {
    Process run(shop.training("killed", {"max_steps=12"}, ranks));
    const fs::path checkpoint = shop.path("killed/checkpoints/step-000004");
    for (int i = 0; i < 3000 && !fs::exists(checkpoint); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    REQUIRE(fs::exists(checkpoint));
    run.signal_group(SIGKILL);
    CHECK(run.wait().code != 0);
  }
  const auto resumed = shop.train("killed", {"max_steps=12", "resume_from_checkpoint=true"}, ranks);
  INFO(resumed.output);
  REQUIRE(resumed.code == 0);
  CHECK_THAT(resumed.output, Catch::Contains("resum"));
  CHECK(shop.losses("killed") == shop.losses("whole"));
  CHECK(shop.weights("killed") == shop.weights("whole"));
  // metrics.h5 went through the kill and the resume as metrics.csv did; every start left an event file.
  const auto csv = distill::read_csv_metrics(shop.path("logs/killed/metrics.csv")),
             h5 = distill::read_hdf5_metrics(shop.path("logs/killed/metrics.h5"));
  REQUIRE(csv.size() == h5.size());
  for (std::size_t i = 0; i < csv.size(); ++i) {
    INFO(csv[i].name);
    CHECK(csv[i].name == h5[i].name);
    REQUIRE(csv[i].points.size() == h5[i].points.size());
    for (std::size_t j = 0; j < csv[i].points.size(); ++j) {
      CHECK(csv[i].points[j].step == h5[i].points[j].step);
      CHECK(csv[i].points[j].wall_time == h5[i].points[j].wall_time);
      CHECK(csv[i].points[j].value == h5[i].points[j].value);
    }
  }
  CHECK(csv[0].points.size() == 12);
  const fs::directory_iterator logs(shop.path("logs/killed"));
  CHECK(std::count_if(begin(logs), end(logs), [](const fs::directory_entry& entry) {
          return entry.path().filename().string().starts_with("events.out.tfevents.");
        }) == 2);
}

TEST_CASE("a signal saves, leaves with 85, and the same command goes on", "[e2e][sanitized]") {
  const int ranks = GENERATE(0, 2);
  const Workshop shop;
  shop.make_teacher();
  const std::vector<std::string> long_run{"max_steps=400", "save_steps=0", "eval_steps=0",
                                          "resume_from_checkpoint=true"};
  {
    Process run(shop.training("stopped", long_run, ranks));
    const fs::path csv = shop.path("logs/stopped/metrics.csv");
    for (int i = 0; i < 3000 && !(fs::exists(csv) && shop.losses("stopped").size() > 2); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    run.signal(SIGUSR1);
    const auto result = run.wait();
    INFO(result.output);
    CHECK(result.code == 85);
    CHECK_THAT(result.output, Catch::Contains("stopped by a signal after step"));
  }
  CHECK_FALSE(fs::exists(shop.path("stopped/finished")));
  const std::size_t done = shop.losses("stopped").size();
  auto rest = long_run;
  rest.front() = "max_steps=" + std::to_string(done + 2);
  const auto result = shop.train("stopped", rest, ranks);
  INFO(result.output);
  CHECK(result.code == 0);
  CHECK(shop.losses("stopped").size() == done + 2);
}

TEST_CASE("a time limit saves, leaves with 85, and the same command goes on", "[e2e]") {
  const int ranks = GENERATE(0, 2);
  const Workshop shop;
  shop.make_teacher();
  std::vector<std::string> limited{"max_steps=3", "save_steps=0", "eval_steps=0", "resume_from_checkpoint=true",
                                   "max_time=1ms"};
  for (int step = 1; step <= 2; ++step) {
    const auto result = shop.train("limited", limited, ranks);
    INFO(result.output);
    CHECK(result.code == 85);
    CHECK_THAT(result.output,
               Catch::Contains("stopped by the time limit (max_time) after step " + std::to_string(step) + " of 3"));
  }
  CHECK_FALSE(fs::exists(shop.path("limited/finished")));
  // The last step needs no permission to end.
  const auto result = shop.train("limited", limited, ranks);
  INFO(result.output);
  CHECK(result.code == 0);
  CHECK(shop.losses("limited").size() == 3);
  limited.back() = "max_time=10min";
  CHECK(shop.train("unlimited", limited, ranks).code == 0);
  CHECK(shop.losses("limited") == shop.losses("unlimited"));
}

TEST_CASE("what is wrong is said once, with exit code 2, and nothing is started", "[e2e][sanitized]") {
  const Workshop shop;
  shop.make_teacher();
  fs::copy(shop.path("student"), shop.path("no-template"));
  shop.write("no-template/tokenizer_config.json", "{}");
  fs::copy(shop.path("student"), shop.path("few-ids"));
  std::string config = contents(shop.path("student/config.json"));
  config.replace(config.find("4096"), 4, "100");
  shop.write("few-ids/config.json", config);
  const auto refused = [&](std::vector<std::string> overrides, const std::string& message, int ranks = 0) {
    const auto result = shop.train("wrong", std::move(overrides), ranks);
    INFO(result.output);
    CHECK(result.code == 2);
    CHECK(occurrences(result.output, message) == 1);
    CHECK_FALSE(fs::exists(shop.path("wrong")));
  };
  refused({"kd_objectiv=reverse_kl"}, "did you mean 'kd_objective'");
  const std::string nowhere = shop.path("nowhere");
  refused({"student_pretrain=" + nowhere}, "': student_pretrain: " + nowhere + ": no such folder");
  refused({"student.model_args.model_name_or_path=" + nowhere},
          "': student.model_args.model_name_or_path: " + nowhere + ": no such folder");
  refused({"teacher_pretrain=" + shop.path("teacher")},
          "': teacher_pretrain: " + shop.path("teacher") + ": no weights");
  refused({"student.data_args.file_name=" + shop.path("nothing.jsonl")},
          "': student.data_args.file_name: " + shop.path("nothing.jsonl") + ": ");
  refused({"student.data_args.template=native", "student_pretrain=" + shop.path("no-template")},
          "': student.data_args.template: " + shop.path("no-template"));
  refused({"validation.data_args.template=native", "student.data_args.template=chatml",
           "student_pretrain=" + shop.path("no-template")},
          "': validation.data_args.template: " + shop.path("no-template"));
  refused(
      {"student.training_args.per_device_train_batch_size=40"},
      "run.yaml:14: student.data_args.file_name: the data has 60 usable records, fewer than one global batch of 80");
  refused({"sequence_length=4"}, ": none of the 60 records of " + shop.path("train.jsonl"));
  refused({"validation.data_args.file_name=" + shop.path("long.jsonl")},
          "none of the 1 records of " + shop.path("long.jsonl"));
  refused({"output_dir=" + shop.path("train.jsonl")},
          "cannot write to " + shop.path("train.jsonl/wrong") + ": " + shop.path("train.jsonl") + " is not a folder");
  refused({"exp_name=../elsewhere"}, "expected a name that stays within output_dir");
  refused({"resume_from_checkpoint=" + shop.path("no-checkpoint")},
          "': resume_from_checkpoint: " + shop.path("no-checkpoint") + ": has no manifest.json");
  refused({"student_pretrain=" + shop.path("few-ids")},
          "few-ids/config.json: vocab_size is 100: expected at least 4080, the number of ids that ");
  if (const auto [folder, reason] = not_writable(shop.path("closed")); !folder.empty())
    refused({"logging_dir=" + folder},
            "': logging_dir: cannot write to " + folder + "/wrong: " + folder + ": " + reason + "\n");
  // What the file says is named by its line.
  fs::rename(shop.path("train.jsonl"), shop.path("train-away.jsonl"));
  refused({}, "run.yaml:14: student.data_args.file_name: " + shop.path("train.jsonl") + ": ");
  fs::rename(shop.path("train-away.jsonl"), shop.path("train.jsonl"));
  for (const char* name : {".", "./", "./.", "..", "a/.."})
    refused({std::string("exp_name=") + name}, "expected a name that stays within output_dir");
  // The same on two ranks is one message, not two.
  refused({"student_pretrain=" + shop.path("nowhere")}, "distill: ", 2);
  refused({"student.data_args.file_name=" + shop.path("nothing.jsonl")},
          "': student.data_args.file_name: " + shop.path("nothing.jsonl") + ": ", 2);
  refused({"sequence_length=4"}, ": none of the 60 records of " + shop.path("train.jsonl"), 4);
  refused({}, "distill: 3 ranks cannot be split into as many students as teachers", 3);
}

TEST_CASE("what keeps two ranks from starting after the plan is said once, without an abort", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  const auto refused = [&](const std::string& name, std::vector<std::string> overrides, const std::string& message,
                           int code = 2) {
    const auto result = shop.train(name, std::move(overrides), 2);
    INFO(result.output);
    CHECK(result.code == code);
    CHECK(occurrences(result.output, message) == 1);
    CHECK(occurrences(result.output, "distill: ") == 1);
    CHECK_THAT(result.output, !Catch::Contains("MPI_ABORT"));
  };
  {
    const distill::RunFolder held(shop.path("held"), {}, [](const std::string&) {});
    refused("held", {}, shop.path("held") + ": is in use by process " + std::to_string(getpid()));
  }
  REQUIRE(shop.train("first", {"max_steps=2"}).code == 0);
  refused("first", {"resume_from_checkpoint=true", "student.model_args.dtype=bf16"}, "another model or another dtype");
  fs::create_directories(shop.path("logs/no-csv/metrics.csv"));
  refused("no-csv", {}, shop.path("logs/no-csv/metrics.csv") + ": cannot open: Is a directory");
  fs::create_directories(shop.path("no-config/config.yaml/full"));
  refused("no-config", {}, shop.path("no-config/config.yaml") + ": ", 1);
}

TEST_CASE("metrics of a run are looked at afterwards", "[e2e][sanitized]") {
  const Workshop shop;
  REQUIRE(shop.train("demo", {"student_pretrain=" + shop.path("teacher"), "distill_loss_weight=0"}).code == 0);
  const auto metrics = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "metrics");
    return Process(shop.command(arguments)).wait();
  };
  const std::string folder = shop.path("logs/demo"), logs = "logging_dir=" + shop.path("logs");
  const auto summary = metrics({"demo", logs});
  INFO(summary.output);
  CHECK(summary.code == 0);
  CHECK_THAT(summary.output, Catch::Contains("logs/demo: steps 1 to 6, "));
  CHECK_THAT(summary.output, Catch::Contains("mean of last 10%"));
  CHECK_THAT(summary.output, Catch::Contains("student/val_loss          nat"));
  CHECK_THAT(summary.output, !Catch::Contains("topk_mass"));  // which no step reported
  // Where the run is, said in other ways; metrics.h5 holds the same.
  CHECK(metrics({folder}).output == summary.output);
  CHECK(metrics({"demo", "--config", shop.path("run.yaml"), "--h5"}).output == summary.output);
  CHECK(metrics({"demo", logs, "--csv"}).output == contents(folder + "/metrics.csv"));
  CHECK(metrics({"demo", logs, "--csv", "--h5"}).output == contents(folder + "/metrics.csv"));

  const auto plot = metrics({folder, "--plot", "train/loss"});
  CHECK(plot.code == 0);
  CHECK_THAT(plot.output, Catch::Contains("train/loss [nat]"));
  const std::string file = shop.path("loss.svg");
  CHECK(metrics({folder, "--plot", "train/loss,student/val_loss", "--log", "--svg", file}).output ==
        "written: " + file + "\n");
  CHECK_THAT(contents(file), Catch::Contains(">student/val_loss</text>"));

  const auto refused = [&](std::vector<std::string> arguments, const std::string& message) {
    const auto result = metrics(std::move(arguments));
    CHECK(result.code == 2);
    CHECK_THAT(result.output, Catch::Contains(message));
  };
  refused({"dem", logs}, "no metrics of a run 'dem': expected metrics.csv or metrics.h5 in " + shop.path("logs/dem"));
  refused({folder, "--plot", "train/los"}, "no metric 'train/los': did you mean 'train/loss'?");
  refused({folder, "--plot", "x"}, "no metric 'x': expected one of train/loss, ");
  refused({folder, "--plot", "train/loss", "--svg", shop.path("no/x.svg")}, "no/x.svg: no folder " + shop.path("no"));
  refused({"demo", logs, "loging_dir=x"}, "did you mean 'logging_dir'?");
  fs::remove(folder + "/metrics.csv");
  CHECK(metrics({folder}).output == summary.output);
}

// Steps that are far shorter than the patience of these cases, also on a virtual GPU.
std::vector<std::string> short_steps(const std::string& dead_after, const std::string& timeout) {
  return {"max_steps=100000",
          "save_steps=0",
          "eval_steps=0",
          "sequence_length=32",
          "student.training_args.per_device_train_batch_size=1",
          "student.training_args.gradient_accumulation_steps=1",
          "peer_dead_after=" + dead_after,
          "peer_timeout=" + timeout};
}

TEST_CASE("the configured patience decides when a silent rank is given up", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  Process run(shop.training("silent", short_steps("1s", "3s"), 2));
  const fs::path csv = shop.path("logs/silent/metrics.csv");
  for (int i = 0; i < 3000 && !(fs::exists(csv) && shop.losses("silent").size() > 2); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  const pid_t teacher = run.child_with("OMPI_COMM_WORLD_RANK=1");
  REQUIRE(teacher > 0);
  const auto start = std::chrono::steady_clock::now();
  REQUIRE(kill(teacher, SIGSTOP) == 0);
  const auto result = run.wait();
  INFO(result.output);
  CHECK(result.code == 3);
  CHECK_THAT(result.output, Catch::Contains("distill: rank 0 on ") && Catch::Contains(": rank 1 on ") &&
                                Catch::Contains("has shown no sign of life for 1"));
  // With GPUs it may have been noticed beside the wait.
  if (!on_gpus()) CHECK_THAT(result.output, Catch::Contains(" for it in the logits channel"));
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(15));  // the default is 20
}

// Stops one thread of another process, not its others, until that ends.
class StoppedThread {
 public:
  explicit StoppedThread(pid_t thread) : thread_(thread) {
    is_stopped_ = ptrace(PTRACE_SEIZE, thread_, nullptr, nullptr) == 0 &&
                  ptrace(PTRACE_INTERRUPT, thread_, nullptr, nullptr) == 0 &&
                  waitpid(thread_, nullptr, __WALL) == thread_;
    // Who started the process is told of its end only after us.
    if (is_stopped_) waiter_ = std::thread([thread] { waitpid(thread, nullptr, __WALL); });
  }
  ~StoppedThread() {
    if (!is_stopped_) return;
    kill(thread_, SIGKILL);
    waiter_.join();
  }
  explicit operator bool() const { return is_stopped_; }

 private:
  pid_t thread_;
  bool is_stopped_ = false;
  std::thread waiter_;
};

TEST_CASE("a teacher that lives but gives nothing is given up after peer_timeout", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  Process run(shop.training("idle", short_steps("1s", "4s"), 2));
  const fs::path csv = shop.path("logs/idle/metrics.csv");
  for (int i = 0; i < 3000 && !(fs::exists(csv) && shop.losses("idle").size() > 2); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  const pid_t teacher = run.child_with("OMPI_COMM_WORLD_RANK=1");
  REQUIRE(teacher > 0);
  const auto start = std::chrono::steady_clock::now();
  const StoppedThread works(teacher);  // its heart goes on beating
  if (!works) {
    WARN("not tried: this machine does not let us stop one thread of a process");
    return;
  }
  const auto result = run.wait();
  INFO(result.output);
  CHECK(result.code == 3);
  CHECK_THAT(result.output, Catch::Contains("distill: rank 0 on ") && Catch::Contains(" s for rank 1 on ") &&
                                Catch::Contains(" in the logits channel (") &&
                                Catch::Contains("it lives but gives nothing (peer_timeout)") &&
                                !Catch::Contains("no sign of life"));
  const auto took = std::chrono::steady_clock::now() - start;
  CHECK(took > std::chrono::seconds(4));
  CHECK(took < std::chrono::seconds(20));
}

TEST_CASE("what a killed start left in shared memory goes when the next run starts", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  const std::string left = "/dev/shm/distill-1-" + std::to_string(getpid());
  std::ofstream(left) << "left";
  const auto result = Process(shop.command({"check", "--config", shop.path("run.yaml")}, 2)).wait();
  INFO(result.output);
  CHECK(result.code == 0);
  CHECK_FALSE(fs::remove(left));
}

// A run of few, short steps and one slot of logits a chunk, on a disk that takes so long to keep the files named.
std::vector<std::string> on_slow_disk(const Workshop& shop, const std::string& name, const std::string& files,
                                      const std::string& seconds, int ranks,
                                      const std::vector<std::string>& more = {}) {
  std::vector<std::string> overrides{"max_steps=3",
                                     "save_steps=1",
                                     "eval_steps=0",
                                     "validation.data_args.file_name=~",
                                     "sequence_length=32",
                                     "student.training_args.per_device_train_batch_size=2",
                                     "teacher_payload=logits",
                                     "logits_chunk=8",
                                     "logits_ring_slots=1",
                                     "peer_dead_after=1s",
                                     "peer_timeout=2s"};
  overrides.insert(overrides.end(), more.begin(), more.end());
  std::vector<std::string> words = shop.training(name, overrides, ranks);
  words.insert(words.begin(), {"LD_PRELOAD=" DISTILL_SLOW_DISK, "ASAN_OPTIONS=verify_asan_link_order=0",
                               "SLOW_FILES=" + files, "SLOW_SECONDS=" + seconds});
  return words;
}

TEST_CASE("all wait for a checkpoint and for the export as long as they take, whatever peer_timeout says", "[e2e]") {
  const Workshop shop({.student_layers = 2});
  shop.make_teacher();
  const std::string files = "step-000001.partial/manifest.json:export.partial/config.json",
                    wait_at_end = on_gpus() ? " in closing the logits channel" : " in barrier of world";
  SECTION("two data-parallel students") {
    const auto result = Process(on_slow_disk(shop, "slow", files, "3", 4)).wait();
    INFO(result.output);
    CHECK(result.code == 0);
    // The second save waits for the first, so both teachers for their students; on a busy machine also before it.
    CHECK(occurrences(result.output, " (a free slot for chunk ") >= 2);
    // The other student, for the export and, beside the steps, for the checkpoint.
    CHECK(occurrences(result.output, " of students and goes on waiting") == 1);
    CHECK(occurrences(result.output, " of checkpoint writers and goes on waiting") == 1);
    // Both teachers; those with GPUs until the student has let go of their memory.
    CHECK(occurrences(result.output, wait_at_end + " and goes on waiting") == 2);
  }
  SECTION("a pipeline of two stages, logits as messages") {
    const auto result =
        Process(on_slow_disk(shop, "slow-pipeline", files, "3", 4,
                             {"student.strategy_args.strategy_config.pp_size=2",
                              "teacher.strategy_args.strategy_config.pp_size=2", "logits_transfer_backend=nccl-only"}))
            .wait();
    INFO(result.output);
    CHECK(result.code == 0);
    CHECK_THAT(result.output, Catch::Contains(" (a free slot for chunk "));
  }
}

TEST_CASE("metrics are on the disk before the checkpoint of their step has its name", "[e2e]") {
  const Workshop shop;
  Process run(on_slow_disk(shop, "metrics", "metrics.csv", "2", 0, {"distill_loss_weight=0", "max_steps=1"}));
  const auto is_there = [&](const std::string& name) { return fs::exists(shop.path("metrics/checkpoints/" + name)); };
  for (int i = 0; i < 3000 && !is_there(".step-000001.partial/manifest.json"); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  REQUIRE(is_there(".step-000001.partial/manifest.json"));
  CHECK(shop.losses("metrics").size() == 1);
  std::this_thread::sleep_for(std::chrono::seconds(1));
  CHECK_FALSE(is_there("step-000001"));
  const auto result = run.wait();
  INFO(result.output);
  CHECK(result.code == 0);
  CHECK(is_there("step-000001"));
}

TEST_CASE("a student that stops during the export is noticed by the teacher that waits for the end", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  Process run(on_slow_disk(shop, "silent", "export.partial/config.json", "10", 2, {"peer_timeout=10m"}));
  for (int i = 0; i < 3000 && !fs::exists(shop.path("silent/.export.partial")); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  const pid_t student = run.child_with("OMPI_COMM_WORLD_RANK=0");
  REQUIRE(student > 0);
  REQUIRE(kill(student, SIGSTOP) == 0);
  const auto result = run.wait();
  INFO(result.output);
  CHECK(result.code == 3);
  CHECK_THAT(result.output, Catch::Contains("distill: rank 1 on ") && Catch::Contains(": rank 0 on ") &&
                                Catch::Contains("has shown no sign of life for 1"));
  if (!on_gpus()) CHECK_THAT(result.output, Catch::Contains("s for it in barrier of world"));
}

TEST_CASE("what is legal and may not be meant is a warning", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  shop.write("some-bad.jsonl", contents(shop.path("train.jsonl")) + "{\"question\": 1}\n");
  const auto check = [&](std::vector<std::string> overrides) {
    std::vector<std::string> arguments{"check", "--config", shop.path("run.yaml")};
    arguments.insert(arguments.end(), overrides.begin(), overrides.end());
    const auto result = Process(shop.command(arguments)).wait();
    INFO(result.output);
    CHECK(result.code == 0);
    return result.output;
  };
  CHECK_THAT(check({}), !Catch::Contains("warning:"));
  const std::string bad = check({"student.data_args.file_name=" + shop.path("some-bad.jsonl"),
                                 "student.data_args.skip_bad_records=true", "teacher.data_args.file_name=other.jsonl"});
  CHECK_THAT(bad, Catch::Contains("warning: 1 of 61 records cannot be used:") &&
                      Catch::Contains(shop.path("some-bad.jsonl") + ":61: record 61"));
  CHECK_THAT(bad, Catch::Contains("the student's values hold for both roles: teacher.data_args.file_name\n"));
  CHECK_THAT(check({"student.device_mapping=[0, 1]", "teacher.device_mapping=[2, 3]"}),
             Catch::Contains("student.device_mapping names 2 devices, this run has 1 rank a role") &&
                 Catch::Contains("teacher.device_mapping names 2 devices"));
  CHECK_THAT(check({"student.model_args.disable_gradient_checkpointing=true",
                    "student.strategy_args.strategy_config.recompute_granularity=full"}),
             Catch::Contains("recompute_granularity changes nothing"));
  CHECK_THAT(check({"student.use_sequence_packing=false", "student.sequence_packing_args.algorithm=load_balance"}),
             Catch::Contains("load_balance changes nothing: student.use_sequence_packing is false"));
  CHECK_THAT(check({"--ranks", "2", "logits_chunk=100000", "logits_ring_slots=1000000"}),
             Catch::Contains("lower logits_chunk or logits_ring_slots"));
  // A context shorter than the longest record.
  const std::string config = shop.path("student/config.json");
  std::string text = contents(config);
  text.replace(text.find(": 128"), 5, ": 16");
  std::ofstream(config, std::ios::binary) << text;
  CHECK_THAT(check({}), Catch::Contains("the student was made for 16 (max_position_embeddings)"));
}

TEST_CASE("student and teacher with different tokenizers are refused", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  const std::string file = shop.path("teacher-run/export/tokenizer.json");
  std::string tokenizer = contents(file);
  const std::size_t at = tokenizer.rfind("<|im_end|>");
  REQUIRE(at != std::string::npos);
  tokenizer.replace(at, 10, "<|im_End|>");
  std::ofstream(file, std::ios::binary) << tokenizer;
  const auto result = shop.train("mixed");
  INFO(result.output);
  CHECK(result.code == 2);
  CHECK_THAT(result.output, Catch::Contains("run.yaml:3: teacher_pretrain: " + shop.path("teacher-run/export") +
                                            ": the teacher's tokenizer differs"));
}

TEST_CASE("check prints the plan and trains nothing", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  const auto result = Process(shop.command({"check", "--config", shop.path("run.yaml"), "--ranks", "4"})).wait();
  INFO(result.output);
  CHECK(result.code == 0);
  for (const char* part : {"student", "teacher", "vocabulary: 4080", "60 records", "forward_kl", "partner", "all good"})
    CHECK_THAT(result.output, Catch::Contains(part));
  CHECK_FALSE(fs::exists(shop.path("run")));
}

TEST_CASE("metrics go where track_with says", "[e2e]") {
  const Workshop shop;
  const auto run = [&](const std::string& name, const std::string& sinks) {
    const auto result =
        shop.train(name, {"distill_loss_weight=0", "max_steps=1", "save_steps=0", "track_with=" + sinks});
    INFO(result.output);
    CHECK(result.code == 0);
    CHECK_THAT(result.output, Catch::Contains("step 1/1"));
    return fs::exists(shop.path("logs/" + name + "/metrics.csv"));
  };
  CHECK(run("all", "~"));
  CHECK(run("csv", "[csv]"));
  CHECK_FALSE(run("none", "[]"));
}

TEST_CASE("a run that its checkpoints do not allow is refused, by check as well", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  REQUIRE(shop.train("again", {"max_steps=2"}).code == 0);
  const auto both = [&](std::vector<std::string> overrides, const std::string& message, int code) {
    overrides.insert(overrides.begin(), {"--config", shop.path("run.yaml"), "exp_name=again"});
    for (const int ranks : {0, 2}) {
      const auto train = Process(shop.command(overrides, ranks)).wait();
      INFO(train.output);
      CHECK(train.code == code);
      CHECK(occurrences(train.output, message) == 1);
    }
    overrides.insert(overrides.begin(), "check");
    const auto check = Process(shop.command(overrides)).wait();
    INFO(check.output);
    CHECK(check.code == code);
    CHECK(occurrences(check.output, message) == 1);
  };
  both({}, "set resume_from_checkpoint=true", 2);
  const std::string checkpoint = shop.path("again/checkpoints/step-000002");
  const std::string batch = "student.training_args.per_device_train_batch_size=3";
  both({"resume_from_checkpoint=true", batch},
       "': resume_from_checkpoint: " + checkpoint + ": was written with a global batch of 8 sequences, this run has 6",
       2);
  both({"resume_from_checkpoint=" + checkpoint, batch},
       "': resume_from_checkpoint: " + checkpoint + ": was written with a global batch of 8", 2);
  both({"resume_from_checkpoint=true", "max_steps=2", "seed=7"},
       "warning: " + checkpoint + ": was written with seed 42, this run has 7", 0);
}

TEST_CASE("inspect shows and verifies checkpoints", "[e2e][sanitized]") {
  const Workshop shop;
  REQUIRE(
      shop.train("teacher-run", {"student_pretrain=" + shop.path("teacher"), "distill_loss_weight=0", "max_steps=4"})
          .code == 0);
  const auto inspect = [&](const std::string& path, int code, std::vector<std::string> options = {}) {
    options.insert(options.begin(), {"inspect", shop.path(path)});
    const auto result = Process(shop.command(options)).wait();
    INFO(result.output);
    CHECK(result.code == code);
    return result.output;
  };
  const std::string two = "teacher-run/checkpoints/step-000002", shard = two + "/student-pp0-tp0-dp0.h5";
  const std::string one = inspect(two, 0);
  for (const char* part :
       {"step 2: 16 samples", "2 optimizer updates", "by distill ", "grid tp 1, pp 1, dp 1", "global batch 8",
        "in 1 file", "student-pp0-tp0-dp0.h5: ", "good", "values: 26 tensors, f32, ", "exp_avg: 26 tensors, f32, ",
        "exp_avg_sq: ", "    exp_name: \"teacher-run\"", "complete: every byte is good"})
    CHECK_THAT(one, Catch::Contains(part));
  CHECK_THAT(one, !Catch::Contains("values/model.norm.weight"));
  CHECK_THAT(inspect(two + "/", 0, {"--tensors"}),
             Catch::Contains("values/model.norm.weight f32 [1, 32]") &&
                 Catch::Contains("exp_avg/model.embed_tokens.weight f32 [4160, 32]"));
  for (const std::string folder : {"teacher-run", "teacher-run/checkpoints", "teacher-run/checkpoints/"})
    CHECK_THAT(inspect(folder, 0), Catch::Contains("step-000002: complete, written ") &&
                                       Catch::Contains("step-000004: complete, written ") &&
                                       Catch::Contains("resume_from_checkpoint=true goes on from step-000004"));
  // Step 4 is the only one that was validated: the last.
  const std::string loss = column(shop.path("logs/teacher-run/metrics.csv"), "student/val_loss").back();
  const std::string listed = inspect("teacher-run", 0);
  CHECK_THAT(listed, Catch::Contains("file, validation loss " + loss.substr(0, 5)));
  CHECK(occurrences(listed, ", best\n") == 1);
  CHECK(occurrences(listed, "validation loss") == 1);
  CHECK_THAT(inspect("teacher-run/checkpoints/best", 0),
             Catch::Contains("step 4: ") && Catch::Contains("validation loss " + loss.substr(0, 5)));

  const std::string four = "teacher-run/checkpoints/step-000004", newer = four + "/student-pp0-tp0-dp0.h5";
  std::string bytes = contents(shop.path(newer));
  bytes[bytes.size() / 2] ^= 1;
  shop.write(newer, bytes);
  CHECK_THAT(inspect("teacher-run", 2), Catch::Contains("step-000004: damaged: " + shop.path(newer)) &&
                                            Catch::Contains("goes on from step-000002"));
  CHECK_THAT(inspect(four, 2), Catch::Contains("student-pp0-tp0-dp0.h5: ") && Catch::Contains(", damaged") &&
                                   Catch::Contains("damaged: " + shop.path(newer) + ": "));
  fs::remove(shop.path(two + "/manifest.json"));
  CHECK_THAT(inspect("teacher-run", 2),
             Catch::Contains("step-000002: damaged: " + shop.path(two) + ": has no manifest") &&
                 Catch::Contains("finds nothing to go on from"));
  CHECK_THAT(inspect(two, 2), Catch::Contains("has no manifest.json: not a complete checkpoint"));
  CHECK_THAT(inspect("student", 2), Catch::Contains(shop.path("student") + ": holds no checkpoints"));
  CHECK_THAT(inspect("nowhere", 2), Catch::Contains(shop.path("nowhere") + ": no such folder"));
}

TEST_CASE("a checkpoint is exported without its run as the run would have", "[e2e][sanitized]") {
  const Workshop shop;
  shop.make_teacher();
  const std::string dtype = GENERATE("fp32", "bf16");
  const std::string precision = "student.model_args.dtype=" + dtype,
                    schedule = "student.training_args.lr_scheduler_type=constant";
  REQUIRE(shop.train("short", {precision, schedule, "max_steps=2"}).code == 0);
  REQUIRE(shop.train("long", {precision, schedule, "max_steps=4"}).code == 0);
  const auto export_to = [&](const std::string& out, int code, std::vector<std::string> options = {},
                             const std::string& from = "step-000002") {
    options.insert(options.begin(), {"export", shop.path("long/checkpoints/" + from), shop.path(out)});
    const auto result = Process(shop.command(options)).wait();
    INFO(result.output);
    CHECK(result.code == code);
    return result.output;
  };
  const auto same_as_the_run = [&](const std::string& out) {
    int files = 0;
    for (const auto& entry : fs::directory_iterator(shop.path("short/export"))) {
      ++files;
      CHECK(contents(entry.path()) == contents(fs::path(shop.path(out)) / entry.path().filename()));
    }
    CHECK(files == std::distance(fs::directory_iterator(shop.path(out)), fs::directory_iterator()));
  };
  CHECK_THAT(export_to("out", 0), Catch::Contains("(step 2) is in " + shop.path("out")));
  same_as_the_run("out");
  CHECK_THAT(export_to("best-out", 0, {}, "best"), Catch::Contains("(step 4)"));
  CHECK(contents(shop.path("best-out/model.safetensors")) == shop.weights("long"));
  CHECK_THAT(export_to("out", 2), Catch::Contains(shop.path("out") + ": exists"));
  same_as_the_run("out");

  fs::rename(shop.path("student"), shop.path("moved"));
  CHECK_THAT(export_to("moved-out", 2),
             Catch::Contains(shop.path("student") + ", is not there") && Catch::Contains("--model FOLDER"));
  export_to("moved-out", 0, {"--model", shop.path("moved")});
  same_as_the_run("moved-out");
  CHECK_THAT(export_to("other", 2, {"--model", shop.path("teacher")}), Catch::Contains("values/model."));

  const std::string shard = "long/checkpoints/step-000002/student-pp0-tp0-dp0.h5";
  std::string bytes = contents(shop.path(shard));
  bytes[bytes.size() / 2] ^= 1;
  shop.write(shard, bytes);
  CHECK_THAT(export_to("damaged", 2, {"--model", shop.path("moved")}), Catch::Contains(" is damaged"));
  CHECK_FALSE(fs::exists(shop.path("damaged")));
}
