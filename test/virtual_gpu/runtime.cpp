// The part of the CUDA runtime's interface that is about memory, streams, events, launches and other processes.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "virtual_gpu/device.h"
#include "virtual_gpu/internal.h"

namespace virtual_gpu {
namespace {

constexpr CallKind work = CallKind::work, other = CallKind::other;

// A call that puts something on a stream.
cudaError_t on_stream(const char* name, cudaStream_t handle,
                      const std::function<cudaError_t(Held&, const std::shared_ptr<Stream>&)>& body) {
  return call(name, work, [&](Held& held) {
    const auto stream = stream_of(handle);
    return stream == nullptr ? cudaErrorInvalidResourceHandle : body(held, stream);
  });
}

std::vector<Point> everything(int device = -1) {
  std::vector<Point> points;
  for (const auto& stream : state().streams)
    if (device < 0 || stream->device == device) points.push_back(end_of(stream));
  return points;
}

Event* event_of(cudaEvent_t handle) {
  const auto& events = state().events;
  const auto found = events.find(reinterpret_cast<Event*>(handle));
  if (found != events.end()) return found->second.get();
  report("bad event", "a call names an event that does not exist or was destroyed");
  return nullptr;
}

Place place_of(const void* address) {
  State& s = state();
  if (!s.memory.contains(address)) return Place::pageable;
  const Allocation* a = s.memory.find(address);
  return a == nullptr ? Place::device : a->place;
}
bool on_device(Place p) { return p == Place::device || p == Place::foreign; }

// --- copies

struct Copy {
  void* to;
  std::size_t to_pitch;
  const void* from;
  std::size_t from_pitch, width, height;
  cudaMemcpyKind kind;
};

std::size_t extent(std::size_t pitch, std::size_t width, std::size_t height) {
  return width == 0 || height == 0 ? 0 : pitch * (height - 1) + width;
}

void copy_rows(const Copy& c) {
  for (std::size_t row = 0; row < c.height; ++row)
    std::memmove(static_cast<char*>(c.to) + row * c.to_pitch, static_cast<const char*>(c.from) + row * c.from_pitch,
                 c.width);
}

// Both ends are one allocation each; now: that may be used now.
bool in_bounds(const char* name, const Copy& c, bool now) {
  const auto end = [&](const void* address, std::size_t pitch) {
    return place_of(address) == Place::pageable || check_range(name, address, extent(pitch, c.width, c.height), now);
  };
  return end(c.to, c.to_pitch) && end(c.from, c.from_pitch);
}
// Where the two ends are must fit the kind.
bool fits(const char* name, const Copy& c, Place to, Place from) {
  const bool to_device = c.kind == cudaMemcpyHostToDevice || c.kind == cudaMemcpyDeviceToDevice;
  const bool from_device = c.kind == cudaMemcpyDeviceToHost || c.kind == cudaMemcpyDeviceToDevice;
  if (c.kind != cudaMemcpyDefault && (on_device(to) != to_device || on_device(from) != from_device)) return false;
  return c.width <= c.to_pitch && c.width <= c.from_pitch && in_bounds(name, c, false);
}
void run_copy(const char* name, const Copy& c) {
  if (in_bounds(name, c, true))
    copy_rows(c);
  else
    state().lost = cudaErrorIllegalAddress;
}

// What CUDA says about when a copy returns ("API synchronization behavior"): to or from pageable memory even an
// asynchronous copy is done with that memory when it returns; between device memories not even a synchronous one waits.
cudaError_t copy(Held& held, const char* name, const std::shared_ptr<Stream>& stream, Copy c, bool synchronous) {
  const Place to = place_of(c.to), from = place_of(c.from);
  if (!fits(name, c, to, from)) return cudaErrorInvalidValue;
  if (c.width == 0 || c.height == 0) return cudaSuccess;
  std::function<bool()> run = [name, c] {
    run_copy(name, c);
    return true;
  };
  if (from == Place::pageable && on_device(to)) {
    auto staged = std::make_shared<std::vector<char>>(c.width * c.height);
    Copy in = c;
    in.to = staged->data();
    in.to_pitch = c.width;
    copy_rows(in);
    run = [name, c, staged] {
      Copy out = c;
      out.from = staged->data();
      out.from_pitch = c.width;
      run_copy(name, out);
      return true;
    };
    if (synchronous) wait_for(held, {end_of(stream)});
    enqueue(stream, {name, run, {}});
    return cudaSuccess;
  }
  enqueue(stream, {name, run, {}});
  const bool between_devices = on_device(to) && on_device(from);
  if ((synchronous && !between_devices) || to == Place::pageable || from == Place::pageable)
    wait_for(held, {end_of(stream)});
  return cudaSuccess;
}

cudaError_t set(Held& held, const char* name, const std::shared_ptr<Stream>& stream, void* to, std::size_t pitch,
                int value, std::size_t width, std::size_t height, bool synchronous) {
  const std::size_t bytes = extent(pitch, width, height);
  if (width > pitch || !check_range(name, to, bytes, false)) return cudaErrorInvalidValue;
  enqueue(stream, {name,
                   [=] {
                     if (!check_range(name, to, bytes, true))
                       state().lost = cudaErrorIllegalAddress;
                     else
                       for (std::size_t row = 0; row < height; ++row)
                         std::memset(static_cast<char*>(to) + row * pitch, value, width);
                     return true;
                   },
                   {}});
  if (synchronous && !on_device(place_of(to))) wait_for(held, {end_of(stream)});
  return cudaSuccess;
}

// --- allocations

cudaError_t give(void** address, Place place, std::size_t bytes) {
  State& s = state();
  *address = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (place == Place::device && s.memory.used(current_device) + bytes > s.options.memory)
    return cudaErrorMemoryAllocation;
  const Allocation* a = s.memory.allocate(place, current_device, bytes);
  if (a == nullptr) return cudaErrorMemoryAllocation;
  *address = a->start;
  return cudaSuccess;
}

// The live allocation that begins here; otherwise says what is wrong with freeing it.
Allocation* to_free(const char* name, const void* address, Place place) {
  State& s = state();
  Allocation* a = s.memory.find(address);
  if (a != nullptr && a->start == address && a->place == place && !a->freed) return a;
  if (a != nullptr && a->freed && a->start == address)
    report("double free", join(name, " of ", s.memory.describe(address)));
  else
    report("bad free",
           join(name, " of ", s.memory.contains(address) ? s.memory.describe(address) : "memory of the host"));
  return nullptr;
}

cudaError_t free_now(Held& held, const char* name, void* address, Place place) {
  if (address == nullptr) return cudaSuccess;
  Allocation* a = to_free(name, address, place);
  if (a == nullptr) return cudaErrorInvalidValue;
  wait_for(held, everything());  // freeing waits for the device
  state().memory.release(*a);
  return cudaSuccess;
}

// --- events

double now_milliseconds() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Counters of interprocess events: a file in memory, like device memory.
constexpr std::size_t event_slots = 65536;
struct EventPage {
  int fd = -1;
  InterprocessEvent* slots = nullptr;
  std::size_t used = 0;
};
EventPage& event_page() {
  static EventPage page;
  if (page.fd < 0) {
    page.fd = memfd_create("virtual_gpu_events", MFD_CLOEXEC);
    constexpr std::size_t bytes = event_slots * sizeof(InterprocessEvent);
    if (page.fd < 0 || ftruncate(page.fd, bytes) != 0) std::perror("virtual GPU: events"), std::abort();
    page.slots = static_cast<InterprocessEvent*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, page.fd, 0));
  }
  return page;
}

std::uint64_t load(const std::uint64_t& x) { return __atomic_load_n(&x, __ATOMIC_ACQUIRE); }

bool event_done(const Event& e) {
  if (e.shared != nullptr) return load(e.shared->done) >= load(e.shared->issued);
  return !e.recorded || reached(e.point);
}

// --- other processes

struct WireHandle {
  std::uint64_t magic;
  pid_t pid;
  int fd;
  int physical_device;
  std::uint64_t offset, page_bytes, inside, bytes;
};
static_assert(sizeof(WireHandle) <= sizeof(cudaIpcMemHandle_t));
constexpr std::uint64_t memory_magic = 0x6d656d6f72790001, event_magic = 0x6576656e74000001;

int open_file(pid_t pid, int fd) { return open(join("/proc/", pid, "/fd/", fd).c_str(), O_RDWR | O_CLOEXEC); }

}  // namespace
}  // namespace virtual_gpu

using namespace virtual_gpu;

// --- memory

cudaError_t cudaMalloc(void** address, size_t bytes) {
  return call("cudaMalloc", work, [&](Held&) { return give(address, Place::device, bytes); });
}
cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  return call("cudaHostAlloc", work, [&](Held&) { return give(address, Place::pinned, bytes); });
}
cudaError_t cudaMallocHost(void** address, size_t bytes) {
  return call("cudaMallocHost", work, [&](Held&) { return give(address, Place::pinned, bytes); });
}
cudaError_t cudaFree(void* address) {
  return call("cudaFree", other, [&](Held& held) { return free_now(held, "cudaFree", address, Place::device); });
}
cudaError_t cudaFreeHost(void* address) {
  return call("cudaFreeHost", other,
              [&](Held& held) { return free_now(held, "cudaFreeHost", address, Place::pinned); });
}

cudaError_t cudaMallocAsync(void** address, size_t bytes, cudaStream_t handle) {
  return on_stream("cudaMallocAsync", handle, [&](Held&, const std::shared_ptr<Stream>& stream) {
    State& s = state();
    *address = nullptr;
    if (bytes == 0) return cudaSuccess;
    if (s.memory.used(stream->device) + bytes > s.options.memory) return cudaErrorMemoryAllocation;
    Allocation* a = s.memory.allocate(Place::device, stream->device, bytes, /*usable=*/false);
    if (a == nullptr) return cudaErrorMemoryAllocation;
    a->ordered = true;
    *address = a->start;
    enqueue(stream, {"cudaMallocAsync",
                     [a] {
                       state().memory.open(*a);
                       return true;
                     },
                     {}});
    return cudaSuccess;
  });
}
cudaError_t cudaFreeAsync(void* address, cudaStream_t handle) {
  return on_stream("cudaFreeAsync", handle, [&](Held&, const std::shared_ptr<Stream>& stream) {
    if (address == nullptr) return cudaSuccess;
    Allocation* a = to_free("cudaFreeAsync", address, Place::device);
    if (a == nullptr) return cudaErrorInvalidValue;
    enqueue(stream, {"cudaFreeAsync",
                     [a] {
                       if (a->freed)
                         report("double free", "cudaFreeAsync of " + state().memory.describe(a->start));
                       else
                         state().memory.release(*a);
                       return true;
                     },
                     {}});
    return cudaSuccess;
  });
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  return call("cudaMemGetInfo", other, [&](Held&) {
    *total = state().options.memory;
    *available = *total - state().memory.used(current_device);
    return cudaSuccess;
  });
}

// --- copies

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return on_stream("cudaMemcpy", nullptr, [&](Held& held, const std::shared_ptr<Stream>& stream) {
    return copy(held, "cudaMemcpy", stream, {to, bytes, from, bytes, bytes, 1, kind}, true);
  });
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t handle) {
  return on_stream("cudaMemcpyAsync", handle, [&](Held& held, const std::shared_ptr<Stream>& stream) {
    return copy(held, "cudaMemcpyAsync", stream, {to, bytes, from, bytes, bytes, 1, kind}, false);
  });
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind kind) {
  return on_stream("cudaMemcpy2D", nullptr, [&](Held& held, const std::shared_ptr<Stream>& stream) {
    return copy(held, "cudaMemcpy2D", stream, {to, to_pitch, from, from_pitch, width, height, kind}, true);
  });
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t handle) {
  return on_stream("cudaMemcpy2DAsync", handle, [&](Held& held, const std::shared_ptr<Stream>& stream) {
    return copy(held, "cudaMemcpy2DAsync", stream, {to, to_pitch, from, from_pitch, width, height, kind}, false);
  });
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return on_stream("cudaMemset", nullptr, [&](Held& held, const std::shared_ptr<Stream>& stream) {
    return set(held, "cudaMemset", stream, to, bytes, value, bytes, 1, true);
  });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t handle) {
  return on_stream("cudaMemsetAsync", handle, [&](Held& held, const std::shared_ptr<Stream>& stream) {
    return set(held, "cudaMemsetAsync", stream, to, bytes, value, bytes, 1, false);
  });
}
cudaError_t cudaMemset2D(void* to, size_t pitch, int value, size_t width, size_t height) {
  return on_stream("cudaMemset2D", nullptr, [&](Held& held, const std::shared_ptr<Stream>& stream) {
    return set(held, "cudaMemset2D", stream, to, pitch, value, width, height, true);
  });
}
cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t handle) {
  return on_stream("cudaMemset2DAsync", handle, [&](Held& held, const std::shared_ptr<Stream>& stream) {
    return set(held, "cudaMemset2DAsync", stream, to, pitch, value, width, height, false);
  });
}

// --- streams

static cudaError_t create_stream(const char* name, cudaStream_t* handle, unsigned flags) {
  return call(name, work, [&](Held&) {
    static std::uint64_t created = 0;
    const auto stream = std::make_shared<Stream>();
    stream->number = ++created;
    stream->device = current_device;
    stream->blocking = (flags & cudaStreamNonBlocking) == 0;
    state().streams.insert(stream);
    *handle = reinterpret_cast<cudaStream_t>(stream.get());
    return cudaSuccess;
  });
}
cudaError_t cudaStreamCreate(cudaStream_t* handle) {
  return create_stream("cudaStreamCreate", handle, cudaStreamDefault);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  return create_stream("cudaStreamCreateWithFlags", handle, flags);
}
// Returns at once; the work that is left still runs.
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  return call("cudaStreamDestroy", other, [&](Held&) {
    const auto stream = stream_of(handle);
    if (stream == nullptr || stream->is_default) return cudaErrorInvalidResourceHandle;
    stream->destroyed = true;
    if (stream->waiting.empty()) state().streams.erase(stream);
    return cudaSuccess;
  });
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return call("cudaStreamSynchronize", other, [&](Held& held) {
    const auto stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    std::vector<Point> points = {end_of(stream)};
    if (stream->is_default)
      for (const auto& s : state().streams)
        if (s->blocking && s->device == stream->device) points.push_back(end_of(s));
    wait_for(held, points);
    return cudaSuccess;
  });
}
// Asking lets something run by and by, so a loop that asks ends.
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return call("cudaStreamQuery", other, [&](Held& held) {
    const auto stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    const Point end = end_of(stream);
    const std::vector<Point> points = {end};
    if (state().random() % 2 == 0) run_one(held, &points);
    return reached(end) ? cudaSuccess : cudaErrorNotReady;
  });
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  return on_stream("cudaStreamWaitEvent", handle, [&](Held&, const std::shared_ptr<Stream>& stream) {
    const Event* e = event_of(event);
    if (e == nullptr) return cudaErrorInvalidResourceHandle;
    if (e->shared != nullptr) {
      const InterprocessEvent* shared = e->shared;
      enqueue(stream, {"wait for another process's event",
                       [shared, record = load(shared->issued)] { return load(shared->done) >= record; },
                       {}});
    } else if (e->recorded) {
      enqueue(stream, {"cudaStreamWaitEvent", [] { return true; }, {e->point}});
    }
    return cudaSuccess;
  });
}
cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  return on_stream("cudaLaunchHostFunc", handle, [&](Held&, const std::shared_ptr<Stream>& stream) {
    enqueue(stream, {"cudaLaunchHostFunc",
                     [=] {
                       function(data);
                       return true;
                     },
                     {},
                     /*unlocked=*/true});
    return cudaSuccess;
  });
}
cudaError_t cudaDeviceSynchronize() {
  return call("cudaDeviceSynchronize", other, [&](Held& held) {
    wait_for(held, everything(current_device));
    return cudaSuccess;
  });
}

// --- events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  return call("cudaEventCreateWithFlags", work, [&](Held&) {
    auto event = std::make_unique<Event>();
    event->timing = (flags & cudaEventDisableTiming) == 0;
    event->interprocess = (flags & cudaEventInterprocess) != 0;
    if (event->interprocess) {
      if (event->timing) return cudaErrorInvalidValue;
      EventPage& page = event_page();
      if (page.used == event_slots) return cudaErrorMemoryAllocation;
      event->shared = &page.slots[page.used++];
    }
    Event* raw = event.get();
    state().events[raw] = std::move(event);
    *handle = reinterpret_cast<cudaEvent_t>(raw);
    return cudaSuccess;
  });
}
cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  return call("cudaEventDestroy", other, [&](Held&) {
    Event* e = event_of(handle);
    if (e == nullptr) return cudaErrorInvalidResourceHandle;
    state().events.erase(e);
    return cudaSuccess;
  });
}
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  return on_stream("cudaEventRecord", stream_handle, [&](Held&, const std::shared_ptr<Stream>& stream) {
    Event* e = event_of(handle);
    if (e == nullptr || e->device != stream->device) return cudaErrorInvalidResourceHandle;
    if (e->shared != nullptr) {
      InterprocessEvent* shared = e->shared;
      const std::uint64_t record = __atomic_add_fetch(&shared->issued, 1, __ATOMIC_ACQ_REL);
      enqueue(stream, {"cudaEventRecord",
                       [shared, record] {
                         if (load(shared->done) < record) __atomic_store_n(&shared->done, record, __ATOMIC_RELEASE);
                         return true;
                       },
                       {}});
    } else {
      enqueue(stream, {"cudaEventRecord",
                       [when = e->milliseconds] {
                         *when = now_milliseconds();
                         return true;
                       },
                       {}});
    }
    e->recorded = true;
    e->point = end_of(stream);
    return cudaSuccess;
  });
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  return call("cudaEventSynchronize", other, [&](Held& held) {
    const Event* e = event_of(handle);
    if (e == nullptr) return cudaErrorInvalidResourceHandle;
    if (e->shared == nullptr) {
      if (e->recorded) wait_for(held, {e->point});
      return cudaSuccess;
    }
    const InterprocessEvent* shared = e->shared;
    const std::uint64_t record = load(shared->issued);
    while (load(shared->done) < record && state().lost == cudaSuccess)
      if (!run_one(held)) changed.wait_for(held, std::chrono::microseconds(100));
    return cudaSuccess;
  });
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  return call("cudaEventQuery", other, [&](Held& held) {
    const Event* e = event_of(handle);
    if (e == nullptr) return cudaErrorInvalidResourceHandle;
    if (!event_done(*e) && state().random() % 2 == 0) {
      const std::vector<Point> points = {e->point};
      run_one(held, e->opened ? nullptr : &points);
    }
    return event_done(*e) ? cudaSuccess : cudaErrorNotReady;
  });
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t first, cudaEvent_t second) {
  return call("cudaEventElapsedTime", other, [&](Held&) {
    const Event *a = event_of(first), *b = event_of(second);
    if (a == nullptr || b == nullptr || !a->timing || !b->timing || !a->recorded || !b->recorded)
      return cudaErrorInvalidResourceHandle;
    if (!event_done(*a) || !event_done(*b)) return cudaErrorNotReady;
    *milliseconds = static_cast<float>(*b->milliseconds - *a->milliseconds);
    return cudaSuccess;
  });
}

// --- launches

// Shared memory of a block, static and dynamic together, of a kernel for which nothing was asked. Static memory alone
// is never more.
static constexpr std::size_t without_asking = 48 << 10;

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  return on_stream("cudaLaunchKernelExC", config->stream, [&](Held& held, const std::shared_ptr<Stream>& stream) {
    const dim3 grid = config->gridDim, block = config->blockDim;
    if (stream->device != current_device) return cudaErrorInvalidResourceHandle;
    if (!is_launchable(kernel)) return cudaErrorInvalidDeviceFunction;
    if (config->numAttrs != 0) return cudaErrorNotSupported;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
      return cudaErrorInvalidConfiguration;
    if (block.x == 0 || block.y == 0 || block.z == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 ||
        block.x * block.y * block.z > 1024)
      return cudaErrorInvalidConfiguration;
    const std::size_t dynamic = config->dynamicSmemBytes;
    const auto asked = state().shared_limits.find(kernel);
    const bool has_asked = asked != state().shared_limits.end();
    if (dynamic > (has_asked ? static_cast<std::size_t>(asked->second) : without_asking)) return cudaErrorInvalidValue;
    const std::size_t most_static =
        has_asked ? std::min(without_asking, state().options.shared_memory - static_cast<std::size_t>(asked->second))
                  : without_asking - dynamic;
    if (state().loaded.insert(kernel).second && state().options.lazy_loading)
      wait_for(held, everything(current_device));
    const LaunchShape shape{kernel, grid, block, dynamic, most_static, stream->device};
    enqueue(stream, {"kernel",
                     [shape, body = bind_arguments(kernel, arguments)] {
                       const cudaError_t result = execute(shape, body);
                       if (result != cudaSuccess) state().lost = result;
                       return true;
                     },
                     {}});
    return cudaSuccess;
  });
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  return call("cudaFuncSetAttribute", work, [&](Held&) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // hints
    if (value < 0 || static_cast<std::size_t>(value) > state().options.shared_memory) return cudaErrorInvalidValue;
    state().shared_limits[kernel] = value;
    return cudaSuccess;
  });
}

// --- between processes

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* address) {
  return call("cudaIpcGetMemHandle", work, [&](Held&) {
    State& s = state();
    Allocation* a = s.memory.find(address);
    // A handle stands for a whole allocation of cudaMalloc; where inside it a pointer points would be lost.
    if (a == nullptr || a->freed || a->place != Place::device || a->ordered || a->start != address)
      return cudaErrorInvalidValue;
    a->exported = true;
    const WireHandle wire{memory_magic,
                          getpid(),
                          s.memory.file(a->device),
                          s.visible[static_cast<std::size_t>(a->device)],
                          s.memory.file_offset(*a),
                          a->page_bytes,
                          static_cast<std::uint64_t>(a->start - a->pages),
                          a->bytes};
    *handle = {};
    std::memcpy(handle, &wire, sizeof wire);
    need_background();
    return cudaSuccess;
  });
}
cudaError_t cudaIpcOpenMemHandle(void** address, cudaIpcMemHandle_t handle, unsigned flags) {
  return call("cudaIpcOpenMemHandle", work, [&](Held&) {
    State& s = state();
    WireHandle wire;
    std::memcpy(&wire, &handle, sizeof wire);
    if (flags != cudaIpcMemLazyEnablePeerAccess || wire.magic != memory_magic) return cudaErrorInvalidValue;
    if (wire.pid == getpid()) return cudaErrorDeviceUninitialized;  // as CUDA: not in the process that exported it
    if (!s.options.peer_access && wire.physical_device != s.visible[static_cast<std::size_t>(current_device)])
      return cudaErrorPeerAccessUnsupported;
    if (s.options.isolated && std::find(s.visible.begin(), s.visible.end(), wire.physical_device) == s.visible.end())
      return cudaErrorInvalidValue;
    auto& [allocation, count] = s.opened[std::string(reinterpret_cast<const char*>(&handle), sizeof handle)];
    if (count == 0) {
      const int fd = open_file(wire.pid, wire.fd);
      if (fd < 0) return cudaErrorMapBufferObjectFailed;
      allocation = s.memory.map_foreign(fd, wire.offset, wire.page_bytes, wire.inside, wire.bytes, current_device);
      close(fd);
      if (allocation == nullptr) return cudaErrorMapBufferObjectFailed;
    }
    ++count;
    *address = allocation->start;
    need_background();
    return cudaSuccess;
  });
}
cudaError_t cudaIpcCloseMemHandle(void* address) {
  return call("cudaIpcCloseMemHandle", other, [&](Held& held) {
    State& s = state();
    for (auto it = s.opened.begin(); it != s.opened.end(); ++it) {
      auto& [allocation, count] = it->second;
      if (count == 0 || allocation->start != address) continue;
      wait_for(held, everything());
      if (--count == 0) {
        s.memory.release(*allocation);
        s.opened.erase(it);
      }
      return cudaSuccess;
    }
    report("bad free", "cudaIpcCloseMemHandle of memory that is not open");
    return cudaErrorInvalidValue;
  });
}
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t event) {
  return call("cudaIpcGetEventHandle", work, [&](Held&) {
    const Event* e = event_of(event);
    if (e == nullptr || !e->interprocess || e->opened) return cudaErrorInvalidResourceHandle;
    const WireHandle wire{
        event_magic, getpid(), event_page().fd, 0, static_cast<std::uint64_t>(e->shared - event_page().slots), 0, 0, 0};
    *handle = {};
    std::memcpy(handle, &wire, sizeof wire);
    need_background();
    return cudaSuccess;
  });
}
cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t handle) {
  return call("cudaIpcOpenEventHandle", work, [&](Held&) {
    WireHandle wire;
    std::memcpy(&wire, &handle, sizeof wire);
    if (wire.magic != event_magic) return cudaErrorInvalidValue;
    if (wire.pid == getpid()) return cudaErrorDeviceUninitialized;
    static std::map<std::pair<pid_t, int>, InterprocessEvent*> mapped;
    InterprocessEvent*& slots = mapped[{wire.pid, wire.fd}];
    if (slots == nullptr) {
      const int fd = open_file(wire.pid, wire.fd);
      if (fd < 0) return cudaErrorMapBufferObjectFailed;
      slots = static_cast<InterprocessEvent*>(
          mmap(nullptr, event_slots * sizeof *slots, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
      close(fd);
    }
    auto opened = std::make_unique<Event>();
    opened->timing = false;
    opened->interprocess = opened->opened = true;
    opened->shared = slots + wire.offset;
    Event* raw = opened.get();
    state().events[raw] = std::move(opened);
    *event = reinterpret_cast<cudaEvent_t>(raw);
    need_background();
    return cudaSuccess;
  });
}
