// What the files of the virtual GPU share. One lock guards everything; kernels run under it, one at a time.
#pragma once

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "virtual_gpu/virtual_gpu.h"

namespace virtual_gpu {

// --- reports.cpp

void report(const std::string& kind, const std::string& text);
// file:line of an address in the program's code, its function where there is no debug information.
std::string code_line(const void* address);
void watch_exit();  // from now on the end of the process reports leaks and changes exit code 0 to 98

template <class... Part>
std::string join(const Part&... part);

// --- memory.cpp

enum class Place { device, pinned, foreign, pageable };  // foreign: another process's, opened by its handle

struct Allocation {
  Place place;
  int device;
  char* start;
  std::size_t bytes;
  char* pages;  // the whole pages around it: guard bytes before and after
  std::size_t page_bytes;
  bool ordered = false;  // by cudaMallocAsync
  bool usable = false;   // cudaMallocAsync: only when the stream has come there
  bool freed = false;
  bool exported = false;
  std::unique_ptr<std::uint64_t[]> words;  // race.cpp: who touched which two bytes, made when first needed
};

class Memory {
 public:
  explicit Memory(const Options& options);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // Address space for `bytes`; nullptr when the device has no more. usable = false leaves it closed until open().
  Allocation* allocate(Place place, int device, std::size_t bytes, bool usable = true);
  void open(Allocation& allocation);     // poisons and lets device code in
  void release(Allocation& allocation);  // checks the guard bytes, closes its pages for good
  Allocation* map_foreign(int fd, std::size_t pages_offset, std::size_t page_bytes, std::size_t inside,
                          std::size_t bytes, int device);

  Allocation* find(const void* address);  // also freed ones; nullptr when the address is not ours
  // The live allocation that contains all of [address, address + bytes), or nullptr; now: it may be used now, not only
  // when the stream of its cudaMallocAsync has come there.
  Allocation* whole(const void* address, std::size_t bytes, bool now = true);
  bool contains(const void* address) const {
    return static_cast<std::size_t>(static_cast<const char*>(address) - base_) < size_;
  }
  std::vector<Allocation*> live() const;
  std::size_t used(int device) const { return used_[static_cast<std::size_t>(device)]; }
  int file(int device) const { return files_[static_cast<std::size_t>(device)]; }
  std::size_t file_offset(const Allocation& allocation) const;

  void allow(bool yes);  // this thread may touch device memory
  std::string describe(const void* address);

 private:
  Allocation* place_at(Place place, int device, std::size_t region, std::size_t bytes, std::size_t page_bytes);
  void protect(const Allocation& allocation, bool readable);

  char* base_ = nullptr;
  std::size_t size_ = 0;
  int key_ = -1;                   // protection key of device memory; -1: mprotect instead
  std::vector<int> files_;         // of each device; shared with other processes through /proc/<pid>/fd
  std::vector<std::size_t> next_;  // of each region; addresses are never used twice
  std::vector<std::size_t> used_;
  std::uint32_t* page_owner_ = nullptr;  // index + 1 into all_
  std::vector<std::unique_ptr<Allocation>> all_;
};

// --- streams

extern thread_local int current_device;
struct Stream;
struct Point {
  std::shared_ptr<Stream> stream;
  std::uint64_t count = 0;  // reached when that many operations are done
};
struct Operation {
  const char* name;
  std::function<bool()> run;  // true when done; false: waits for somebody else, ask again
  std::vector<Point> after;
  bool unlocked = false;  // host code that may take its own locks
};
struct Stream {
  std::uint64_t number = 0;  // order of creation
  int device = 0;
  bool blocking = false;  // ordered with the legacy default stream
  bool is_default = false;
  bool busy = false;
  bool destroyed = false;
  std::deque<Operation> waiting;
  std::uint64_t enqueued = 0, done = 0;
};

struct InterprocessEvent {
  std::uint64_t issued, done;  // records asked for, records reached; touched atomically
};
struct Event {
  int device = current_device;
  bool timing = true, interprocess = false, opened = false;
  bool recorded = false;
  Point point;
  std::shared_ptr<double> milliseconds = std::make_shared<double>(0);
  InterprocessEvent* shared = nullptr;
};

// --- the whole

struct FailurePlan {
  std::string name;
  int count;
  int error;
};

struct State {
  explicit State(const Options& o);
  Options options;
  Memory memory;
  std::mt19937_64 random;
  std::vector<std::shared_ptr<Stream>> default_streams;  // one a device
  std::set<std::shared_ptr<Stream>> streams;             // all with work or a handle
  std::map<Event*, std::unique_ptr<Event>> events;
  std::set<std::pair<int, int>> peers;                        // (from, to) enabled
  std::map<const void*, int> shared_limits;                   // cudaFuncSetAttribute: dynamic bytes
  std::set<const void*> loaded;                               // kernels that were launched
  std::map<std::string, int> handles;                         // live handles of libraries, by kind
  std::map<std::string, std::pair<Allocation*, int>> opened;  // by IPC handle, how often
  std::map<std::string, std::uint64_t> calls;
  std::vector<FailurePlan> plans;
  std::vector<int> visible;        // physical devices, CUDA_VISIBLE_DEVICES applied
  cudaError_t lost = cudaSuccess;  // the error that ended the context
  pid_t owner;
};
extern std::mutex lock;
extern std::condition_variable changed;
State& state();  // made at the first use; the lock is held

// Work goes on by itself from now on: another process waits for ours.
void need_background();
void stop_background();  // the process ends

// The stream of a handle, or nullptr with a report when it was destroyed.
std::shared_ptr<Stream> stream_of(cudaStream_t handle);
void enqueue(const std::shared_ptr<Stream>& stream, Operation operation);
Point end_of(const std::shared_ptr<Stream>& stream);
// Runs what is needed, and by chance more, until all points are reached. Releases the lock while nothing can run.
void wait_for(std::unique_lock<std::mutex>& held, const std::vector<Point>& points);
bool reached(const Point& point);
// Runs one operation of any stream, or of those that lead to the points; false: none can run now.
bool run_one(std::unique_lock<std::mutex>& held, const std::vector<Point>* towards = nullptr);
void lose_device(cudaError_t error);

// Every call begins here: counts it, fails it when that was planned. work: it allocates or enqueues.
enum class CallKind { work, other };
int planned_failure(const char* name);  // 0: none
using Held = std::unique_lock<std::mutex>;
cudaError_t take_last_error(bool keep);
cudaError_t call(const char* name, CallKind kind, const std::function<cudaError_t(Held&)>& body);

// Device memory that an operation is about to use; a report, and false, when it is not one live allocation.
bool check_range(const char* what, const void* address, std::size_t bytes, bool now);

// --- executor.cpp

struct LaunchShape {
  const void* kernel;
  dim3 grid, block;
  std::size_t dynamic_bytes, most_static_bytes;  // shared memory; what remains for the kernel's own arrays
  int device;
};
bool is_launchable(const void* kernel);
struct Body;
Body bind_arguments(const void* kernel, void** arguments);
// Runs all blocks. An error: the kernel was ended by a fault, which is reported.
cudaError_t execute(const LaunchShape& shape, const Body& body);
bool inside_kernel();
// Reports and leaves the kernel.
[[noreturn]] void fault(const std::string& kind, const std::string& text);

// The executor's own memory that kernels may touch: stacks of fibers, what lanes leave each other.
struct Range {
  const char* begin = nullptr;
  std::size_t bytes = 0;
  bool contains(const void* address) const {
    return static_cast<std::size_t>(static_cast<const char*>(address) - begin) < bytes;
  }
};

// --- race.cpp: what kernels read and write, seen through the hooks that -fsanitize=thread puts into .cu files

void races_begin_launch(const LaunchShape& shape, Races level, Range own, Range shared);
void races_begin_block(std::uint32_t block);
void races_thread(int thread);      // which one runs now
void races_barrier();               // all threads of the block have met
void races_warp_barrier(int warp);  // lanes of the warp have met at __syncwarp
void races_shared_array(const void* start, std::size_t bytes, const char* name);
// Only the kernel's own code is looked at: the linker may give us copies of templates that were compiled with the
// hooks.
void races_look(bool yes);
extern constinit thread_local bool races_looking;
class Unobserved {
 public:
  Unobserved() : before_(std::exchange(races_looking, false)) {}
  ~Unobserved() { races_looking = before_; }
  Unobserved(const Unobserved&) = delete;
  Unobserved& operator=(const Unobserved&) = delete;

 private:
  bool before_;
};
void races_access(const void* address, std::size_t bytes, bool write, const void* code);

template <class... Part>
std::string join(const Part&... part) {
  std::string all;
  const auto add = [&](const auto& x) {
    if constexpr (requires { std::to_string(x); })
      all += std::to_string(x);
    else
      all += x;
  };
  (add(part), ...);
  return all;
}

}  // namespace virtual_gpu
