// Groups whose Views lie in a device's memory, over groups that work in host memory.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "core/communicator.h"
#include "core/device.h"

namespace distill {

// What such groups have in common: small things, barriers and splitting are those of the group underneath. Groups split
// off work in host memory.
class GroupOnDevice : public Communicator {
 public:
  void set_patience(const Patience& patience) override;
  void give_up() override;

 protected:
  // The device is used by the thread that makes the calls.
  GroupOnDevice(Device& device, std::unique_ptr<Communicator> host);
  Device& device() const { return device_; }
  Communicator& host() const { return *host_; }
  // What reduce_scatter and all_gather are in a group of one.
  void copy_unless_same(View to, const ConstView& from);

 private:
  void do_barrier() override;
  void do_all_gather_bytes(void* all, const void* mine, std::size_t bytes) override;
  void do_broadcast_bytes(void* x, std::size_t bytes, int root) override;
  void do_send_words(std::span<const std::int32_t> words, int to) override;
  void do_recv_words(std::span<std::int32_t> words, int from) override;
  std::unique_ptr<Communicator> do_split(const std::vector<int>& parents, int group, std::string name) override;

  Device& device_;
  std::unique_ptr<Communicator> host_;
};

// Any group on any device: what is sent is copied to host memory first, what arrives is copied back. The way where the
// devices have none of their own between each other. Beginning an operation waits for the device's work so far.
class StagedGroup final : public GroupOnDevice {
 public:
  StagedGroup(Device& device, std::unique_ptr<Communicator> host);

 private:
  class Staged;
  struct Memory {
    std::unique_ptr<std::byte[]> bytes;
    std::size_t capacity = 0;
  };

  void do_all_reduce(View x, Reduce op) override;
  void do_reduce_scatter(View mine, const ConstView& all, Reduce op) override;
  void do_all_gather(View all, const ConstView& mine) override;
  void do_broadcast(View x, int root) override;
  void do_send(const ConstView& x, int to) override;
  void do_recv(View x, int from) override;
  std::unique_ptr<Pending> do_start_all_reduce(View x, Reduce op) override;
  std::unique_ptr<Pending> do_start_reduce_scatter(View mine, const ConstView& all, Reduce op) override;
  std::unique_ptr<Pending> do_start_all_gather(View all, const ConstView& mine) override;
  std::unique_ptr<Pending> do_start_send(const ConstView& x, int to) override;
  std::unique_ptr<Pending> do_start_recv(View x, int from) override;

  // Kept from call to call, so that a step allocates nothing after the first.
  std::unique_ptr<Staged> stage(const ConstView& like);

  std::vector<Memory> free_;
};

}  // namespace distill
