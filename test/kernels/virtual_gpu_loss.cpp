// The loss of the CUDA backend on the virtual GPU: operands go to the device and back with the gaps between their rows.
#include "kernels/backends.h"
#include "test/support/loss_chunk.h"
#include "virtual_gpu/virtual_gpu.h"

namespace distill::test {
namespace {

// A copy of a view in device memory, as far from a multiple of 16 bytes as the view is.
class OnDevice {
 public:
  OnDevice(Device& device, const ConstView& host) : device_(device), host_(host) {
    if (!host.data) return;
    storage_ = device.tensor(1, lead() + std::max<std::int64_t>(elements(), 1), host.dtype);
    if (elements() > 0) device.upload(all(), host.data);
  }
  View view() {
    const View first = storage_.view().col_slice(host_.data ? lead() : 0, 0);
    return {first.mutable_data(), host_.rows, host_.cols, host_.stride, host_.dtype};
  }
  void download(const View& to) {
    if (elements() > 0) device_.download(to.mutable_data(), all());
  }

 private:
  std::int64_t lead() const {
    return std::int64_t(reinterpret_cast<std::uintptr_t>(host_.data) % 16 / size_of(host_.dtype));
  }
  View all() { return storage_.view().col_slice(lead(), elements()); }
  // Up to the last element of the last row.
  std::int64_t elements() const { return host_.rows > 0 ? (host_.rows - 1) * host_.stride + host_.cols : 0; }

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
  device->distill_loss(d.view(), t.view(), s.view(), q.view(), l.view(), spec, scale, shard);
  d.download(dlogits);
  t.download(terms);
}

}  // namespace distill::test
