#include "core/model/params.h"

#include <algorithm>
#include <map>

namespace distill {

namespace {

constexpr std::int64_t alignment = 32;  // elements: 64 bytes in 16-bit types

std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

Range stage_layers(int layers, int stages, int stage) {
  const std::int64_t begin = std::int64_t(layers) * stage / stages, end = std::int64_t(layers) * (stage + 1) / stages;
  return {begin, end - begin};
}

std::int64_t ParamTable::count() const {
  std::int64_t n = 0;
  for (const Param& p : params_) n += p.size();
  return n;
}

const Param* ParamTable::find(std::string_view name) const {
  const auto it = std::find_if(params_.begin(), params_.end(), [&](const Param& p) { return p.name == name; });
  return it == params_.end() ? nullptr : &*it;
}

void ParamTable::add(Param param) { add_fused({std::move(param)}); }

void ParamTable::add_fused(std::vector<Param> params) {
  std::int64_t offset = end_;
  for (Param& param : params) {
    param.offset = offset;
    offset += param.size();
    if (param.whole_cols == 0) {
      param.whole_rows = param.rows;
      param.whole_cols = param.cols;
    }
    params_.push_back(std::move(param));
  }
  end_ = round_up(offset, alignment);
}

void ParamTable::end_bucket() {
  const std::int64_t begin = buckets_.empty() ? 0 : buckets_.back().end();
  end_ = round_up(end_, alignment * bucket_parts_);
  if (end_ > begin) buckets_.push_back({begin, end_ - begin});
}

void ParamTable::number_as(const ParamTable& whole) {
  std::map<std::string_view, int> numbers;
  for (const Param& p : whole.params_) numbers.emplace(p.name, int(numbers.size()));
  for (Param& p : params_) p.index = numbers.at(p.name);
}

}  // namespace distill
