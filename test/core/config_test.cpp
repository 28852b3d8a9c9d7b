#include "core/config.h"

#include <catch2/catch.hpp>

#include "core/nearest_name.h"

using namespace distill;

namespace {

// The least that is a complete run.
Config complete() {
  Config config;
  config.student_pretrain = "student";
  config.teacher_pretrain = "teacher";
  config.student.data_args.file_name = {"records.json"};
  fill_defaults(config, "run");
  return config;
}

std::vector<std::string> lines(const std::vector<ConfigProblem>& problems) {
  std::vector<std::string> result;
  for (const ConfigProblem& problem : problems) result.push_back(problem.key + ": " + problem.message);
  return result;
}

using Lines = std::vector<std::string>;

}  // namespace

TEST_CASE("defaults that depend on other keys") {
  Config config;
  config.output_dir = "out";
  config.logging_dir = "logs";
  config.student_pretrain = "student";
  config.teacher_pretrain = "teacher";
  config.student.data_args.template_name = "qwen3";
  fill_defaults(config, "run");
  CHECK(config.exp_name == "run");
  CHECK(config.checkpoint_config.output_dir == "out");
  CHECK(config.student.model_args.model_name_or_path == "student");
  CHECK(config.teacher.model_args.model_name_or_path == "teacher");
  CHECK(config.validation.data_args.template_name == "qwen3");
  CHECK(config.run_dir() == "out/run");
  CHECK(config.log_dir() == "logs/run");
  CHECK(config.checkpoint_dir() == "out/run/checkpoints");

  const Config once = config;
  fill_defaults(config, "other");
  CHECK(config == once);
}

TEST_CASE("what is given wins over the default") {
  Config config;
  config.exp_name = "mine";
  config.checkpoint_config.output_dir = "checkpoints";
  config.student_pretrain = "student";
  config.student.model_args.model_name_or_path = "better student";
  config.validation.data_args.template_name = "chatml";
  fill_defaults(config, "run");
  CHECK(config.exp_name == "mine");
  CHECK(config.checkpoint_dir() == "checkpoints/mine/checkpoints");
  CHECK(config.student.model_args.model_name_or_path == "better student");
  CHECK(config.validation.data_args.template_name == "chatml");
}

TEST_CASE("a complete configuration breaks no rule") {
  CHECK(lines(rule_violations(complete())).empty());
  CHECK(lines(not_supported(complete(), {})).empty());
}

TEST_CASE("models and records are needed") {
  Config config;
  CHECK(lines(rule_violations(config)) ==
        Lines{"student_pretrain: is missing: expected the Hugging Face folder of the student model (or "
              "student.model_args.model_name_or_path)",
              "student.data_args.file_name: is missing: expected the path of the training records",
              "teacher_pretrain: is missing: expected the Hugging Face folder of the teacher model (or "
              "teacher.model_args.model_name_or_path); distill_loss_weight: 0 needs no teacher"});
}

TEST_CASE("plain fine-tuning needs no teacher and asks nothing of its section") {
  Config config = complete();
  config.distill_loss_weight = 0;
  config.teacher = {};
  config.teacher.strategy_args.strategy_config.tensor_model_parallel_size = 2;
  config.teacher.device_mapping = {3, 3};
  CHECK_FALSE(config.needs_teacher());
  CHECK(lines(rule_violations(config)).empty());
  CHECK(lines(not_supported(config, {})).empty());
}

TEST_CASE("student and teacher have the same tensor and pipeline parallel size") {
  Config config = complete();
  config.student.strategy_args.strategy_config.tensor_model_parallel_size = 2;
  config.teacher.strategy_args.strategy_config.pipeline_model_parallel_size = 3;
  CHECK(lines(rule_violations(config)) ==
        Lines{"teacher.strategy_args.strategy_config.tensor_model_parallel_size: is 1: expected 2, the same as the "
              "student's",
              "teacher.strategy_args.strategy_config.pipeline_model_parallel_size: is 3: expected 1, the same as the "
              "student's"});
}

TEST_CASE("devices are distinct, fit the model's ranks and are as many for both roles") {
  Config config = complete();
  config.student.strategy_args.strategy_config.tensor_model_parallel_size = 2;
  config.student.strategy_args.strategy_config.context_parallel_size = 2;
  config.teacher.strategy_args.strategy_config.tensor_model_parallel_size = 2;
  config.student.device_mapping = {0, 1, 2, 3, 4, 5};
  config.teacher.device_mapping = {0, 1, 1, 2};
  CHECK(lines(rule_violations(config)) ==
        Lines{"student.device_mapping: has 6 devices: expected a multiple of 4 (tensor × pipeline × context parallel "
              "size)",
              "teacher.device_mapping: names a device twice: expected distinct devices",
              "teacher.device_mapping: has 4 devices: expected 6, as many as the student has (a teacher rank per "
              "student rank)"});
}

TEST_CASE("the longest wait is not shorter than the heartbeat's limit") {
  Config config = complete();
  config.peer_dead_after = Seconds(30);
  config.peer_timeout = Seconds(20);
  CHECK(lines(rule_violations(config)) == Lines{"peer_timeout: is 20 s: expected at least peer_dead_after, 30 s"});
}

TEST_CASE("nearest name") {
  const std::vector<std::string> names = {"learning_rate", "warmup_ratio", "seed", "save_steps"};
  CHECK(edit_distance("", "abc") == 3);
  CHECK(edit_distance("kitten", "sitting") == 3);
  CHECK(edit_distance("sede", "seed") == 1);  // a swap of neighbours is one edit
  CHECK(nearest_name("learning_rat", names) == "learning_rate");
  CHECK(nearest_name("sede", names) == "seed");
  CHECK(nearest_name("save_step", names) == "save_steps");
  CHECK(nearest_name("optimizer", names).empty());
}
