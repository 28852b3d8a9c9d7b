// The check of races, bounds and alignment. -fsanitize=thread makes the compiler call __tsan_read4(address) and the
// like before each access in .cu files; the real ThreadSanitizer is not linked, the calls end here. For every two bytes
// that threads share there is a record of who wrote and read them.
//   Shared memory: two threads touch the same bytes, one of them writes, and no barrier of the block (or __syncwarp,
//   within a warp) lies between. Global memory: the same between two blocks of a launch, where a block that has done an
//   atomic operation counts as ordered after all others ("the last block adds up"). Threads of one block are not
//   compared there.
#include <link.h>

#include <unordered_set>

#include "virtual_gpu/device.h"
#include "virtual_gpu/internal.h"

namespace virtual_gpu {

constinit thread_local bool races_looking = false;

namespace {

struct SharedWord {
  std::uint32_t launch = 0;  // of which it belongs to an array
  std::uint32_t epoch = 0;
  std::uint32_t write_step = 0, read_step = 0;
  std::uint16_t writer = 0, reader = 0;  // thread + 1
  bool atomic = false, other_lanes = false, other_warps = false;
};

// A word of global memory: launch 20 bits, writer 21, atomic 1, reader 22; writer and reader are block + 1.
constexpr std::uint64_t launch_limit = 1 << 20, writer_limit = 1 << 21, many_readers = (1 << 22) - 1;

struct Check {
  Races level = Races::off;
  bool blocks = false;  // global memory, too
  Range own, shared;
  int device = 0;
  std::uint32_t launch = 0, epoch = 1;
  std::uint32_t block = 0;
  bool block_ordered = false;
  int thread = 0;
  std::uint32_t steps[32] = {};  // of each warp: how often its lanes met at __syncwarp
  std::vector<SharedWord> words;
  std::vector<std::pair<const char*, const char*>> arrays;  // end, name
  std::vector<Range> program;                               // constants and static variables
  std::unordered_set<const void*> told;
};
Check& check() {
  static auto* one = new Check;
  return *one;
}

void tell(const void* code, const std::string& text) {
  if (check().told.insert(code).second) report("race", join(text, " at ", code_line(code)));
}

void shared_access(Check& c, std::size_t offset, std::size_t bytes, bool write, bool atomic, const void* code) {
  const auto me = static_cast<std::uint16_t>(c.thread + 1);
  const std::uint32_t step = c.steps[c.thread / 32];
  const auto unordered = [&](std::uint16_t other, std::uint32_t when) {
    return other != 0 && other != me && ((other - 1) / 32 != c.thread / 32 || when == step);
  };
  for (std::size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    SharedWord& w = c.words[i];
    if (w.launch != c.launch) {
      const char* at = c.shared.begin + 2 * i;
      std::string near = "shared memory";
      for (const auto& [end, name] : c.arrays)
        if (end <= at) near = join(at - end, " bytes beyond the end of the shared array ", name);
      fault("out of bounds", join(write ? "write " : "read ", near, " at ", code_line(code)));
    }
    if (w.epoch != c.epoch) w = {.launch = c.launch, .epoch = c.epoch};
    if (unordered(w.writer, w.write_step) && !(atomic && w.atomic))
      tell(code, join("thread ", c.thread, write ? " writes" : " reads", " shared memory that thread ", w.writer - 1,
                      " has written, without a barrier between,"));
    if (write && !atomic &&
        (w.other_warps || unordered(w.reader, w.read_step) || (w.other_lanes && w.read_step == step)))
      tell(code, join("thread ", c.thread, " writes shared memory that thread ", w.reader - 1,
                      " or another has read, without a barrier between,"));
    if (write) {
      w.writer = me, w.write_step = step, w.atomic = atomic;
    } else {
      w.other_warps = w.other_warps || (w.reader != 0 && (w.reader - 1) / 32 != c.thread / 32);
      w.other_lanes = w.read_step == step && (w.other_lanes || (w.reader != 0 && w.reader != me));
      w.reader = me, w.read_step = step;
    }
  }
}

void global_words(Check& c, Allocation& a, std::size_t offset, std::size_t bytes, bool write, bool atomic,
                  const void* code) {
  if (a.words == nullptr) a.words = std::make_unique<std::uint64_t[]>((a.bytes + 1) / 2);
  const std::uint64_t me = c.block + 1, launch = c.launch % launch_limit;
  if (me >= writer_limit) return;
  for (std::size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    std::uint64_t& word = a.words[i];
    std::uint64_t writer = 0, was_atomic = 0, reader = 0;
    if (word >> 44 == launch)
      writer = word >> 23 & (writer_limit - 1), was_atomic = word >> 22 & 1, reader = word & many_readers;
    if (!c.block_ordered && !(atomic && was_atomic)) {
      if (writer != 0 && writer != me)
        tell(code, join("block ", c.block, write ? " writes" : " reads", " device memory that block ", writer - 1,
                        " of the same launch has written"));
      else if (write && !atomic && reader != 0 && reader != me)
        tell(code, join("block ", c.block, " writes device memory that another block of the same launch has read"));
    }
    if (write)
      writer = me, was_atomic = atomic;
    else
      reader = reader == 0 || reader == me ? me : many_readers;
    word = launch << 44 | writer << 23 | was_atomic << 22 | reader;
  }
}

void global_access(Check& c, const void* address, std::size_t bytes, bool write, bool atomic, const void* code) {
  Memory& memory = state().memory;
  Allocation* a = memory.whole(address, bytes);
  if (a == nullptr)
    fault("illegal address", join(write ? "a kernel writes " : "a kernel reads ", bytes, " bytes, ",
                                  memory.describe(address), ", at ", code_line(code)));
  if (a->place == Place::device && a->device != c.device && state().peers.count({c.device, a->device}) == 0)
    fault("illegal address", join("a kernel of device ", c.device, " touches ", memory.describe(address),
                                  " without cudaDeviceEnablePeerAccess, at ", code_line(code)));
  if (c.blocks)
    global_words(c, *a, static_cast<std::size_t>(static_cast<const char*>(address) - a->start), bytes, write, atomic,
                 code);
}

// Neither device memory nor the executor's: the program's constants, or memory of the host.
void other_access(Check& c, const void* address, bool write, const void* code) {
  for (const Range& r : c.program)
    if (r.contains(address)) return;
  fault("illegal address",
        join(write ? "a kernel writes" : "a kernel reads", " host memory that is not pinned at ", code_line(code)));
}

void access(const void* address, std::size_t bytes, bool write, bool atomic, const void* code) {
  Check& c = check();
  if (c.own.contains(address)) return;
  if (c.shared.contains(address))
    shared_access(c, static_cast<std::size_t>(static_cast<const char*>(address) - c.shared.begin), bytes, write, atomic,
                  code);
  else if (state().memory.contains(address))
    global_access(c, address, bytes, write, atomic, code);
  else
    other_access(c, address, write, code);
}
// Only while looking. The check of an access reads memory, too. After a fault it does not come back.
void observed(const void* address, std::size_t bytes, bool write, const void* code) {
  races_looking = false;
  access(address, bytes, write, false, code);
  races_looking = true;
}

int add_segments(dl_phdr_info* info, std::size_t, void* ranges) {
  for (int i = 0; i < info->dlpi_phnum; ++i)
    if (info->dlpi_phdr[i].p_type == PT_LOAD)
      static_cast<std::vector<Range>*>(ranges)->push_back(
          {reinterpret_cast<const char*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr), info->dlpi_phdr[i].p_memsz});
  return 0;
}

}  // namespace

void races_begin_launch(const LaunchShape& shape, Races level, Range own, Range shared) {
  Check& c = check();
  c.level = level;
  c.blocks = level == Races::all && std::uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z > 1;
  c.own = own;
  c.shared = shared;
  c.device = shape.device;
  ++c.launch;
  c.arrays.clear();
  if (c.words.empty()) c.words.resize(shared.bytes / 2 + 1);
  if (c.program.empty()) dl_iterate_phdr(add_segments, &c.program);
}

void races_begin_block(std::uint32_t block) {
  Check& c = check();
  c.block = block;
  c.block_ordered = false;
  ++c.epoch;
}

void races_thread(int thread) { check().thread = thread; }

void races_barrier() { ++check().epoch; }

void races_warp_barrier(int warp) { ++check().steps[warp]; }

void races_shared_array(const void* start, std::size_t bytes, const char* name) {
  Check& c = check();
  const auto first = static_cast<std::size_t>(static_cast<const char*>(start) - c.shared.begin) / 2;
  for (std::size_t i = first; i < first + (bytes + 1) / 2; ++i) c.words[i] = {.launch = c.launch};
  c.arrays.emplace_back(static_cast<const char*>(start) + bytes, name);
}

void races_look(bool yes) { races_looking = yes && check().level != Races::off; }

void races_access(const void* address, std::size_t bytes, bool write, const void* code) {
  if (check().level != Races::off) access(address, bytes, write, false, code);
}

void note_atomic(const void* address, std::size_t bytes) {
  if (check().level == Races::off) return;
  const Unobserved unobserved;
  access(address, bytes, true, true, __builtin_return_address(0));
  check().block_ordered = true;
}

}  // namespace virtual_gpu

// --- the hooks

#define ACCESS(address, bytes, write) \
  if (virtual_gpu::races_looking) virtual_gpu::observed(address, bytes, write, __builtin_return_address(0))
#define HOOKS(n)                                                  \
  void __tsan_read##n(void* p) { ACCESS(p, n, false); }           \
  void __tsan_write##n(void* p) { ACCESS(p, n, true); }           \
  void __tsan_unaligned_read##n(void* p) { ACCESS(p, n, false); } \
  void __tsan_unaligned_write##n(void* p) { ACCESS(p, n, true); } \
  void __tsan_volatile_read##n(void* p) { ACCESS(p, n, false); }  \
  void __tsan_volatile_write##n(void* p) { ACCESS(p, n, true); }
// What gcc hands to the hook of -fsanitize=alignment, whose runtime library is not linked either.
struct Misalignment {
  const char* file;
  std::uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#if !defined(__SANITIZE_ADDRESS__)  // there the real one is linked
void __ubsan_handle_type_mismatch_v1_abort(const Misalignment* what, std::uintptr_t address) {
  const virtual_gpu::Unobserved unobserved;
  const std::string text =
      virtual_gpu::join("an access to ", 1 << what->log_alignment, " aligned bytes at an address ",
                        address % (1u << what->log_alignment), " beyond, at ", what->file, ":", what->line);
  if (virtual_gpu::inside_kernel()) virtual_gpu::fault("misaligned address", text);
  std::fprintf(stderr, "%s\n", text.c_str());
  std::abort();
}
#endif
void __tsan_read_range(void* p, std::size_t bytes) { ACCESS(p, bytes, false); }
void __tsan_write_range(void* p, std::size_t bytes) { ACCESS(p, bytes, true); }

// Atomics of the language itself, in host code of .cu files (reference counts): plainly what they are.
#define ATOMICS(bits, T)                                                                                            \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }           \
  void __tsan_atomic##bits##_store(volatile T* p, T x, int) { __atomic_store_n(p, x, __ATOMIC_SEQ_CST); }           \
  T __tsan_atomic##bits##_exchange(volatile T* p, T x, int) { return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T x, int) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T x, int) { return __atomic_fetch_sub(p, x, __ATOMIC_SEQ_CST); } \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* old, T x, int, int) {                         \
    return __atomic_compare_exchange_n(p, old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                       \
  }                                                                                                                 \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* old, T x, int, int) {                           \
    return __atomic_compare_exchange_n(p, old, x, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                        \
  }
ATOMICS(8, std::uint8_t)
ATOMICS(32, std::uint32_t)
ATOMICS(64, std::uint64_t)
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
