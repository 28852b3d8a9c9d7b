// The runtime's calls: streams that delay, events, copies, failures on demand, queries, and memory between processes.
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <set>

#include "support/process.h"
#include "virtual_gpu/fresh.h"

using distill::test::Process;
using virtual_gpu::Fresh;
using virtual_gpu::from_device;
using virtual_gpu::on_device;
using virtual_gpu::Options;
using virtual_gpu::taken;

namespace {

std::string self() { return std::filesystem::read_symlink("/proc/self/exe"); }

// Bytes as hexadecimal digits, for the environment of a child.
template <class T>
std::string to_hex(const T& x) {
  std::string digits;
  for (std::size_t i = 0; i < sizeof x; ++i) {
    char two[3];
    std::snprintf(two, sizeof two, "%02x", reinterpret_cast<const unsigned char*>(&x)[i]);
    digits += two;
  }
  return digits;
}
template <class T>
T from_hex(const char* digits) {
  T x;
  for (std::size_t i = 0; i < sizeof x; ++i)
    reinterpret_cast<unsigned char*>(&x)[i] =
        static_cast<unsigned char>(std::stoi(std::string(digits + 2 * i, 2), nullptr, 16));
  return x;
}

void append(void* letters) { *static_cast<std::string*>(letters) += 'x'; }

}  // namespace

TEST_CASE("nothing runs before something waits for it") {
  const Fresh gpu;
  std::string log;
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  for (int i = 0; i < 3; ++i) cudaLaunchHostFunc(stream, append, &log);
  CHECK(virtual_gpu::pending() == 3);
  CHECK(log.empty());
  CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
  CHECK(log == "xxx");
  // Asking again and again is waiting, too.
  cudaLaunchHostFunc(stream, append, &log);
  int asked = 0;
  while (cudaStreamQuery(stream) == cudaErrorNotReady) ++asked;
  CHECK(log == "xxxx");
  CHECK(asked < 100);
  cudaStreamDestroy(stream);
}

TEST_CASE("a stream's order holds, streams among each other run in an order drawn from the seed") {
  std::set<std::string> orders;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const Fresh gpu(Options{.seed = seed});
    struct Note {
      std::string* log;
      char letter;
    };
    std::string log;
    std::vector<Note> notes;
    for (const char c : std::string("abcABC")) notes.push_back({&log, c});
    cudaStream_t streams[2];
    for (auto& s : streams) cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
    for (std::size_t i = 0; i < 6; ++i)
      cudaLaunchHostFunc(
          streams[i / 3], [](void* n) { *static_cast<Note*>(n)->log += static_cast<Note*>(n)->letter; }, &notes[i]);
    cudaDeviceSynchronize();
    std::string lower, upper;
    for (const char c : log) (c >= 'a' ? lower : upper) += c;
    CHECK(lower == "abc");
    CHECK(upper == "ABC");
    orders.insert(log);
    for (auto& s : streams) cudaStreamDestroy(s);
  }
  CHECK(orders.size() > 3);
}

TEST_CASE("waiting for an event runs what is before it, and not what is after") {
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    const Fresh gpu(Options{.seed = seed});
    std::string first, second;
    cudaStream_t a, b;
    cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking);
    cudaEvent_t event;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    CHECK(cudaEventQuery(event) == cudaSuccess);  // never recorded: nothing to wait for
    cudaLaunchHostFunc(a, append, &first);
    cudaEventRecord(event, a);
    cudaStreamWaitEvent(b, event, 0);
    cudaLaunchHostFunc(b, append, &second);
    cudaStreamSynchronize(b);
    CHECK(first == "x");
    CHECK(second == "x");
    cudaEventRecord(event, b);
    CHECK(cudaEventSynchronize(event) == cudaSuccess);
    CHECK(cudaEventQuery(event) == cudaSuccess);
    cudaStreamDestroy(a);
    cudaStreamDestroy(b);
    cudaEventDestroy(event);
  }
}

TEST_CASE("the default stream is ordered with blocking streams and not with non-blocking ones") {
  int unordered = 0;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const Fresh gpu(Options{.seed = seed});
    std::string blocking, apart;
    cudaStream_t a, b;
    cudaStreamCreate(&a);
    cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking);
    cudaLaunchHostFunc(a, append, &blocking);
    cudaLaunchHostFunc(b, append, &apart);
    cudaStreamSynchronize(nullptr);
    CHECK(blocking == "x");
    unordered += apart.empty();
    cudaDeviceSynchronize();
    cudaStreamDestroy(a);
    cudaStreamDestroy(b);
  }
  CHECK(unordered > 2);
}

TEST_CASE("time between two events") {
  const Fresh gpu;
  cudaEvent_t first, second;
  cudaEventCreate(&first);
  cudaEventCreate(&second);
  cudaEventRecord(first, nullptr);
  cudaLaunchHostFunc(
      nullptr, [](void*) { usleep(2000); }, nullptr);
  cudaEventRecord(second, nullptr);
  float milliseconds = 0;
  CHECK(cudaEventElapsedTime(&milliseconds, first, second) == cudaErrorNotReady);
  cudaEventSynchronize(second);
  CHECK(cudaEventElapsedTime(&milliseconds, first, second) == cudaSuccess);
  CHECK(milliseconds >= 2);
  cudaEventDestroy(first);
  cudaEventDestroy(second);
}

TEST_CASE("copies and fills by rows, between devices, and from pageable memory that changes afterwards") {
  const Fresh gpu;
  std::vector<int> host(20);
  for (std::size_t i = 0; i < 20; ++i) host[i] = static_cast<int>(i);
  int* wide = on_device(host);
  int* narrow = on_device(std::vector<int>(6));
  CHECK(cudaMemcpy2D(narrow, 12, wide + 2, 20, 12, 2, cudaMemcpyDeviceToDevice) == cudaSuccess);
  CHECK(from_device(narrow, 6) == std::vector<int>{2, 3, 4, 7, 8, 9});
  CHECK(cudaMemset2D(wide, 20, 0, 8, 4) == cudaSuccess);
  CHECK(from_device(wide, 7) == std::vector<int>{0, 0, 2, 3, 4, 0, 0});
  CHECK(cudaMemcpyAsync(narrow, host.data(), 24, cudaMemcpyHostToDevice, nullptr) == cudaSuccess);
  host[5] = 99;
  CHECK(from_device(narrow, 6)[5] == 5);
  cudaSetDevice(1);
  int* there = on_device(std::vector<int>(6));
  CHECK(cudaMemcpy(there, narrow, 24, cudaMemcpyDeviceToDevice) == cudaSuccess);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  CHECK(from_device(there, 6)[4] == 4);
  CHECK(cudaMemcpy(there, host.data(), 24, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
  cudaGetLastError();
  CHECK(cudaMemcpy(host.data(), there, 8, cudaMemcpyDefault) == cudaSuccess);
  for (int* p : {wide, narrow, there}) cudaFree(p);
}

TEST_CASE("memory in stream order, pinned memory, what is left") {
  const Fresh gpu(Options{.memory = 1000});
  std::size_t available = 0, total = 0;
  void *x = nullptr, *y = nullptr;
  CHECK(cudaMallocAsync(&x, 600, nullptr) == cudaSuccess);
  CHECK(cudaMalloc(&y, 401) == cudaErrorMemoryAllocation);
  CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
  cudaMemGetInfo(&available, &total);
  CHECK(available == 400);
  CHECK(total == 1000);
  CHECK(cudaMemsetAsync(x, 1, 600, nullptr) == cudaSuccess);
  CHECK(cudaFreeAsync(x, nullptr) == cudaSuccess);
  cudaDeviceSynchronize();
  CHECK(cudaMallocHost(&x, 10) == cudaSuccess);
  CHECK(cudaFreeHost(x) == cudaSuccess);
}

TEST_CASE("calls fail by name and count") {
  const Fresh gpu;
  void* x = nullptr;
  virtual_gpu::fail("cudaMalloc", 2, cudaErrorMemoryAllocation);
  CHECK(cudaMalloc(&x, 8) == cudaSuccess);
  cudaFree(x);
  CHECK(cudaMalloc(&x, 8) == cudaErrorMemoryAllocation);
  cudaGetLastError();
  CHECK(virtual_gpu::calls("cudaMalloc") == 2);
  virtual_gpu::fail("*", 2, cudaErrorUnknown);
  int device = 0;
  CHECK(cudaGetDevice(&device) == cudaSuccess);
  CHECK(cudaDeviceSynchronize() == cudaErrorUnknown);
  cudaGetLastError();
  // A lost device stays lost, and its streams are empty.
  cudaMemsetAsync(nullptr, 0, 0, nullptr);
  virtual_gpu::fail("cudaDeviceSynchronize", 1, cudaErrorECCUncorrectable);
  CHECK(cudaDeviceSynchronize() == cudaErrorECCUncorrectable);
  CHECK(cudaMalloc(&x, 8) == cudaErrorECCUncorrectable);
  CHECK(cudaGetLastError() == cudaErrorECCUncorrectable);
  CHECK(cudaGetLastError() == cudaErrorECCUncorrectable);
  CHECK(virtual_gpu::pending() == 0);
  virtual_gpu::take_reports();
}

TEST_CASE("what is seen of devices") {
  {
    const Fresh gpu(Options{.devices = 3});
    int count = 0, can = 0;
    cudaGetDeviceCount(&count);
    CHECK(count == 3);
    cudaDeviceProp properties{};
    CHECK(cudaGetDeviceProperties(&properties, 2) == cudaSuccess);
    CHECK(properties.major == 9);
    CHECK(cudaSetDevice(3) == cudaErrorInvalidDevice);
    cudaGetLastError();
    CHECK(cudaDeviceCanAccessPeer(&can, 0, 1) == cudaSuccess);
    CHECK(can == 1);
  }
  {
    const Fresh gpu(Options{.peer_access = false});
    int can = 1;
    CHECK(cudaDeviceCanAccessPeer(&can, 0, 1) == cudaSuccess);
    CHECK(can == 0);
    CHECK(cudaDeviceEnablePeerAccess(1, 0) == cudaErrorPeerAccessUnsupported);
    cudaGetLastError();
  }
  {
    const Fresh gpu(Options{.devices = 0});
    int count = 1;
    CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice);
    CHECK(count == 0);
    cudaGetLastError();
  }
  {
    const Fresh gpu(Options{.runtime = 13050, .capability = 103, .compute_mode = cudaComputeModeExclusiveProcess});
    int runtime = 0, minor = 0, mode = 0;
    CHECK(cudaRuntimeGetVersion(&runtime) == cudaSuccess);
    CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0) == cudaSuccess);
    CHECK(cudaDeviceGetAttribute(&mode, cudaDevAttrComputeMode, 0) == cudaSuccess);
    CHECK(std::array{runtime, minor, mode} == std::array{13050, 3, int(cudaComputeModeExclusiveProcess)});
  }
  const Fresh gpu(Options{.driver = 12040});
  int version = 0;
  CHECK(cudaDriverGetVersion(&version) == cudaSuccess);
  CHECK(version == 12040);
  CHECK(cudaSetDevice(0) == cudaErrorInsufficientDriver);
  cudaGetLastError();
}

TEST_CASE("asks for memory three times", "[.]") {
  void* x = nullptr;
  int visible = 0;
  cudaGetDeviceCount(&visible);
  std::printf("%d devices:", visible);
  for (int i = 0; i < 3; ++i) {
    std::printf(" %s", cudaGetErrorName(cudaMalloc(&x, 8)));
    cudaGetLastError();
    cudaFree(x);
    x = nullptr;
  }
}
TEST_CASE("the environment plans failures and hides devices") {
  const auto result = Process({"VIRTUAL_GPU_FAIL=cudaMalloc:2:cudaErrorMemoryAllocation,cudaFree:9:1",
                               "CUDA_VISIBLE_DEVICES=5,6", self(), "asks for memory three times"})
                          .wait();
  CHECK_THAT(result.output, Catch::Contains("2 devices: cudaSuccess cudaErrorMemoryAllocation cudaSuccess"));
  CHECK(result.code == 0);
  CHECK_THAT(Process({"VIRTUAL_GPU_FAIL=cudaMalloc:2:nonsense", self(), "asks for memory three times"}).wait().output,
             Catch::Contains("names an unknown error: cudaMalloc:2:nonsense"));
}

// The other process: adds what it reads, in place, after the first event, and says so by the second.
TEST_CASE("a second process opens memory and events", "[.]") {
  cudaSetDevice(1);
  int* x = nullptr;
  REQUIRE(cudaIpcOpenMemHandle(reinterpret_cast<void**>(&x), from_hex<cudaIpcMemHandle_t>(std::getenv("MEMORY")),
                               cudaIpcMemLazyEnablePeerAccess) == cudaSuccess);
  cudaEvent_t filled, answered;
  REQUIRE(cudaIpcOpenEventHandle(&filled, from_hex<cudaIpcEventHandle_t>(std::getenv("FILLED"))) == cudaSuccess);
  REQUIRE(cudaIpcOpenEventHandle(&answered, from_hex<cudaIpcEventHandle_t>(std::getenv("ANSWERED"))) == cudaSuccess);
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaStreamWaitEvent(stream, filled, 0);
  CHECK(cudaMemcpyAsync(x + 500, x, 500 * sizeof(int), cudaMemcpyDeviceToDevice, stream) == cudaSuccess);
  cudaEventRecord(answered, stream);
  cudaStreamSynchronize(stream);
  CHECK(cudaMemset(x, 0, 1001 * sizeof(int)) == cudaErrorInvalidValue);
  taken("illegal address");
  cudaGetLastError();
  CHECK(cudaIpcCloseMemHandle(x) == cudaSuccess);
  cudaEventDestroy(filled);
  cudaEventDestroy(answered);
  cudaStreamDestroy(stream);
}
TEST_CASE("memory and events between two processes") {
  const Fresh gpu;
  std::vector<int> values(1000);
  for (std::size_t i = 0; i < 1000; ++i) values[i] = static_cast<int>(i);
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaEvent_t filled, answered, timed;
  REQUIRE(cudaEventCreateWithFlags(&filled, cudaEventDisableTiming | cudaEventInterprocess) == cudaSuccess);
  REQUIRE(cudaEventCreateWithFlags(&answered, cudaEventDisableTiming | cudaEventInterprocess) == cudaSuccess);
  CHECK(cudaEventCreateWithFlags(&timed, cudaEventInterprocess) == cudaErrorInvalidValue);
  cudaGetLastError();
  int* x = nullptr;
  cudaMalloc(reinterpret_cast<void**>(&x), 1000 * sizeof(int));
  cudaMemcpyAsync(x, values.data(), 4000, cudaMemcpyHostToDevice, stream);
  cudaEventRecord(filled, stream);

  cudaIpcMemHandle_t memory;
  cudaIpcEventHandle_t filled_handle, answered_handle;
  CHECK(cudaIpcGetMemHandle(&memory, x + 1) == cudaErrorInvalidValue);
  cudaGetLastError();
  REQUIRE(cudaIpcGetMemHandle(&memory, x) == cudaSuccess);
  REQUIRE(cudaIpcGetEventHandle(&filled_handle, filled) == cudaSuccess);
  REQUIRE(cudaIpcGetEventHandle(&answered_handle, answered) == cudaSuccess);
  void* again = nullptr;
  CHECK(cudaIpcOpenMemHandle(&again, memory, cudaIpcMemLazyEnablePeerAccess) == cudaErrorDeviceUninitialized);
  cudaGetLastError();
  // The fill is still delayed: the process waits for an event of this one, whose work goes on by itself from now on.
  const auto result =
      Process({"MEMORY=" + to_hex(memory), "FILLED=" + to_hex(filled_handle), "ANSWERED=" + to_hex(answered_handle),
               self(), "a second process opens memory and events"})
          .wait();
  CAPTURE(result.output);
  REQUIRE(result.code == 0);
  CHECK(cudaEventSynchronize(answered) == cudaSuccess);
  CHECK(from_device(x, 1000)[999] == 499);
  const auto refused =
      Process({"VIRTUAL_GPU_PEER_ACCESS=0", "MEMORY=" + to_hex(memory), "FILLED=" + to_hex(filled_handle),
               "ANSWERED=" + to_hex(answered_handle), self(), "a second process opens memory and events"})
          .wait();
  CHECK_THAT(refused.output, Catch::Contains("217 == 0"));  // cudaErrorPeerAccessUnsupported
  cudaFree(x);
  cudaEventDestroy(filled);
  cudaEventDestroy(answered);
  cudaStreamDestroy(stream);
}
