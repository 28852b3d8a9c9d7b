#include "apps/export_checkpoint.h"

#include <filesystem>
#include <span>
#include <vector>

#include "io/checkpoint_manifest.h"
#include "io/checkpoint_reader.h"
#include "io/config_file.h"
#include "io/convert.h"
#include "io/export.h"
#include "io/model_folder.h"

namespace distill {

namespace {

namespace fs = std::filesystem;

std::string tensor_name(const Param& param) { return "values/" + param.name; }

// The type of the parameters, which all have the same.
DType dtype_of_values(const CheckpointReader& reader) {
  for (const auto& [name, tensor] : reader.tensors())
    if (name.starts_with("values/")) return tensor.dtype;
  fail_input(reader.path(), ": holds no parameters");
}

// Rows of a parameter as the checkpoint holds them.
StoredMatrix rows_of(const Param& param, DType dtype, std::int64_t first_row, std::int64_t rows) {
  return {.name = tensor_name(param),
          .dtype = dtype,
          .rows = rows,
          .cols = param.cols,
          .whole_rows = param.rows,
          .whole_cols = param.cols,
          .first_row = first_row};
}

// Neither more nor less than the model, and no byte that is damaged.
void check_source(const CheckpointReader& reader, const std::string& model, const ParamTable& table, DType dtype) {
  for (const Param& param : table.all()) reader.check_holds(rows_of(param, dtype, 0, param.rows));
  for (const auto& [name, tensor] : reader.tensors())
    check_input(!name.starts_with("values/") || table.find(name.substr(7)), reader.path(), ": holds ", name,
                ", which the model of ", model, " has not");
  for (const StoredShard& shard : reader.manifest().shards) check_shard(reader.path(), shard);
}

std::string student_folder(const std::string& checkpoint, const CheckpointManifest& manifest) {
  const ConfigFile file = parse_config(manifest.run.config, checkpoint + "/manifest.json", {});
  std::string folder = file.config.student.model_args.model_name_or_path;
  check_input(fs::is_directory(folder), checkpoint, ": the student's folder, ", folder,
              ", is not there: say where it is with --model FOLDER");
  return folder;
}

}  // namespace

void export_checkpoint(const std::string& checkpoint, const std::string& out, std::string model, const Say& say) {
  std::error_code missing;
  check_input(!fs::exists(out) || (fs::is_directory(out) && fs::is_empty(out, missing)), out,
              ": exists: choose another folder, or remove this one");
  CheckpointReader reader(checkpoint, read_manifest(checkpoint));
  if (model.empty()) model = student_folder(checkpoint, reader.manifest());
  const ParamTable table = param_table(read_model_spec(model));
  const DType dtype = dtype_of_values(reader);
  check_source(reader, model, table, dtype);
  std::vector<std::byte> bytes;
  const auto read = [&](const Param& param, std::int64_t first, std::span<float> values) {
    // The rows that hold the elements [first, end).
    const std::int64_t end = first + std::int64_t(values.size()), first_row = first / param.cols;
    const std::int64_t rows = (end + param.cols - 1) / param.cols - first_row;
    bytes.resize(std::size_t(rows * param.cols) * size_of(dtype));
    reader.read(rows_of(param, dtype, first_row, rows), bytes);
    widen(values, dtype, bytes.data() + std::size_t(first - first_row * param.cols) * size_of(dtype));
  };
  export_model(out, {.model = model, .tokenizer = model}, table, dtype, read);
  say(text("the student of ", checkpoint, " (step ", reader.manifest().state.step, ") is in ", out));
}

}  // namespace distill
