#include "core/group_on_device.h"

#include <algorithm>
#include <exception>
#include <utility>

namespace distill {

GroupOnDevice::GroupOnDevice(Device& device, std::unique_ptr<Communicator> host)
    : Communicator(host->name(), host->rank(), host->members(), host->patience()),
      device_(device),
      host_(std::move(host)) {}

void GroupOnDevice::set_patience(const Patience& patience) {
  Communicator::set_patience(patience);
  host_->set_patience(patience);
}

void GroupOnDevice::give_up() {
  Communicator::give_up();
  host_->give_up();
}

void GroupOnDevice::copy_unless_same(View to, const ConstView& from) {
  if (to.data != from.data) device_.cast(to, ConstView(View(const_cast<void*>(from.data), to.rows, to.cols, to.dtype)));
}

void GroupOnDevice::do_barrier() { host_->barrier(); }
void GroupOnDevice::do_all_gather_bytes(void* all, const void* mine, std::size_t bytes) {
  host_->gather_bytes(all, mine, bytes);
}
void GroupOnDevice::do_broadcast_bytes(void* x, std::size_t bytes, int root) { host_->broadcast_bytes(x, bytes, root); }
void GroupOnDevice::do_send_words(std::span<const std::int32_t> words, int to) {
  host_->sends_.finish();
  host_->do_send_words(words, to);
}
void GroupOnDevice::do_recv_words(std::span<std::int32_t> words, int from) {
  host_->receives_.finish();
  host_->do_recv_words(words, from);
}
std::unique_ptr<Communicator> GroupOnDevice::do_split(const std::vector<int>& parents, int group, std::string name) {
  return host_->do_split(parents, group, std::move(name));
}

// A copy in host memory and what is under way with it. Afterwards a part of it goes to the device.
class StagedGroup::Staged final : public Pending {
 public:
  Staged(StagedGroup& group, Memory memory, const ConstView& like)
      : group_(group),
        memory_(std::move(memory)),
        host_(memory_.bytes.get(), like.rows, like.cols, like.dtype),
        exceptions_at_start_(std::uncaught_exceptions()) {}
  ~Staged() override {
    if (!is_over_ && std::uncaught_exceptions() == exceptions_at_start_) try {
        wait();
      } catch (...) {  // as every Pending that nobody waits for
      }
    under_way_.reset();
    group_.free_.push_back(std::move(memory_));
  }

  const View& host() const { return host_; }
  // Element `first` and those after it, in the shape of `like`.
  View part(const ConstView& like, std::int64_t first) const {
    std::byte* const at = memory_.bytes.get() + std::size_t(first) * size_of(like.dtype);
    return {at, like.rows, like.cols, like.dtype};
  }
  void begins(std::unique_ptr<Pending> under_way) { under_way_ = std::move(under_way); }
  void arrives_at(View to, std::int64_t first = 0) {
    to_ = to;
    from_ = part(to, first).data;
  }

  void wait() override {
    if (is_over_) return;
    is_over_ = true;
    if (under_way_) under_way_->wait();
    if (from_) group_.device().upload(to_, from_);
  }
  bool is_done() const override { return !under_way_ || under_way_->is_done(); }

 private:
  StagedGroup& group_;
  Memory memory_;
  View host_, to_;
  const void* from_ = nullptr;
  std::unique_ptr<Pending> under_way_;
  bool is_over_ = false;
  int exceptions_at_start_;
};

StagedGroup::StagedGroup(Device& device, std::unique_ptr<Communicator> host) : GroupOnDevice(device, std::move(host)) {}

std::unique_ptr<StagedGroup::Staged> StagedGroup::stage(const ConstView& like) {
  const std::size_t bytes = std::size_t(like.size()) * size_of(like.dtype);
  auto found = std::find_if(free_.begin(), free_.end(), [&](const Memory& m) { return m.capacity >= bytes; });
  Memory memory;
  if (found != free_.end()) {
    memory = std::move(*found);
    free_.erase(found);
  } else {
    if (!free_.empty()) free_.pop_back();  // too small: a larger one takes its place
    memory = {std::make_unique_for_overwrite<std::byte[]>(bytes), bytes};
  }
  return std::make_unique<Staged>(*this, std::move(memory), like);
}

std::unique_ptr<Pending> StagedGroup::do_start_all_reduce(View x, Reduce op) {
  auto staged = stage(x);
  device().download(staged->host().mutable_data(), x);
  staged->begins(host().start_all_reduce(staged->host(), op));
  staged->arrives_at(x);
  return staged;
}

std::unique_ptr<Pending> StagedGroup::do_start_reduce_scatter(View mine, const ConstView& all, Reduce op) {
  auto staged = stage(all);
  device().download(staged->host().mutable_data(), all);
  const std::int64_t first = rank() * mine.size();
  staged->begins(host().start_reduce_scatter(staged->part(mine, first), staged->host(), op));
  staged->arrives_at(mine, first);
  return staged;
}

std::unique_ptr<Pending> StagedGroup::do_start_all_gather(View all, const ConstView& mine) {
  auto staged = stage(all);
  const View part = staged->part(mine, rank() * mine.size());
  device().download(part.mutable_data(), mine);
  staged->begins(host().start_all_gather(staged->host(), part));
  staged->arrives_at(all);
  return staged;
}

std::unique_ptr<Pending> StagedGroup::do_start_send(const ConstView& x, int to) {
  auto staged = stage(x);
  device().download(staged->host().mutable_data(), x);
  staged->begins(host().start_send(staged->host(), to));
  return staged;
}

std::unique_ptr<Pending> StagedGroup::do_start_recv(View x, int from) {
  auto staged = stage(x);
  staged->begins(host().start_recv(staged->host(), from));
  staged->arrives_at(x);
  return staged;
}

void StagedGroup::do_all_reduce(View x, Reduce op) {
  if (size() > 1) do_start_all_reduce(x, op)->wait();
}
void StagedGroup::do_reduce_scatter(View mine, const ConstView& all, Reduce op) {
  size() > 1 ? do_start_reduce_scatter(mine, all, op)->wait() : copy_unless_same(mine, all);
}
void StagedGroup::do_all_gather(View all, const ConstView& mine) {
  size() > 1 ? do_start_all_gather(all, mine)->wait() : copy_unless_same(all, mine);
}
void StagedGroup::do_send(const ConstView& x, int to) { do_start_send(x, to)->wait(); }
void StagedGroup::do_recv(View x, int from) { do_start_recv(x, from)->wait(); }

void StagedGroup::do_broadcast(View x, int root) {
  if (size() == 1) return;
  const auto staged = stage(x);
  if (rank() == root) device().download(staged->host().mutable_data(), x);
  host().broadcast(staged->host(), root);
  if (rank() != root) staged->arrives_at(x);
  staged->wait();
}

}  // namespace distill
