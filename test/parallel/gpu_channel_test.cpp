// The logits channel in GPU memory, between two processes. Rank 0 is the student, rank 1 the teacher.
#include <cuda_runtime_api.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <thread>
#include <vector>

#include "core/train/micro_batch.h"
#include "kernels/backends.h"
#include "test/support/channel_script.h"
#include "test/support/gpus.h"
#include "test/support/mpi_main.h"
#include "test/support/refusal.h"

using namespace distill;
using namespace distill::test;
using Catch::Contains;

namespace {

struct Bench {
  Communicator& world = test_session().world();
  std::unique_ptr<Device> device;
  std::unique_ptr<TeacherSource> source;
  std::unique_ptr<LogitsSink> sink;
  std::string obstacle;

  // Each rank on the GPU of its number, or both on the first one.
  Bench(bool shares_gpu, const GpuSetup& setup = {}) {
    set_up_gpus(setup);
    device = make_cuda_device(shares_gpu ? 0 : world.rank());
  }
  bool is_student() const { return world.rank() == 0; }
  void open(const ChannelShape& of = shape) {
    is_student() ? void(source = open_gpu_source(world, 1, of, *device, obstacle))
                 : void(sink = open_gpu_sink(world, 0, of, *device, obstacle));
  }
  bool is_open() const { return source || sink; }
};

// What the teacher writes by a kernel: another pattern for every chunk.
void fill(Device& device, View chunk, std::int64_t number) {
  device.fill_normal(chunk, 5, std::uint64_t(number), 0, 1);
}

// Calls body(number, positions) for every chunk of some micro-batches; returns the positions of all.
template <class End, class Body>
std::int64_t for_chunks(End& end, const Body& body) {
  std::int64_t number = 0, positions = 0;
  for (int b = 0; b < 12; ++b) {
    const MicroBatch data = batch(b);
    end.begin(data);
    for (const std::int64_t n : chunks_of(data)) {
      body(number++, n);
      positions += n;
    }
  }
  return positions;
}

}  // namespace

namespace {

void check_reading_in_place(bool shares_gpu) {
  const std::uint64_t seed = GENERATE(1, 2, 3);
  CAPTURE(shares_gpu, seed);
  Bench bench(shares_gpu, {.seed = seed});
  ChannelShape wide = shape;
  wide.columns *= gpu_scale();
  bench.open(wide);
  INFO(bench.obstacle);
  REQUIRE(bench.is_open());
  Device& device = *bench.device;
  constexpr std::int64_t most = 64;
  Tensor sums = device.tensor(1, most, DType::f64), expected = device.tensor(1, most, DType::f64),
         own = device.tensor(wide.positions, wide.columns, wide.dtype);
  device.zero(sums.view());
  device.zero(expected.view());
  device.synchronize();
  const std::uint64_t before = gpu_copies();
  if (!bench.is_student()) {
    for_chunks(*bench.sink, [&](std::int64_t number, std::int64_t n) {
      fill(device, bench.sink->acquire(n), number);
      bench.sink->publish();
    });
  } else {
    const std::int64_t positions = for_chunks(*bench.source, [&](std::int64_t number, std::int64_t n) {
      const ConstView logits = bench.source->acquire(n);
      device.sum_of_squares(sums.view().col_slice(number, 1), logits);
      bench.source->release();
      fill(device, own.view().row_slice(0, n), number);
      device.sum_of_squares(expected.view().col_slice(number, 1), own.view().row_slice(0, n));
    });
    CHECK(positions > 100);
    // Width of the shard × 2 bytes a position, and nothing was copied on the way.
    CHECK(bench.source->bytes_moved() == positions * wide.columns * 2);
    std::vector<double> found(most), wanted(most);
    const std::uint64_t so_far = gpu_copies();
    CHECK(so_far == before);
    device.download(found.data(), sums.view());
    device.download(wanted.data(), expected.view());
    CHECK(found == wanted);
    CHECK(wanted[0] > 0);
  }
  bench.world.barrier();
  if (!bench.is_student()) CHECK(gpu_copies() == before);
  bench.source.reset();  // the teacher waits for it
  bench.sink.reset();
  bench.device.reset();
  for (const std::string& report : take_gpu_reports()) FAIL_CHECK(report);
}

}  // namespace

TEST_CASE("kernels read the teacher's logits where it wrote them", "[mpi][one gpu]") { check_reading_in_place(true); }
TEST_CASE("kernels read the logits in another GPU's memory", "[mpi][two gpus]") { check_reading_in_place(false); }

// A student that comes early and one whose GPU is busy until the logits are there. The teacher sleeps half a second.
TEST_CASE("the time counts in which the GPU waits, and not the host", "[mpi][two gpus]") {
  using namespace std::chrono_literals;
  const bool is_busy = GENERATE(false, true);
  CAPTURE(is_busy);
  Bench bench(/*shares_gpu=*/false);
  bench.open();
  REQUIRE(bench.is_open());
  std::atomic<bool> may_go_on = false;
  const MicroBatch data = batch(1);
  const std::int64_t positions = chunks_of(data).front();
  bench.world.barrier();
  if (!bench.is_student()) {
    std::this_thread::sleep_for(500ms);
    bench.sink->begin(data);
    fill(*bench.device, bench.sink->acquire(positions), 0);
    bench.sink->publish();
    bench.device->synchronize();
    CHECK(bench.sink->seconds_waited() < 0.2);
  } else {
    const auto hold = [](void* flag) {
      while (!*static_cast<std::atomic<bool>*>(flag)) std::this_thread::sleep_for(1ms);
    };
    const auto stream = static_cast<cudaStream_t>(bench.device->native_stream());
    if (is_busy) REQUIRE(cudaLaunchHostFunc(stream, hold, &may_go_on) == cudaSuccess);
    bench.source->begin(data);
    bench.source->acquire(positions);
    std::this_thread::sleep_for(100ms);  // so that the logits are written
    may_go_on = true;
    bench.device->synchronize();
    const double waited = bench.source->seconds_waited();
    CAPTURE(waited);
    CHECK((is_busy ? waited < 0.3 : waited > 0.4));
    bench.source->release();
  }
  bench.world.barrier();
  bench.source.reset();
  bench.sink.reset();
  bench.device.reset();
  for (const std::string& report : take_gpu_reports()) FAIL_CHECK(report);
}

TEST_CASE("GPUs that do not reach each other: both ends know, and why", "[mpi][apart]") {
  const GpuSetup setup{.peer_access = false};
  {
    Bench apart(/*shares_gpu=*/false, setup);
    apart.open();
    CHECK_FALSE(apart.is_open());
    CHECK_THAT(apart.obstacle, Contains("cudaIpcOpenMemHandle: cudaErrorPeerAccessUnsupported (peer access"));
  }
  Bench together(/*shares_gpu=*/true, setup);
  together.open();
  CHECK(together.is_open());
  together.source.reset();
}

namespace {

struct FailingCall {
  std::string name;
  bool is_students;
};
FailingCall call_between_processes() {
  const FailingCall call =
      GENERATE(FailingCall{"cudaIpcGetMemHandle", false}, FailingCall{"cudaIpcGetEventHandle", false},
               FailingCall{"cudaIpcOpenMemHandle", true}, FailingCall{"cudaIpcOpenEventHandle", true},
               FailingCall{"cudaIpcGetEventHandle", true}, FailingCall{"cudaIpcOpenEventHandle", false});
  return call;
}

}  // namespace

// Machines say in different ways that a process gets no access to another's memory or events.
TEST_CASE("a machine that shares nothing between processes: both ends know, and why", "[mpi][virtual]") {
  const FailingCall call = call_between_processes();
  const int failure = GENERATE(cudaErrorInvalidValue, cudaErrorInvalidResourceHandle, cudaErrorNotSupported);
  CAPTURE(call.name, call.is_students, failure);
  {
    Bench bench(/*shares_gpu=*/false);
    if (bench.is_student() == call.is_students) fail_next(call.name, failure);
    bench.open();
    CHECK_FALSE(bench.is_open());
    CHECK_THAT(bench.obstacle, Contains(call.name + ": " + cudaGetErrorName(cudaError_t(failure)) + " ("));
    bench.world.barrier();
  }
  for (const std::string& report : take_gpu_reports()) FAIL_CHECK(report);
}

TEST_CASE("a GPU that is lost while the channel is opened is the same error on both sides", "[mpi][virtual]") {
  const FailingCall call = call_between_processes();
  CAPTURE(call.name, call.is_students);
  Bench bench(/*shares_gpu=*/false);
  if (bench.is_student() == call.is_students) fail_next(call.name, cudaErrorECCUncorrectable);
  const Error error = error_of([&] { bench.open(); });
  CHECK(error.code() == ExitCode::internal);
  CHECK_THAT(error.what(), Contains("cudaErrorECCUncorrectable"));
  bench.world.barrier();
}

TEST_CASE("an allocation that fails while the channel is opened is the same error on both sides", "[mpi][virtual]") {
  Bench bench(/*shares_gpu=*/false);
  if (!bench.is_student()) fail_next("cudaMalloc", cudaErrorInvalidValue);
  const Error error = error_of([&] { bench.open(); });
  CHECK(error.code() == ExitCode::internal);
  CHECK_THAT(error.what(), Contains("cudaErrorInvalidValue"));
  bench.world.barrier();
}

TEST_CASE("the two ends must agree on the shape", "[mpi][one gpu]") {
  Bench bench(/*shares_gpu=*/true);
  ChannelShape mine = shape;
  mine.columns += bench.is_student();
  const Error error = error_of([&] { bench.open(mine); });
  CHECK_THAT(error.what(), Contains("the logits channel between") && Contains("on the other"));
  bench.world.barrier();
}

TEST_CASE("a teacher whose student has left gets no more slots", "[mpi][two gpus]") {
  Bench bench(/*shares_gpu=*/false);
  bench.open();
  if (bench.is_student()) {
    bench.source.reset();
  } else {
    bench.sink->begin(batch(3));
    int taken = 0;
    for (View slot = bench.sink->acquire(1); slot.data && taken < 1000; slot = bench.sink->acquire(1)) {
      bench.sink->publish();
      bench.sink->begin(batch(3));
      ++taken;
    }
    CHECK(taken <= shape.slots);
    bench.sink.reset();
  }
  bench.world.barrier();
}
