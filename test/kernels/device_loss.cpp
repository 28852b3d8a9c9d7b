// The loss of the CUDA backend, on the virtual GPU or a real one: operands go to the device and back.
#include <cstddef>
#include <cstring>
#include <memory>
#include <vector>

#include "core/group_on_device.h"
#include "kernels/backends.h"
#include "test/support/loss_chunk.h"

namespace distill::test {
namespace {

// A copy of a view in device memory, as far from a multiple of 16 bytes as the view is, with gaps of our own between
// its rows: host memory there may be another rank's.
class OnDevice {
 public:
  OnDevice(Device& device, const ConstView& host) : device_(device), host_(host) {
    if (!host.data) return;
    storage_ = device.tensor(1, lead() + std::max<std::int64_t>(elements(), 1), host.dtype);
    std::vector<std::byte> all(std::size_t(elements()) * size_of(host.dtype), gap);
    each_row([&](std::size_t at, std::byte* row, std::size_t bytes) { std::memcpy(all.data() + at, row, bytes); });
    device.upload(used(), all.data());
  }
  View view() { return {used().mutable_data(), host_.rows, host_.cols, host_.stride, host_.dtype}; }
  // Into the view. Throws when a gap was written.
  void download() {
    std::vector<std::byte> all(std::size_t(elements()) * size_of(host_.dtype));
    device_.download(all.data(), used());
    std::size_t seen = 0;
    each_row([&](std::size_t at, std::byte* row, std::size_t bytes) {
      for (; seen < at; ++seen) check(all[seen] == gap, "a gap of ", host_, " was written");
      std::memcpy(row, all.data() + at, bytes);
      seen = at + bytes;
    });
  }

 private:
  static constexpr std::byte gap{0x7f};

  // Up to the last element of the last row.
  std::int64_t elements() const { return host_.rows > 0 ? (host_.rows - 1) * host_.stride + host_.cols : 0; }
  std::int64_t lead() const {
    return std::int64_t(reinterpret_cast<std::uintptr_t>(host_.data) % 16 / size_of(host_.dtype));
  }
  View used() { return host_.data ? storage_.view().col_slice(lead(), elements()) : View(); }
  // body(where the row begins, in bytes; the row in host memory; its bytes)
  template <class Body>
  void each_row(Body&& body) {
    const std::size_t size = size_of(host_.dtype);
    for (std::int64_t r = 0; r < host_.rows; ++r) {
      const std::size_t at = std::size_t(r * host_.stride) * size;
      body(at, static_cast<std::byte*>(const_cast<void*>(host_.data)) + at, std::size_t(host_.cols) * size);
    }
  }

  Device& device_;
  ConstView host_;
  Tensor storage_;
};

}  // namespace

void loss_under_test(View dlogits, View terms, const ConstView& student, const ConstView& teacher,
                     const ConstView& labels, const LossSpec& spec, float scale, int, LossScratch&,
                     const VocabularyShard& shard) {
  thread_local const std::unique_ptr<Device> device = make_cuda_device(0);  // ranks may be threads
  OnDevice d(*device, dlogits), t(*device, terms), s(*device, student), q(*device, teacher), l(*device, labels);
  VocabularyShard on_device = shard;
  std::unique_ptr<Communicator> group;
  if (shard.group) {
    group = std::make_unique<StagedGroup>(*device, shard.group->split(0, shard.group->rank(), "vocabulary"));
    on_device.group = group.get();
  }
  device->distill_loss(d.view(), t.view(), s.view(), q.view(), l.view(), spec, scale, on_device);
  d.download();
  t.download();
}

}  // namespace distill::test
