#include "core/train/gradient_sync.h"

#include <algorithm>

namespace distill {

GradientSync::GradientSync(const ParamTable& table, View values, View gradients, const Groups& groups, bool shards,
                           bool overlaps)
    : table_(table),
      values_(values),
      gradients_(gradients),
      groups_(groups),
      shards_(shards),
      overlaps_(overlaps),
      is_ready_(table.buckets().size()) {}

Range GradientSync::part_of(const Range& bucket) const {
  if (!shards_) return bucket;
  const std::int64_t size = bucket.size / groups_.dp.size();
  return {bucket.begin + size * groups_.dp.rank(), size};
}

std::vector<Range> GradientSync::owned() const {
  std::vector<Range> ranges;
  for (const Range& bucket : table_.buckets()) ranges.push_back(part_of(bucket));
  return ranges;
}

// Parameters that several tensor-parallel ranks hold while each has the gradient of its own heads or tokens.
void GradientSync::sum_partial_gradients(const Range& bucket) {
  for (const Param& p : table_.all()) {
    if (!p.is_partial || p.offset < bucket.begin || p.offset >= bucket.end()) continue;
    Communicator& sharers = p.sharers == groups_.tp.size() ? groups_.tp : *groups_.kv;
    check(sharers.size() == p.sharers, p.name, ": ", p.sharers, " ranks share it, its group has ", sharers.size());
    sharers.all_reduce(in(gradients_, {p.offset, p.size()}));
  }
}

std::unique_ptr<Pending> GradientSync::start(const Range& bucket) {
  const View whole = in(gradients_, bucket);
  return shards_ ? groups_.dp.start_reduce_scatter(in(gradients_, part_of(bucket)), whole)
                 : groups_.dp.start_all_reduce(whole);
}

void GradientSync::bucket_ready(std::size_t bucket) {
  const Range& range = table_.buckets()[bucket];
  is_ready_[bucket] = true;
  sum_partial_gradients(range);
  if (overlaps_) pending_.push_back(start(range));
}

void GradientSync::finish() {
  // In the order of the backward, which is that of the ranks that did overlap.
  for (std::size_t bucket = is_ready_.size(); bucket-- > 0;)
    if (!is_ready_[bucket]) bucket_ready(bucket);
  if (!overlaps_)
    for (std::size_t bucket = is_ready_.size(); bucket-- > 0;) pending_.push_back(start(table_.buckets()[bucket]));
  for (const std::unique_ptr<Pending>& pending : pending_) pending->wait();
  pending_.clear();
  is_ready_.assign(is_ready_.size(), false);
  if (!groups_.tied) return;
  const Param& embedding = *table_.find("model.embed_tokens.weight");
  for (const Range& bucket : table_.buckets())
    if (bucket.begin == embedding.offset) groups_.tied->all_reduce(in(gradients_, part_of(bucket)));
}

void GradientSync::share_values() {
  if (!shards_) return;
  for (const Range& bucket : table_.buckets())
    pending_.push_back(groups_.dp.start_all_gather(in(values_, bucket), in(values_, part_of(bucket))));
  for (const std::unique_ptr<Pending>& pending : pending_) pending->wait();
  pending_.clear();
}

}  // namespace distill
