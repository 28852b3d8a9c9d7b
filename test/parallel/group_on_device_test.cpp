// Groups whose tensors lie in device memory give what the group underneath gives for host memory. On
// virtual GPUs host code that touches device memory stops the program.
#include "core/group_on_device.h"

#include <catch2/catch.hpp>
#include <numeric>
#include <vector>

#include "kernels/backends.h"
#include "kernels/gpus.h"
#include "test/support/gpus.h"
#include "test/support/mpi_main.h"

using namespace distill;

namespace {

using Values = std::vector<float>;

Values values(int rank, std::int64_t n) {
  Values x(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = float(std::int64_t(i) * 7 % 13 + rank * 100) + 0.25f;
  return x;
}
View host(Values& x) { return {x.data(), 1, std::int64_t(x.size()), DType::f32}; }

struct OnGpu {
  std::unique_ptr<Device> device;
  std::unique_ptr<Communicator> plain, group;

  enum Kind { staged, nccl };

  explicit OnGpu(Kind kind = staged, GpuTraffic traffic = GpuTraffic::collectives) {
    test::set_up_gpus();
    Communicator& world = test_session().world();
    device = make_cuda_device(world.rank() % int(find_gpus().visible.size()));
    plain = world.split(0, world.rank(), "plain");
    auto host_group = world.split(0, world.rank(), "on GPUs");
    if (kind == nccl)
      group = make_gpu_group(*device, std::move(host_group), traffic);
    else
      group = std::make_unique<StagedGroup>(*device, std::move(host_group));
  }
  ~OnGpu() {
    group.reset();
    plain.reset();
    device.reset();
    for (const std::string& report : test::take_gpu_reports()) FAIL_CHECK(report);
  }
  int rank() const { return group->rank(); }
  int size() const { return group->size(); }
  Tensor upload(const Values& x) const {
    Tensor t = device->tensor(1, std::int64_t(x.size()), DType::f32);
    device->upload(t.view(), x.data());
    return t;
  }
  Values download(const ConstView& x) const {
    Values out(std::size_t(x.size()));
    device->download(out.data(), x);
    return out;
  }
};

void check_collectives(OnGpu::Kind kind) {
  const OnGpu gpu(kind);
  const bool is_started = GENERATE(false, true);
  const std::int64_t n = GENERATE(1, 1000);
  CAPTURE(is_started, n);
  const auto finish = [](const std::unique_ptr<Pending>& pending) { pending->wait(); };

  Values sum = values(gpu.rank(), n);
  Tensor x = gpu.upload(sum);
  gpu.plain->all_reduce(host(sum));
  is_started ? finish(gpu.group->start_all_reduce(x.view())) : gpu.group->all_reduce(x.view());
  CHECK(gpu.download(x.view()) == sum);

  Values largest = values(gpu.rank(), n);
  x = gpu.upload(largest);
  gpu.plain->all_reduce(host(largest), Reduce::max);
  gpu.group->all_reduce(x.view(), Reduce::max);
  CHECK(gpu.download(x.view()) == largest);

  // In place: mine is a part of all.
  Values all = values(gpu.rank(), n * gpu.size());
  x = gpu.upload(all);
  gpu.plain->reduce_scatter(host(all).col_slice(gpu.rank() * n, n), host(all));
  const View mine = x.view().col_slice(gpu.rank() * n, n);
  is_started ? finish(gpu.group->start_reduce_scatter(mine, x.view())) : gpu.group->reduce_scatter(mine, x.view());
  CHECK(gpu.download(mine) == Values(all.begin() + gpu.rank() * n, all.begin() + (gpu.rank() + 1) * n));

  is_started ? finish(gpu.group->start_all_gather(x.view(), mine)) : gpu.group->all_gather(x.view(), mine);
  gpu.plain->all_gather(host(all), host(all).col_slice(gpu.rank() * n, n));
  CHECK(gpu.download(x.view()) == all);

  Values one = values(gpu.rank(), n);
  x = gpu.upload(one);
  gpu.group->broadcast(x.view(), gpu.size() - 1);
  CHECK(gpu.download(x.view()) == values(gpu.size() - 1, n));
}

}  // namespace

TEST_CASE("collectives in device memory are those of the group in host memory", "[mpi]") {
  check_collectives(OnGpu::staged);
}
TEST_CASE("collectives of NCCL are those of the group in host memory", "[mpi][nccl]") {
  check_collectives(OnGpu::nccl);
}

TEST_CASE("tensors and bytes go round between devices, begun and blocking", "[mpi]") {
  const OnGpu gpu;
  const int next = (gpu.rank() + 1) % gpu.size(), before = (gpu.rank() + gpu.size() - 1) % gpu.size();
  Tensor out = gpu.upload(values(gpu.rank(), 500)), in = gpu.upload(Values(500, 0)), in2 = gpu.upload(Values(500, 0));
  {
    const auto first = gpu.group->start_recv(in.view(), before), second = gpu.group->start_recv(in2.view(), before);
    const auto sent = gpu.group->start_send(out.view(), next);
    gpu.device->zero(gpu.upload(Values(5, 1)).view());  // other work of the device goes on meanwhile
    sent->wait();
    gpu.group->start_send(out.view(), next)->wait();
    first->wait();
    second->wait();
    CHECK(second->is_done());
  }
  CHECK(gpu.download(in.view()) == values(before, 500));
  CHECK(gpu.download(in2.view()) == values(before, 500));
  if (gpu.rank() == 0) {
    gpu.group->send("seven b", 1);
    gpu.group->send("", 1);
  } else if (gpu.rank() == 1) {
    CHECK(gpu.group->recv(0) == "seven b");
    CHECK(gpu.group->recv(0).empty());
  }
  gpu.group->barrier();
  CHECK(gpu.group->all_reduce(std::int64_t{gpu.rank()}) == gpu.size() * (gpu.size() - 1) / 2);
  CHECK(gpu.group->broadcast(std::to_string(gpu.rank()), 1) == "1");
}

TEST_CASE("messages over NCCL go one way, while the device goes on", "[mpi][nccl]") {
  const GpuTraffic traffic = GENERATE(GpuTraffic::upward, GpuTraffic::downward);
  const OnGpu gpu(OnGpu::nccl, traffic);
  const int step = traffic == GpuTraffic::upward ? 1 : -1, to = gpu.rank() + step, from = gpu.rank() - step;
  const auto exists = [&](int rank) { return rank >= 0 && rank < gpu.size(); };
  Tensor out = gpu.upload(values(gpu.rank(), 500)), first = gpu.upload(Values(500, 0)),
         second = gpu.upload(Values(500, 0));
  std::vector<std::unique_ptr<Pending>> received, sent;
  // All that is to come is begun before anything is sent, as a pipeline does.
  if (exists(from))
    for (Tensor* in : {&first, &second}) received.push_back(gpu.group->start_recv(in->view(), from));
  if (exists(to)) {
    sent.push_back(gpu.group->start_send(out.view(), to));
    sent.back()->wait();
    gpu.device->add(out.view(), out.view(), out.view());  // after the first was read
    sent.push_back(gpu.group->start_send(out.view(), to));
  }
  for (const auto& pending : received) pending->wait();
  if (exists(from)) {
    Values twice = values(from, 500);
    for (float& x : twice) x += x;
    CHECK(gpu.download(first.view()) == values(from, 500));
    CHECK(gpu.download(second.view()) == twice);
  }
  for (const auto& pending : sent) pending->wait();
  gpu.device->synchronize();
  if (exists(from)) CHECK_THROWS_WITH(gpu.group->send(out.view(), from), Catch::Contains("has no way"));
  gpu.plain->barrier();
}

// Memory that is given back waits for the device, and so for another rank where that has not joined.
TEST_CASE("what was begun over NCCL ends without the others when the group is given up", "[mpi][nccl]") {
  const GpuTraffic traffic = GENERATE(GpuTraffic::collectives, GpuTraffic::upward);
  const OnGpu gpu(OnGpu::nccl, traffic);
  const bool is_sum = traffic == GpuTraffic::collectives;
  {
    Tensor x = gpu.upload(values(gpu.rank(), 500));
    if (is_sum ? gpu.rank() == 0 : gpu.rank() == 1) {
      const auto pending = is_sum ? gpu.group->start_all_reduce(x.view()) : gpu.group->start_recv(x.view(), 0);
      gpu.group->give_up();
      CHECK_THROWS_WITH(pending->wait(), Catch::Contains("was given up"));
    } else {
      gpu.group->give_up();  // NCCL's abort on one GPU of a node may wait for the others'
    }
  }
  gpu.plain->barrier();
}

TEST_CASE("a group of one on a device copies only what is not in its place", "[mpi]") {
  const OnGpu gpu;
  auto alone = gpu.plain->split(gpu.rank(), 0, "alone");
  StagedGroup group(*gpu.device, std::move(alone));
  Tensor x = gpu.upload(values(1, 9)), y = gpu.upload(Values(9, 0));
  group.all_reduce(x.view());
  group.all_gather(y.view(), x.view());
  CHECK(gpu.download(y.view()) == values(1, 9));
  const auto before = test::gpu_copies();
  group.reduce_scatter(y.view(), y.view());
  CHECK(test::gpu_copies() == before);
  Tensor z = gpu.upload(Values(9, 0));
  group.start_reduce_scatter(z.view(), y.view())->wait();
  CHECK(gpu.download(z.view()) == values(1, 9));
}

TEST_CASE("what a peer has not given ends with its error on a device, too", "[mpi]") {
  const OnGpu gpu;
  Patience patience = gpu.group->patience();
  patience.peer_timeout = std::chrono::seconds(1);
  gpu.group->set_patience(patience);
  if (gpu.rank() == 0) {
    Tensor x = gpu.upload(values(0, 10));
    try {
      gpu.group->recv(x.view(), 1);
      FAIL("nobody sends");
    } catch (const Error& error) {
      CHECK(error.code() == ExitCode::peer_lost);
      CHECK_THAT(error.what(), Catch::Contains("gives nothing"));
    }
  }
  gpu.plain->barrier();
}

TEST_CASE("NCCL's wait for a rank that lives but does not join ends after peer_timeout", "[mpi][nccl]") {
  OnGpu gpu(OnGpu::nccl);
  Patience patience = gpu.group->patience();
  patience.peer_timeout = std::chrono::seconds(1);
  gpu.group->set_patience(patience);
  Tensor x = gpu.upload(values(gpu.rank(), 10));
  if (gpu.rank() == 0) {
    gpu.group->all_reduce(x.view());
    try {
      gpu.device->synchronize();
      FAIL("nobody joins");
    } catch (const Error& error) {
      CHECK(error.code() == ExitCode::peer_lost);
      CHECK_THAT(error.what(), Catch::Contains("rank 0 on ") && Catch::Contains("for the other ranks of on GPUs"));
    }
  }
  gpu.plain->barrier();
  if (gpu.rank() != 0) gpu.group->all_reduce(x.view());  // late, so that both can end
  gpu.device->synchronize();
}
