#include "core/model/params.h"

#include <algorithm>

namespace distill {

namespace {

constexpr std::int64_t alignment = 32;  // elements: 64 bytes in 16-bit types

}  // namespace

std::int64_t ParamTable::count() const {
  std::int64_t n = 0;
  for (const Param& p : params_) n += p.size();
  return n;
}

const Param* ParamTable::find(std::string_view name) const {
  const auto it = std::find_if(params_.begin(), params_.end(), [&](const Param& p) { return p.name == name; });
  return it == params_.end() ? nullptr : &*it;
}

ParamId ParamTable::add(Param param) { return add_fused({std::move(param)}).front(); }

std::vector<ParamId> ParamTable::add_fused(std::vector<Param> params) {
  std::vector<ParamId> ids;
  std::int64_t offset = end_;
  for (Param& param : params) {
    param.offset = offset;
    offset += param.size();
    ids.push_back(ParamId(params_.size()));
    params_.push_back(std::move(param));
  }
  end_ = (offset + alignment - 1) / alignment * alignment;
  return ids;
}

}  // namespace distill
