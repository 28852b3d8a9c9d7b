// The loss of the CUDA backend on the virtual GPU: operands go to the device and back with the gaps between their rows.
#include "kernels/backends.h"
#include "test/support/loss_chunk.h"

namespace distill::test {
namespace {

// A copy of a view in device memory.
class OnDevice {
 public:
  OnDevice(Device& device, const ConstView& host) : device_(device), host_(host) {
    if (!host.data) return;
    const View all(const_cast<void*>(host.data), 1, elements(), host.dtype);
    storage_ = device.tensor(1, std::max<std::int64_t>(elements(), 1), host.dtype);
    if (elements() > 0) device.upload(storage_.view().col_slice(0, elements()), all.data);
  }
  View view() { return {storage_.view().mutable_data(), host_.rows, host_.cols, host_.stride, host_.dtype}; }
  void download(const View& to) {
    if (elements() > 0) device_.download(to.mutable_data(), storage_.view().col_slice(0, elements()));
  }

 private:
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
