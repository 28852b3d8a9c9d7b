// The program as a user runs it: train, distil on one rank and on two, stop, be killed, resume, and be told what is
// wrong.
#include <catch2/catch.hpp>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "io/run_folder.h"
#include "test/support/process.h"
#include "test/support/scratch_folder.h"

using namespace distill::test;
namespace fs = std::filesystem;

namespace {

std::string contents(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  REQUIRE(in);
  return {std::istreambuf_iterator<char>(in), {}};
}

// The column of a CSV file by its name, as text: equality is to the last digit.
std::vector<std::string> column(const fs::path& csv, const std::string& name) {
  std::istringstream lines(contents(csv));
  const auto cells = [](const std::string& line) {
    std::vector<std::string> out;
    std::istringstream stream(line);
    for (std::string cell; std::getline(stream, cell, ',');) out.push_back(cell);
    return out;
  };
  std::string line;
  std::getline(lines, line);
  const auto names = cells(line);
  const auto at = std::size_t(std::find(names.begin(), names.end(), name) - names.begin());
  REQUIRE(at < names.size());
  std::vector<std::string> values;
  while (std::getline(lines, line)) {
    const auto row = cells(line);
    values.push_back(at < row.size() ? row[at] : "");
  }
  return values;
}

// A folder with a micro teacher and a micro student over the tokenizer of the quick start.
class Workshop {
 public:
  Workshop() {
    model("teacher", 32, 2, 4160);
    model("student", 24, 1, 4096);
    folder_.write("run.yaml", R"(
student_pretrain: )" + path("student") +
                                  R"(
teacher_pretrain: )" + path("teacher-run/export") +
                                  R"(
output_dir: )" + path("") + R"(
logging_dir: )" + path("logs") + R"(
sequence_length: 64
max_grad_norm: 1.0
save_steps: 2
eval_steps: 3
max_steps: 6
student:
  model_args: {dtype: fp32}
  data_args: {file_name: )" + path("train.jsonl") +
                                  R"(}
  training_args: {learning_rate: 1.0e-3, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, warmup_steps: 2}
teacher:
  model_args: {dtype: fp32}
validation:
  data_args: {file_name: )" + path("validation.jsonl") +
                                  R"(}
)");
    head("train.jsonl", 60);
    head("validation.jsonl", 10);
    folder_.write("long.jsonl", R"({"question": ")" + std::string(2000, 'q') + R"(", "answer": "a"})" + "\n");
  }

  void write(const std::string& name, const std::string& text) const { folder_.write(name, text); }

  std::string path(const std::string& name) const { return folder_.path(name); }

  // distill with the arguments, on `ranks` ranks (0: without mpirun).
  std::vector<std::string> command(std::vector<std::string> arguments, int ranks = 0) const {
    std::vector<std::string> words{"OMP_NUM_THREADS=1"};
    if (ranks > 0)
      for (const char* word :
           {"OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1", "OMPI_MCA_mpi_yield_when_idle=1", "mpirun",
            "--oversubscribe", "--bind-to", "none", "-np"})
        words.push_back(word);
    if (ranks > 0) words.push_back(std::to_string(ranks));
    words.push_back(DISTILL_PROGRAM);
    words.insert(words.end(), arguments.begin(), arguments.end());
    return words;
  }
  std::vector<std::string> training(const std::string& name, std::vector<std::string> overrides, int ranks = 0) const {
    std::vector<std::string> arguments{"--config", path("run.yaml"), "exp_name=" + name};
    arguments.insert(arguments.end(), overrides.begin(), overrides.end());
    return command(arguments, ranks);
  }
  Process::Result train(const std::string& name, std::vector<std::string> overrides = {}, int ranks = 0) const {
    return Process(training(name, std::move(overrides), ranks)).wait();
  }
  // A teacher to distil from: two steps from random weights.
  void make_teacher() const {
    const auto result =
        train("teacher-run", {"student_pretrain=" + path("teacher"), "distill_loss_weight=0", "max_steps=2"});
    INFO(result.output);
    REQUIRE(result.code == 0);
  }
  std::vector<std::string> losses(const std::string& name) const {
    return column(path("logs/" + name + "/metrics.csv"), "train/loss");
  }
  std::string weights(const std::string& name) const { return contents(path(name + "/export/model.safetensors")); }

 private:
  void model(const std::string& name, int hidden, int layers, int vocabulary) {
    fs::create_directories(path(name));
    for (const char* file : {"tokenizer.json", "tokenizer_config.json"})
      fs::copy(fs::path(DISTILL_SOURCE_DIR) / "configs/wordnet/student" / file, path(name + "/" + file));
    std::ostringstream config;
    config
        << R"({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": )"
        << hidden
        << R"(, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": )"
        << layers
        << R"(, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true, "vocab_size": )"
        << vocabulary << R"(, "torch_dtype": "float32"})";
    folder_.write(name + "/config.json", config.str());
  }
  void head(const std::string& file, int lines) const {
    std::ifstream in(fs::path(DISTILL_SOURCE_DIR) / "configs/wordnet" / file);
    std::string text, line;
    for (int i = 0; i < lines && std::getline(in, line); ++i) text += line + "\n";
    folder_.write(file, text);
  }

  ScratchFolder folder_;
};

int occurrences(const std::string& text, const std::string& part) {
  int count = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

}  // namespace

TEST_CASE("one rank and two ranks give the same bits", "[e2e]") {
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
  CHECK(column(shop.path("logs/one-" + dtype + "/metrics.csv"), "student/val_loss")[2] != "");
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

TEST_CASE("a killed run resumes bit for bit", "[e2e]") {
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
}

TEST_CASE("a signal saves, leaves with 85, and the same command goes on", "[e2e]") {
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

TEST_CASE("what is wrong is said once, with exit code 2, and nothing is started", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  fs::copy(shop.path("student"), shop.path("no-template"));
  shop.write("no-template/tokenizer_config.json", "{}");
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
  refused({"student.training_args.per_device_train_batch_size=40"}, "expected at least 80");
  refused({"sequence_length=4"}, ": none of the 60 records of " + shop.path("train.jsonl"));
  refused({"validation.data_args.file_name=" + shop.path("long.jsonl")},
          "none of the 1 records of " + shop.path("long.jsonl"));
  refused({"output_dir=" + shop.path("train.jsonl")},
          "cannot write to " + shop.path("train.jsonl/wrong") + ": " + shop.path("train.jsonl") + " is not a folder");
  refused({"exp_name=../elsewhere"}, "expected a name that stays within output_dir");
  refused({"resume_from_checkpoint=" + shop.path("no-checkpoint")},
          "': resume_from_checkpoint: " + shop.path("no-checkpoint") + ": has no manifest.json");
  // What the file says is named by its line.
  fs::rename(shop.path("train.jsonl"), shop.path("train-away.jsonl"));
  refused({}, "run.yaml:13: student.data_args.file_name: " + shop.path("train.jsonl") + ": ");
  fs::rename(shop.path("train-away.jsonl"), shop.path("train.jsonl"));
  // The same on two ranks is one message, not two.
  refused({"student_pretrain=" + shop.path("nowhere")}, "distill: ", 2);
  refused({}, "3 ranks", 3);
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
    const distill::RunFolder held(shop.path("held"));
    refused("held", {}, shop.path("held") + ": is in use by process " + std::to_string(getpid()));
  }
  REQUIRE(shop.train("first", {"max_steps=2"}).code == 0);
  refused("first", {"resume_from_checkpoint=true", "student.model_args.dtype=bf16"}, "another model or another dtype");
  fs::create_directories(shop.path("logs/no-csv/metrics.csv"));
  refused("no-csv", {}, shop.path("logs/no-csv/metrics.csv") + ": cannot open: Is a directory");
  fs::create_directories(shop.path("no-config/config.yaml/full"));
  refused("no-config", {}, shop.path("no-config/config.yaml") + ": ", 1);
}

TEST_CASE("the configured patience decides when a silent rank is given up", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  Process run(shop.training(
      "silent", {"max_steps=100000", "save_steps=0", "eval_steps=0", "peer_dead_after=1s", "peer_timeout=3s"}, 2));
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
  CHECK_THAT(result.output, Catch::Contains("rank 1 on "));
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(15));  // the default is 20
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
  CHECK_THAT(bad, Catch::Contains("teacher.data_args.file_name is ignored"));
  CHECK_THAT(check({"student.device_mapping=[0, 1]", "teacher.device_mapping=[2, 3]"}),
             Catch::Contains("student.device_mapping names 2 devices, this run has 1 rank a role") &&
                 Catch::Contains("teacher.device_mapping names 2 devices"));
  CHECK_THAT(check({"student.model_args.disable_gradient_checkpointing=true",
                    "student.strategy_args.strategy_config.recompute_granularity=full"}),
             Catch::Contains("recompute_granularity changes nothing"));
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

TEST_CASE("inspect shows and verifies checkpoints", "[e2e]") {
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

TEST_CASE("a checkpoint is exported without its run as the run would have", "[e2e]") {
  const Workshop shop;
  shop.make_teacher();
  const std::string dtype = GENERATE("fp32", "bf16");
  const std::string precision = "student.model_args.dtype=" + dtype,
                    schedule = "student.training_args.lr_scheduler_type=constant";
  REQUIRE(shop.train("short", {precision, schedule, "max_steps=2"}).code == 0);
  REQUIRE(shop.train("long", {precision, schedule, "max_steps=4"}).code == 0);
  const auto export_to = [&](const std::string& out, int code, std::vector<std::string> options = {}) {
    options.insert(options.begin(), {"export", shop.path("long/checkpoints/step-000002"), shop.path(out)});
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
