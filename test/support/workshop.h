// What end-to-end tests work with: a folder with models, records and a configuration, and the program: DISTILL_PROGRAM
// of the build, or of the environment, where another build is to be tested by the same cases (DISTILL_DEVICE: on what).
#pragma once

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "test/support/process.h"
#include "test/support/scratch_folder.h"

namespace distill::test {

inline std::string contents(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + file.string());
  return {std::istreambuf_iterator<char>(in), {}};
}

// The column of a CSV file by its name, as text: equality is to the last digit.
inline std::vector<std::string> column(const std::filesystem::path& csv, const std::string& name) {
  std::istringstream lines(contents(csv));
  const auto cells = [](const std::string& line) {
    std::vector<std::string> out;
    std::istringstream stream(line);
    for (std::string cell; std::getline(stream, cell, ',');) out.push_back(cell);
    return out;
  };
  std::string line;
  if (!std::getline(lines, line)) return {};  // about to be written
  const auto names = cells(line);
  const auto at = std::size_t(std::find(names.begin(), names.end(), name) - names.begin());
  if (at == names.size()) throw std::runtime_error(csv.string() + " has no column " + name);
  std::vector<std::string> values;
  while (std::getline(lines, line)) {
    const auto row = cells(line);
    values.push_back(at < row.size() ? row[at] : "");
  }
  return values;
}

inline std::string environment_or(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}
inline std::string program() { return environment_or("DISTILL_PROGRAM", DISTILL_PROGRAM); }
inline bool on_gpus() { return environment_or("DISTILL_DEVICE", "auto") == "cuda"; }

// Words of a command line, and the overrides that several tests take.
using Words = std::vector<std::string>;

inline Words operator+(Words a, const Words& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

inline Words both_roles(const std::string& key, int value) {
  Words words;
  for (const char* role : {"student", "teacher"})
    words.push_back(std::string(role) + ".strategy_args.strategy_config." + key + "=" + std::to_string(value));
  return words;
}
inline Words tp(int n) { return both_roles("tp_size", n); }
inline Words pp(int n) { return both_roles("pp_size", n); }
inline Words accumulation(int n) { return {"student.training_args.gradient_accumulation_steps=" + std::to_string(n)}; }
inline Words strategy(const std::string& setting) { return {"student.strategy_args.strategy_config." + setting}; }

// What stands before a program: its environment, and mpirun with that many ranks (0: without).
inline Words on_ranks(int ranks) {
  const Words environment{"OMP_NUM_THREADS=1"};
  if (ranks == 0) return environment;
  return environment + Words{"OMPI_ALLOW_RUN_AS_ROOT=1",
                             "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
                             "OMPI_MCA_mpi_yield_when_idle=1",
                             "mpirun",
                             "--oversubscribe",
                             "--bind-to",
                             "none",
                             "-np",
                             std::to_string(ranks)};
}

// Sizes of the two models.
struct WorkshopModels {
  int teacher_layers = 2, student_layers = 1, feed_forward = 64;
  bool tied = true;
};

// A folder with a micro teacher and a micro student over the tokenizer of the quick start.
class Workshop {
 public:
  explicit Workshop(const WorkshopModels& models = {}) : models_(models) {
    model("teacher", 32, models.teacher_layers, 4160);
    model("student", 24, models.student_layers, 4096);
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
device: )" + environment_or("DISTILL_DEVICE", "auto") +
                                  R"(
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
    return on_ranks(ranks) + Words{program()} + arguments;
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
    const auto result = train(
        "teacher-run", {"student_pretrain=" + path("teacher"), "distill_loss_weight=0", "max_steps=2", "device=cpu"});
    if (result.code != 0) throw std::runtime_error("the teacher: " + result.output);
  }
  std::vector<std::string> losses(const std::string& name) const {
    return column(path("logs/" + name + "/metrics.csv"), "train/loss");
  }
  std::string weights(const std::string& name) const { return contents(path(name + "/export/model.safetensors")); }

 private:
  void model(const std::string& name, int hidden, int layers, int vocabulary) {
    std::filesystem::create_directories(path(name));
    for (const char* file : {"tokenizer.json", "tokenizer_config.json"})
      std::filesystem::copy(std::filesystem::path(DISTILL_SOURCE_DIR) / "configs/wordnet/student" / file,
                            path(name + "/" + file));
    std::ostringstream config;
    config
        << R"({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": )"
        << hidden << R"(, "intermediate_size": )" << models_.feed_forward
        << R"(, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": )" << layers
        << R"(, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": )"
        << (models_.tied ? "true" : "false") << R"(, "vocab_size": )" << vocabulary << R"(, "torch_dtype": "float32"})";
    folder_.write(name + "/config.json", config.str());
  }
  void head(const std::string& file, int lines) const {
    std::ifstream in(std::filesystem::path(DISTILL_SOURCE_DIR) / "configs/wordnet" / file);
    std::string text, line;
    for (int i = 0; i < lines && std::getline(in, line); ++i) text += line + "\n";
    folder_.write(file, text);
  }

  WorkshopModels models_;
  ScratchFolder folder_;
};

inline int occurrences(const std::string& text, const std::string& part) {
  int count = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

}  // namespace distill::test
