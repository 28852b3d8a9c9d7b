// Event files for TensorBoard.
#pragma once

#include <cstdint>
#include <string>

#include "core/train/metrics.h"
#include "io/append_file.h"

namespace distill {

// Every start writes a new file of the folder, whose name sorts behind those of earlier starts. It begins with a mark
// by which TensorBoard drops what those files say of steps after `resumed_step`. Values are f32, as TensorBoard's
// scalars are.
class TensorboardSink final : public MetricSink {
 public:
  using Warn = AppendFile::Warn;
  // `now`: seconds since 1970.
  TensorboardSink(const std::string& folder, std::int64_t resumed_step, double now, Warn warn);

  void write(const MetricRecord& record) override;
  void sync() override { file_.sync(); }
  const std::string& path() const { return file_.path(); }

 private:
  AppendFile file_;
};

}  // namespace distill
