// Streams that delay: work runs only when something waits for it. What else may run then, and which of several ready
// streams goes first, is drawn from the seed.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <utility>

#include "virtual_gpu/internal.h"

namespace virtual_gpu {

std::mutex lock;
std::condition_variable changed;
thread_local int current_device = 0;

namespace {

State* the_state = nullptr;
bool closing = false;

// The first error of this thread that the program has not asked about.
thread_local const char* unread_call = nullptr;
thread_local cudaError_t unread_error = cudaSuccess;
thread_local cudaError_t last_error = cudaSuccess;

bool ends_context(int error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorHardwareStackError:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorContained:
    case cudaErrorDevicesUnavailable:
      return true;
    default:
      return false;
  }
}

std::string text_of(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr ? "" : value;
}

// "cudaMalloc:3:cudaErrorMemoryAllocation,ncclAllReduce:1:2"
std::vector<FailurePlan> plans_from_environment() {
  std::vector<FailurePlan> plans;
  std::istringstream list(text_of("VIRTUAL_GPU_FAIL"));
  for (std::string item; std::getline(list, item, ',');) {
    std::istringstream parts(item);
    std::string name, count, error;
    if (!std::getline(parts, name, ':') || !std::getline(parts, count, ':') || !std::getline(parts, error)) {
      report("bad plan", "VIRTUAL_GPU_FAIL wants name:count:error, found " + item);
      continue;
    }
    int code = std::atoi(error.c_str());
    for (int e = 0; code == 0 && e < 1000; ++e)
      if (error == cudaGetErrorName(static_cast<cudaError_t>(e))) code = e;
    if (code == 0) report("bad plan", "VIRTUAL_GPU_FAIL names an unknown error: " + item);
    plans.push_back({name, std::atoi(count.c_str()), code});
  }
  return plans;
}

std::vector<int> visible_devices(int devices) {
  std::vector<int> all;
  const char* listed = std::getenv("CUDA_VISIBLE_DEVICES");
  if (listed == nullptr) {
    for (int d = 0; d < devices; ++d) all.push_back(d);
    return all;
  }
  std::istringstream list(listed);
  for (std::string item; std::getline(list, item, ',');) {
    const int d = item.empty() ? -1 : std::atoi(item.c_str());
    if (d < 0 || d >= devices) break;  // as CUDA: what follows an invalid entry is invisible
    all.push_back(d);
  }
  return all;
}

bool ready(const Stream& s) {
  if (s.busy || s.waiting.empty()) return false;
  for (const Point& p : s.waiting.front().after)
    if (!reached(p)) return false;
  return true;
}

void drop_finished() {
  auto& streams = state().streams;
  for (auto it = streams.begin(); it != streams.end();)
    it = (*it)->destroyed && (*it)->waiting.empty() ? streams.erase(it) : std::next(it);
}

bool run_front(Held& held, const std::shared_ptr<Stream>& stream) {
  Operation& operation = stream->waiting.front();
  stream->busy = true;
  bool done;
  if (operation.unlocked) {
    held.unlock();
    done = operation.run();
    held.lock();
  } else {
    state().memory.allow(true);
    done = operation.run();
    state().memory.allow(false);
  }
  stream->busy = false;
  if (!done) return false;
  stream->waiting.pop_front();
  ++stream->done;
  if (state().lost != cudaSuccess) lose_device(state().lost);
  if (stream->destroyed) drop_finished();
  changed.notify_all();
  return true;
}

// The streams that lead to the points, and how far they must come.
std::map<std::shared_ptr<Stream>, std::uint64_t> ways_to(const std::vector<Point>& points) {
  std::map<std::shared_ptr<Stream>, std::uint64_t> ways;
  std::vector<Point> open = points;
  while (!open.empty()) {
    const Point p = open.back();
    open.pop_back();
    if (p.stream == nullptr || reached(p)) continue;
    std::uint64_t& far = ways[p.stream];
    for (std::uint64_t n = std::max(far, p.stream->done); n < p.count; ++n)
      for (const Point& before : p.stream->waiting[n - p.stream->done].after) open.push_back(before);
    far = std::max(far, p.count);
  }
  return ways;
}

}  // namespace

State& state() {
  if (the_state == nullptr) {
    the_state = new State(options_from_environment());
    the_state->plans = plans_from_environment();
    watch_exit();
  }
  return *the_state;
}

State::State(const Options& o)
    : options(o), memory(o), random(o.seed), visible(visible_devices(o.devices)), owner(getpid()) {
  for (int d = 0; d < o.devices; ++d) {
    auto stream = std::make_shared<Stream>();
    stream->device = d;
    stream->is_default = true;
    default_streams.push_back(stream);
    streams.insert(stream);
  }
}

Options options_from_environment() {
  Options o;
  const auto number = [](const char* name, auto& field) {
    const std::string value = text_of(name);
    if (!value.empty()) field = static_cast<std::remove_reference_t<decltype(field)>>(std::stoull(value));
  };
  number("VIRTUAL_GPU_SEED", o.seed);
  number("VIRTUAL_GPU_DEVICES", o.devices);
  number("VIRTUAL_GPU_DRIVER", o.driver);
  number("VIRTUAL_GPU_RUNTIME", o.runtime);
  number("VIRTUAL_GPU_CAPABILITY", o.capability);
  number("VIRTUAL_GPU_COMPUTE_MODE", o.compute_mode);
  number("VIRTUAL_GPU_PEER_ACCESS", o.peer_access);
  number("VIRTUAL_GPU_ISOLATED", o.isolated);
  number("VIRTUAL_GPU_LAZY_LOADING", o.lazy_loading);
  std::size_t mebibytes = o.memory >> 20;
  number("VIRTUAL_GPU_MEMORY", mebibytes);
  o.memory = mebibytes << 20;
  std::size_t kibibytes = o.shared_memory >> 10;
  number("VIRTUAL_GPU_SHARED_MEMORY", kibibytes);
  o.shared_memory = kibibytes << 10;
  const std::string races = text_of("VIRTUAL_GPU_RACES");
  if (races == "off") o.races = Races::off;
  if (races == "shared") o.races = Races::shared;
  return o;
}

void restart(const Options& options) {
  report_leaks();
  const Held held(lock);
  delete std::exchange(the_state, nullptr);
  the_state = new State(options);
  watch_exit();
  current_device = 0;
  unread_call = nullptr;
  last_error = cudaSuccess;
}

void report_leaks() {
  const Held held(lock);
  if (the_state == nullptr || getpid() != the_state->owner || the_state->lost != cudaSuccess) return;
  State& s = *the_state;
  for (const Allocation* a : s.memory.live()) report("leak", s.memory.describe(a->start));
  for (const auto& stream : s.streams)
    if (!stream->is_default && !stream->destroyed) report("leak", "a stream");
  for (std::size_t i = 0; i < s.events.size(); ++i) report("leak", "an event");
  for (const auto& [kind, count] : s.handles)
    if (count != 0) report("leak", join(count, " of ", kind));
  if (const char* path = std::getenv("VIRTUAL_GPU_CALLS"))
    if (FILE* file = std::fopen(path, "a")) {
      for (const auto& [name, count] : s.calls)
        std::fprintf(file, "%s %llu\n", name.c_str(), static_cast<unsigned long long>(count));
      std::fclose(file);
    }
}

void fail(const std::string& name, int count, int error) {
  const Held held(lock);
  state().plans.push_back({name, count, error});
}

std::uint64_t calls(const std::string& name) {
  const Held held(lock);
  return state().calls[name];
}

std::size_t pending() {
  const Held held(lock);
  std::size_t count = 0;
  for (const auto& stream : state().streams) count += stream->waiting.size();
  return count;
}

int planned_failure(const char* name) {
  State& s = state();
  ++s.calls[name];
  ++s.calls["*"];
  int error = 0;
  for (auto& plan : s.plans)
    if ((plan.name == name || plan.name == "*") && --plan.count == 0) error = plan.error;
  return error;
}

cudaError_t call(const char* name, CallKind kind, const std::function<cudaError_t(Held&)>& body) {
  Held held(lock);
  State& s = state();
  if (getpid() != s.owner) return cudaErrorInitializationError;  // CUDA does not survive fork either
  if (kind == CallKind::work && unread_call != nullptr) {
    report("error not checked",
           join(unread_call, " failed (", cudaGetErrorName(unread_error), "), and the program went on with ", name));
    unread_call = nullptr;
  }
  cudaError_t result = static_cast<cudaError_t>(planned_failure(name));
  if (result != cudaSuccess && ends_context(result)) lose_device(result);
  if (result == cudaSuccess && s.options.driver < CUDART_VERSION / 1000 * 1000) result = cudaErrorInsufficientDriver;
  if (result == cudaSuccess && s.visible.empty()) result = cudaErrorNoDevice;
  if (result == cudaSuccess) result = s.lost;
  if (result == cudaSuccess) {
    result = body(held);
    if (result == cudaSuccess) result = s.lost;
  }
  if (result != cudaSuccess && result != cudaErrorNotReady) {
    last_error = unread_error = result;
    unread_call = name;
  }
  return result;
}

// For cudaGetLastError and cudaPeekAtLastError.
cudaError_t take_last_error(bool keep) {
  const Held held(lock);
  const cudaError_t result = last_error;
  unread_call = nullptr;
  if (!keep) last_error = state().lost;
  return result;
}

std::shared_ptr<Stream> stream_of(cudaStream_t handle) {
  State& s = state();
  if (handle == nullptr || handle == cudaStreamLegacy)
    return s.default_streams[static_cast<std::size_t>(current_device)];
  for (const auto& stream : s.streams)
    if (stream.get() == reinterpret_cast<Stream*>(handle) && !stream->destroyed) return stream;
  report("bad stream", "a call names a stream that does not exist or was destroyed");
  return nullptr;
}

Point end_of(const std::shared_ptr<Stream>& stream) { return {stream, stream->enqueued}; }

bool reached(const Point& p) { return p.stream == nullptr || p.stream->done >= p.count; }

void enqueue(const std::shared_ptr<Stream>& stream, Operation operation) {
  State& s = state();
  // The legacy default stream is ordered with every stream that was not made non-blocking.
  if (stream->is_default) {
    for (const auto& other : s.streams)
      if (other->blocking && other->device == stream->device) operation.after.push_back(end_of(other));
  } else if (stream->blocking) {
    operation.after.push_back(end_of(s.default_streams[static_cast<std::size_t>(stream->device)]));
  }
  stream->waiting.push_back(std::move(operation));
  ++stream->enqueued;
}

bool run_one(Held& held, const std::vector<Point>* towards) {
  std::vector<std::shared_ptr<Stream>> candidates;
  if (towards != nullptr) {
    for (const auto& [stream, far] : ways_to(*towards))
      if (stream->done < far && ready(*stream)) candidates.push_back(stream);
  } else {
    for (const auto& stream : state().streams)
      if (ready(*stream)) candidates.push_back(stream);
  }
  // Addresses, by which the sets are ordered, differ from run to run; the order of creation does not.
  std::sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) { return a->number < b->number; });
  std::shuffle(candidates.begin(), candidates.end(), state().random);
  for (const auto& stream : candidates)
    if (ready(*stream) && run_front(held, stream)) return true;
  return false;
}

void wait_for(Held& held, const std::vector<Point>& points) {
  enum { needed_only, mixed, others_first };
  const auto mood = state().random() % 3;
  const auto arrived = [&] {
    if (state().lost != cudaSuccess) return true;
    for (const Point& p : points)
      if (!reached(p)) return false;
    return true;
  };
  while (!arrived()) {
    const bool others = mood == others_first || (mood == mixed && state().random() % 2 == 0);
    if (others && run_one(held)) continue;
    if (!run_one(held, &points)) changed.wait_for(held, std::chrono::microseconds(100));
  }
}

void lose_device(cudaError_t error) {
  State& s = state();
  s.lost = error;
  for (const auto& stream : s.streams) {
    const std::size_t keep = stream->busy ? 1 : 0;
    while (stream->waiting.size() > keep) stream->waiting.pop_back(), ++stream->done;
  }
  drop_finished();
  changed.notify_all();
}

void need_background() {
  static const bool once = [] {
    std::thread([] {
      while (true) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        Held held(lock);
        if (closing) return;
        if (the_state == nullptr || getpid() != the_state->owner) continue;
        while (run_one(held)) {
        }
      }
    }).detach();
    return true;
  }();
  static_cast<void>(once);
}

void stop_background() {
  const Held held(lock);
  closing = true;
}

bool check_range(const char* what, const void* address, std::size_t bytes, bool now) {
  if (bytes == 0) return true;
  State& s = state();
  if (!s.memory.contains(address)) {
    report("illegal address", join(what, ": host memory that is not pinned"));
    return false;
  }
  if (s.memory.whole(address, bytes, now) != nullptr) return true;
  report("illegal address", join(what, ": ", bytes, " bytes from ", s.memory.describe(address)));
  return false;
}

}  // namespace virtual_gpu
