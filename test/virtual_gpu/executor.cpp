// Runs a kernel block after block: one fiber for each CUDA thread that waits, so a kernel without barriers needs a
// single one. A thread runs until it meets a barrier or other lanes; then the next does.
#include <sys/mman.h>

#include <array>
#include <boost/context/detail/fcontext.hpp>
#include <cstring>
#include <exception>
#include <unordered_map>

#include "virtual_gpu/device.h"
#include "virtual_gpu/internal.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace virtual_gpu {

int lane;

namespace {

using boost::context::detail::fcontext_t;
using boost::context::detail::jump_fcontext;
using boost::context::detail::make_fcontext;
using boost::context::detail::transfer_t;

constexpr std::size_t page = 4096, stack_bytes = 256 << 10;
constexpr int most_threads = 1024;
constexpr std::size_t stacks_bytes = most_threads * stack_bytes, own_bytes = stacks_bytes + (64 << 20);
constexpr std::size_t shared_bytes = 227 << 10, shared_gap = 64;

struct Fiber {
  fcontext_t context = nullptr;
  const void* stack = nullptr;  // lowest address
  std::size_t size = 0;
  void* asan_frames = nullptr;
};

// Lanes that meet, named by one mask.
struct Meeting {
  unsigned mask = 0, arrived = 0, readers = 0;
  const char* operation = nullptr;
  Site site{nullptr, 0};
  Orders orders = Orders::nothing;
  std::array<Left, 32> left;
};

struct AsyncCopy {
  void* shared;
  const void* global;
  bool valid;
  int group;
  Site site;
};

enum class Status { fresh, ready, at_barrier, meeting, done };
struct Thread {
  uint3 index;
  int number;
  Status status;
  Fiber* fiber;
  Meeting* last;  // whose values it may still read
  Site site{nullptr, 0};
  int groups_closed;
  std::vector<AsyncCopy> copies;
};

struct SharedArray {
  const void* key;
  char* start;
  std::size_t bytes;
  std::uint64_t block;  // the last one that it was poisoned for
};

struct Executor {
  // the launch
  const Body* body = nullptr;
  bool faulted = false;
  std::string fault_kind;
  bool backwards = false;
  std::vector<SharedArray> arrays;
  std::size_t shared_used = 0, static_used = 0;
  std::size_t dynamic_bytes = 0, most_static = 0;
  // the block
  std::uint64_t block = 0;  // counts all blocks ever run
  int total = 0, started = 0, finished = 0;
  std::vector<Thread> threads = std::vector<Thread>(most_threads);
  std::vector<Thread*> ready;
  std::size_t next_ready = 0;
  std::array<std::vector<Meeting*>, most_threads / 32> meetings;
  int arrived = 0, votes = 0, result = 0;
  Site barrier{nullptr, 0};
  // fibers
  Thread* running = nullptr;
  Fiber main;
  Fiber* current = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  char* stacks = nullptr;  // then the meetings
  std::size_t meetings_used = 0;
  char* shared = nullptr;
};

Executor& executor() {
  static auto* one = new Executor;
  return *one;
}

std::unordered_map<const void*, Bind>& kernels() {
  static auto* all = new std::unordered_map<const void*, Bind>;
  return *all;
}

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
bool same(Site a, Site b) { return a.line == b.line && same(a.file, b.file); }
std::string shown(Site site) { return join(site.file, ":", site.line); }

// --- switching

void arrived_from(transfer_t transfer) {
  *static_cast<fcontext_t*>(transfer.data) = transfer.fctx;
#if defined(__SANITIZE_ADDRESS__)
  Executor& e = executor();
  const void* bottom = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(e.current->asan_frames, &bottom, &size);
  if (e.main.stack == nullptr) e.main.stack = bottom, e.main.size = size;
#endif
}

void switch_to(Fiber* to, [[maybe_unused]] bool for_good = false) {
  Executor& e = executor();
  Fiber* from = e.current;
  e.current = to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from->asan_frames, to->stack, to->size);
#endif
  arrived_from(jump_fcontext(to->context, &from->context));
}

void make_current(Thread& thread) {
  executor().running = &thread;
  threadIdx = thread.index;
  lane = thread.number % 32;
  races_thread(thread.number);
}

Thread* take_fresh() {
  Executor& e = executor();
  if (e.started == e.total) return nullptr;
  const int number = e.backwards ? e.total - 1 - e.started : e.started;
  ++e.started;
  return &e.threads[static_cast<std::size_t>(number)];
}

[[noreturn]] void fiber_main(transfer_t transfer);

Fiber* idle_fiber() {
  Executor& e = executor();
  if (e.idle.empty()) {
    auto fiber = std::make_unique<Fiber>();
    char* low = e.stacks + e.fibers.size() * stack_bytes;
    mprotect(low, page, PROT_NONE);  // an overflow stops here
    // Each stack begins a little lower than the last, else all of them would share a few lines of the processor's
    // cache.
    const std::size_t shift = e.fibers.size() % 128 * (9 * 64);
    fiber->stack = low + page;
    fiber->size = stack_bytes - page - shift;
    e.idle.push_back(fiber.get());
    e.fibers.push_back(std::move(fiber));
  }
  Fiber* fiber = e.idle.back();
  e.idle.pop_back();
  if (fiber->context == nullptr) {
    char* top = static_cast<char*>(const_cast<void*>(fiber->stack)) + fiber->size;
    fiber->context = make_fcontext(top, fiber->size, fiber_main);
  }
  return fiber;
}

// What can run now: a thread that has not started, one that waits no more, or the main context, which looks why none.
void run_another() {
  Executor& e = executor();
  if (e.started < e.total)
    switch_to(idle_fiber());
  else if (e.next_ready < e.ready.size())
    switch_to(e.ready[e.next_ready++]->fiber);
  else
    switch_to(&e.main);
}

void wait_as(Thread& thread, Status status, Site site) {
  thread.status = status;
  thread.site = site;
  run_another();
  make_current(thread);
}

void make_ready(Thread& thread) {
  Executor& e = executor();
  if (e.next_ready == e.ready.size()) e.ready.clear(), e.next_ready = 0;
  thread.status = Status::ready;
  e.ready.push_back(&thread);
}

void finish(Thread& thread) {
  Executor& e = executor();
  if (thread.last != nullptr) thread.last->readers &= ~(1u << lane);
  for (const Meeting* meeting : e.meetings[static_cast<std::size_t>(thread.number / 32)])
    if (meeting->arrived != meeting->mask && (meeting->mask >> lane & 1))
      fault("divergent warp", join("lane ", lane, " has left the kernel, others wait for it in ", meeting->operation,
                                   " at ", shown(meeting->site)));
  if (!thread.copies.empty())
    fault("copy not waited for", "copy_async_16 at " + shown(thread.copies.front().site) + " was never waited for");
  thread.status = Status::done;
  ++e.finished;
}

[[noreturn]] void fiber_main(transfer_t transfer) {
  arrived_from(transfer);
  Executor& e = executor();
  while (true) {
    Fiber* self = e.current;
    while (Thread* thread = take_fresh()) {
      thread->fiber = self;
      make_current(*thread);
      races_look(true);
      try {
        e.body->run(e.body->bound.get());
      } catch (const std::exception& error) {
        fault("exception", join("a kernel threw: ", error.what()));
      }
      races_look(false);
      finish(*thread);
    }
    e.idle.push_back(self);
    run_another();
  }
}

// After a fault: no fiber of the block goes on.
void abandon_fibers() {
  Executor& e = executor();
  e.idle.clear();
  for (const auto& fiber : e.fibers) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(fiber->stack, fiber->size);
#endif
    fiber->context = nullptr;
    fiber->asan_frames = nullptr;
    e.idle.push_back(fiber.get());
  }
}

Meeting* new_meeting() {
  Executor& e = executor();
  char* place = e.stacks + stacks_bytes + e.meetings_used;
  e.meetings_used += sizeof(Meeting);
  if (stacks_bytes + e.meetings_used > own_bytes)
    fault("too many masks", "the lanes of a warp meet under too many masks");
  return new (place) Meeting;
}

std::string who_waits() {
  Executor& e = executor();
  std::map<std::string, int> places;
  for (int i = 0; i < e.total; ++i) {
    const Thread& t = e.threads[static_cast<std::size_t>(i)];
    if (t.status == Status::done)
      ++places["have left the kernel"];
    else
      ++places[join(t.status == Status::at_barrier ? "wait at the barrier " : "wait for lanes of their warp at ",
                    shown(t.site))];
  }
  std::string text = join("of ", e.total, " threads of block ", blockIdx.x, ",", blockIdx.y, ",", blockIdx.z);
  for (const auto& [what, count] : places) text += join(", ", count, " ", what);
  return text;
}

bool run_block(const LaunchShape& shape, uint3 index) {
  Executor& e = executor();
  blockIdx = index;
  ++e.block;
  e.total = static_cast<int>(shape.block.x * shape.block.y * shape.block.z);
  e.started = e.finished = e.arrived = e.votes = 0;
  e.ready.clear();
  e.next_ready = 0;
  for (int i = 0; i < e.total; ++i) {
    Thread& t = e.threads[static_cast<std::size_t>(i)];
    const auto n = static_cast<unsigned>(i);
    t.index = {n % shape.block.x, n / shape.block.x % shape.block.y, n / shape.block.x / shape.block.y};
    t.number = i;
    t.status = Status::fresh;
    t.fiber = nullptr;
    t.last = nullptr;
    t.groups_closed = 0;
    t.copies.clear();
  }
  for (auto& warp : e.meetings)
    for (Meeting* meeting : warp) meeting->mask = meeting->arrived = meeting->readers = 0;
  races_begin_block(index.x + shape.grid.x * (index.y + shape.grid.y * index.z));
  if (e.dynamic_bytes > 0) std::memset(e.shared, 0xFF, e.dynamic_bytes);
  e.current = &e.main;
  e.main.stack = nullptr;  // perhaps another thread's than last time
  switch_to(idle_fiber());
  e.running = nullptr;
  if (!e.faulted && e.finished != e.total) {
    e.faulted = true;
    e.fault_kind = "divergent";
    report(e.arrived > 0 ? "divergent barrier" : "divergent warp", who_waits());
  }
  if (e.faulted) abandon_fibers();
  return !e.faulted;
}

// The same places for every block of a launch.
char* place_shared(std::size_t bytes, const char* name) {
  Executor& e = executor();
  char* start = e.shared + e.shared_used;
  e.shared_used += (bytes + shared_gap + 15) / 16 * 16;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(start, bytes);
#endif
  races_shared_array(start, bytes, name);
  return start;
}

}  // namespace

bool is_launchable(const void* kernel) { return kernels().count(kernel) != 0; }

Body bind_arguments(const void* kernel, void** arguments) { return kernels().at(kernel)(kernel, arguments); }

void make_launchable(const void* kernel, Bind bind) {
  const std::lock_guard held(lock);
  kernels()[kernel] = bind;
}

bool inside_kernel() { return executor().running != nullptr && executor().current != &executor().main; }

void fault(const std::string& kind, const std::string& text) {
  Executor& e = executor();
  report(kind, join(text, " (thread ", threadIdx.x, ",", threadIdx.y, ",", threadIdx.z, " of block ", blockIdx.x, ",",
                    blockIdx.y, ",", blockIdx.z, ")"));
  e.faulted = true;
  e.fault_kind = kind;
  switch_to(&e.main, true);
  std::abort();  // never resumed
}

cudaError_t execute(const LaunchShape& shape, const Body& body) {
  Executor& e = executor();
  constexpr std::size_t room = shared_bytes + 64 * shared_gap;
  if (e.shared == nullptr) {
    e.stacks = static_cast<char*>(
        mmap(nullptr, own_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (e.stacks == MAP_FAILED) std::perror("virtual GPU: stacks"), std::abort();
    e.shared = static_cast<char*>(std::aligned_alloc(page, (room + page - 1) / page * page));
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(e.shared, room);
  ASAN_POISON_MEMORY_REGION(e.shared, room);
#endif
  e.body = &body;
  e.faulted = false;
  e.backwards = state().random() % 2 == 0;
  const bool blocks_backwards = state().random() % 2 == 0;
  e.arrays.clear();
  e.shared_used = e.static_used = 0;
  e.dynamic_bytes = shape.dynamic_bytes;
  e.most_static = shape.most_static_bytes;
  gridDim = shape.grid;
  blockDim = shape.block;
  races_begin_launch(shape, state().options.races, {e.stacks, own_bytes}, {e.shared, room});
  if (shape.dynamic_bytes > 0) place_shared(shape.dynamic_bytes, "dynamic shared memory");
  const std::uint64_t blocks = std::uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  bool whole = true;
  for (std::uint64_t i = 0; whole && i < blocks; ++i) {
    const std::uint64_t n = blocks_backwards ? blocks - 1 - i : i;
    whole = run_block(shape,
                      {static_cast<unsigned>(n % shape.grid.x), static_cast<unsigned>(n / shape.grid.x % shape.grid.y),
                       static_cast<unsigned>(n / shape.grid.x / shape.grid.y)});
  }
  races_look(false);
  if (whole) return cudaSuccess;
  if (e.fault_kind == "illegal address" || e.fault_kind == "out of bounds") return cudaErrorIllegalAddress;
  if (e.fault_kind == "misaligned address") return cudaErrorMisalignedAddress;
  return cudaErrorLaunchFailure;
}

// --- what kernels call

void* shared_array(const void* key, std::size_t bytes, const char* name) {
  const Unobserved unobserved;
  Executor& e = executor();
  SharedArray* found = nullptr;
  for (auto& a : e.arrays)
    if (a.key == key) found = &a;
  if (found == nullptr) {
    e.static_used += bytes;
    if (e.static_used > e.most_static)
      fault("shared memory", join(name, ": ", e.static_used, " bytes of static and ", e.dynamic_bytes,
                                  " of dynamic shared memory are more than was asked for, or than a block has"));
    e.arrays.push_back({key, place_shared(bytes, name), bytes, 0});
    found = &e.arrays.back();
  }
  if (found->block != e.block) {
    std::memset(found->start, 0xFF, bytes);
    found->block = e.block;
  }
  return found->start;
}

void* dynamic_shared() {
  const Unobserved unobserved;
  Executor& e = executor();
  if (e.dynamic_bytes == 0) fault("shared memory", "a kernel asks for dynamic shared memory, its launch gave none");
  return e.shared;
}

int block_barrier(Vote vote, bool value, Site site) {
  const Unobserved unobserved;
  Executor& e = executor();
  Thread& me = *e.running;
  if (e.arrived == 0)
    e.barrier = site, e.votes = 0;
  else if (!same(e.barrier, site))
    fault("divergent barrier",
          join("threads of one block wait at different barriers: ", shown(e.barrier), " and ", shown(site)));
  e.votes += value;
  if (++e.arrived < e.total) {
    wait_as(me, Status::at_barrier, site);
  } else {
    e.arrived = 0;
    e.result = e.votes;
    races_barrier();
    for (int i = 0; i < e.total; ++i) {
      Thread& t = e.threads[static_cast<std::size_t>(e.backwards ? e.total - 1 - i : i)];
      if (t.status == Status::at_barrier) make_ready(t);
    }
    me.status = Status::ready;
  }
  switch (vote) {
    case Vote::count:
      return e.result;
    case Vote::all:
      return e.result == e.total;
    case Vote::any:
      return e.result > 0;
    case Vote::none:
      break;
  }
  return 0;
}

const Left* warp_meet(unsigned mask, const char* operation, const void* data, std::size_t bytes, Orders orders,
                      Site site) {
  const Unobserved unobserved;
  Executor& e = executor();
  Thread& me = *e.running;
  const unsigned my_bit = 1u << lane;
  const int warp = me.number / 32, first = 32 * warp;
  auto& meetings = e.meetings[static_cast<std::size_t>(warp)];
  if (me.last != nullptr) me.last->readers &= ~my_bit;
  if (!(mask & my_bit)) fault("bad mask", join(operation, " at ", shown(site), ": the mask does not name the caller"));
  Meeting* meeting = nullptr;
  Meeting* unused = nullptr;
  for (Meeting* m : meetings) {
    if (m->mask != 0 && m->arrived != m->mask) {
      if (m->mask == mask)
        meeting = m;
      else if (m->mask & my_bit)
        fault("divergent warp", join("lane ", lane, " is in ", operation, " at ", shown(site),
                                     " while others wait for it in ", m->operation, " at ", shown(m->site)));
    } else if (m->readers == 0) {
      unused = m;
    }
  }
  if (meeting == nullptr) {
    if (unused == nullptr) unused = meetings.emplace_back(new_meeting());
    meeting = unused;
    meeting->mask = mask;
    meeting->arrived = 0;
    meeting->operation = operation;
    meeting->site = site;
    meeting->orders = orders;
    for (int other = 0; other < 32; ++other) {
      if (!(mask >> other & 1)) continue;
      if (first + other >= e.total || e.threads[static_cast<std::size_t>(first + other)].status == Status::done)
        fault("bad mask", join(operation, " at ", shown(site), ": the mask names lane ", other,
                               first + other >= e.total ? ", which does not exist" : ", which has left the kernel"));
    }
  } else if (!same(meeting->operation, operation) || (orders == Orders::nothing && !same(meeting->site, site))) {
    fault("divergent warp", join("lanes of one mask are in ", operation, " at ", shown(site), " and in ",
                                 meeting->operation, " at ", shown(meeting->site)));
  }
  if (bytes > 0) std::memcpy(meeting->left[static_cast<std::size_t>(lane)].bytes, data, bytes);
  meeting->arrived |= my_bit;
  me.last = meeting;
  if (meeting->arrived != mask) {
    wait_as(me, Status::meeting, site);
  } else {
    meeting->readers = mask;
    if (orders == Orders::memory) races_warp_barrier(warp);
    for (int i = 0; i < 32; ++i) {
      const int other = e.backwards ? 31 - i : i;
      if (other != lane && (mask >> other & 1)) make_ready(e.threads[static_cast<std::size_t>(first + other)]);
    }
  }
  return meeting->left.data();
}

void bad_source_lane(int from, unsigned, const char* operation, Site site) {
  const Unobserved unobserved;
  fault("bad mask",
        join(operation, " at ", shown(site), " takes the value of lane ", from, ", which the mask does not name"));
}

void trap(Site site) {
  const Unobserved unobserved;
  fault("trap", "__trap at " + shown(site));
}

void copy_async_16(void* shared, const void* global, bool valid, Site site) {
  const Unobserved unobserved;
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0 ||
      (valid && reinterpret_cast<std::uintptr_t>(global) % 16 != 0))
    fault("misaligned address", "copy_async_16 at " + shown(site));
  Thread& me = *executor().running;
  me.copies.push_back({shared, global, valid, me.groups_closed, site});
  // The bytes may arrive from now on; here they do when the thread waits for them.
  races_access(shared, 16, true, __builtin_return_address(0));
  std::memset(shared, 0xFF, 16);
}

void copy_async_commit() { ++executor().running->groups_closed; }

void copy_async_wait_for(int pending) {
  const Unobserved unobserved;
  Thread& me = *executor().running;
  const int ready_before = me.groups_closed - pending;
  std::size_t done = 0;
  for (; done < me.copies.size() && me.copies[done].group < ready_before; ++done) {
    const AsyncCopy& copy = me.copies[done];
    const void* code = __builtin_return_address(0);
    if (copy.valid) races_access(copy.global, 16, false, code);
    races_access(copy.shared, 16, true, code);
    if (copy.valid)
      std::memcpy(copy.shared, copy.global, 16);
    else
      std::memset(copy.shared, 0, 16);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace virtual_gpu
