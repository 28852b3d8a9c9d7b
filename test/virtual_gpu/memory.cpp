// Device memory: one file in memory (memfd) for each device, mapped once. Every allocation has pages of its own at
// addresses that are never used again, and ends at the end of its last page, so that most accesses beyond it or after
// its end stop the program in any build. Other processes open the file through /proc, so nothing is left behind when a
// process dies.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>

#include "virtual_gpu/internal.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) (static_cast<void>(address), static_cast<void>(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) (static_cast<void>(address), static_cast<void>(bytes))
#endif

namespace virtual_gpu {
namespace {

constexpr std::size_t page = 4096, alignment = 256;
constexpr std::size_t region_bytes = 64ull << 30;
constexpr int guard_byte = 0xA5, poison_byte = 0xFF;  // 0xFF…: NaN in every floating-point format, −1 as an integer

std::size_t rounded(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }

struct sigaction old_handler;

// Who touched memory that it may not: said before the program stops, or before the kernel ends.
void on_fault(int number, siginfo_t* info, void* context) {
  Memory& memory = state().memory;
  if (memory.contains(info->si_addr)) {
    const std::string text = memory.describe(info->si_addr);
    if (inside_kernel()) fault("illegal address", "a kernel touches " + text);
    const std::string line = join("virtual GPU: illegal address: host code touches ", text, "\n");
    if (write(STDERR_FILENO, line.data(), line.size()) < 0) _exit(1);
  }
  sigaction(number, &old_handler, nullptr);  // the access is repeated and handled as before
  static_cast<void>(context);
}

void install_fault_handler() {
  static const bool once = [] {
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &old_handler);
    return true;
  }();
  static_cast<void>(once);
}

}  // namespace

Memory::Memory(const Options& options) {
  // Regions: the devices, pinned host memory, memory of other processes.
  const auto devices = static_cast<std::size_t>(options.devices);
  size_ = (devices + 2) * region_bytes;
  void* space = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) std::perror("virtual GPU: address space"), std::abort();
  base_ = static_cast<char*>(space);
  for (std::size_t d = 0; d <= devices; ++d) {
    const int fd = memfd_create("virtual_gpu", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, region_bytes) != 0 ||
        mmap(base_ + d * region_bytes, region_bytes, PROT_NONE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0) ==
            MAP_FAILED)
      std::perror("virtual GPU: device memory"), std::abort();
    files_.push_back(fd);
  }
  next_.assign(devices + 2, page);
  used_.assign(devices + 2, 0);
  void* table = mmap(nullptr, size_ / page * sizeof *page_owner_, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (table == MAP_FAILED) std::perror("virtual GPU: page table"), std::abort();
  page_owner_ = static_cast<std::uint32_t*>(table);
  if (options.protection_keys) key_ = pkey_alloc(0, PKEY_DISABLE_ACCESS);
  install_fault_handler();
}

Memory::~Memory() {
  for (const auto& a : all_) ASAN_UNPOISON_MEMORY_REGION(a->pages, a->page_bytes);
  munmap(base_, size_);
  munmap(page_owner_, size_ / page * sizeof *page_owner_);
  for (const int fd : files_) close(fd);
  if (key_ >= 0) pkey_free(key_);
}

void Memory::protect(const Allocation& a, bool readable) {
  const int rights = readable ? PROT_READ | PROT_WRITE : PROT_NONE;
  if (a.place == Place::pinned || !readable)
    mprotect(a.pages, a.page_bytes, rights);
  else if (key_ >= 0)
    pkey_mprotect(a.pages, a.page_bytes, rights, key_);
  // Without keys allow() opens and closes.
}

Allocation* Memory::place_at(Place place, int device, std::size_t region, std::size_t bytes, std::size_t page_bytes) {
  if (next_[region] + page_bytes + page > region_bytes) {
    report("address space", "the virtual GPU never uses an address twice and has no more of them");
    return nullptr;
  }
  auto a = std::make_unique<Allocation>();
  a->place = place;
  a->device = device;
  a->bytes = bytes;
  a->pages = base_ + region * region_bytes + next_[region];
  a->page_bytes = page_bytes;
  next_[region] += page_bytes + page;  // a closed page between neighbours
  all_.push_back(std::move(a));
  Allocation& placed = *all_.back();
  std::fill_n(page_owner_ + (placed.pages - base_) / page, page_bytes / page, static_cast<std::uint32_t>(all_.size()));
  return &placed;
}

Allocation* Memory::allocate(Place place, int device, std::size_t bytes, bool usable) {
  const std::size_t region = place == Place::pinned ? files_.size() - 1 : static_cast<std::size_t>(device);
  Allocation* a = place_at(place, device, region, bytes, rounded(rounded(bytes, alignment), page));
  if (a == nullptr) return nullptr;
  a->start = a->pages + a->page_bytes - rounded(bytes, alignment);
  a->usable = false;
  used_[region] += bytes;
  if (usable) open(*a);
  return a;
}

void Memory::open(Allocation& a) {
  a.usable = true;
  protect(a, true);
  allow(true);
  std::memset(a.pages, guard_byte, a.page_bytes);
  std::memset(a.start, poison_byte, a.bytes);
  allow(false);
  ASAN_POISON_MEMORY_REGION(a.pages, static_cast<std::size_t>(a.start - a.pages));
  ASAN_POISON_MEMORY_REGION(a.start + a.bytes, static_cast<std::size_t>(a.pages + a.page_bytes - a.start) - a.bytes);
}

void Memory::release(Allocation& a) {
  if (a.place == Place::foreign) {
    munmap(a.pages, a.page_bytes);
    mmap(a.pages, a.page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    a.freed = true;
    return;
  }
  ASAN_UNPOISON_MEMORY_REGION(a.pages, a.page_bytes);
  allow(true);
  const auto written = [](const char* from, const char* to) {
    return std::find_if(from, to, [](char c) { return c != static_cast<char>(guard_byte); });
  };
  const char *end = a.start + a.bytes, *last = a.pages + a.page_bytes;
  const char *before = written(a.pages, a.start), *beyond = written(end, last);
  if (before != a.start)
    report("out of bounds", join("written ", a.start - before, " bytes before ", describe(a.start)));
  if (beyond != last)
    report("out of bounds", join("written ", beyond - end, " bytes beyond the end of ", describe(a.start)));
  // Others that have it open see NaN; otherwise the memory goes back to the machine.
  if (a.exported) std::memset(a.pages, poison_byte, a.page_bytes);
  allow(false);
  const std::size_t region = a.place == Place::pinned ? files_.size() - 1 : static_cast<std::size_t>(a.device);
  if (!a.exported)
    fallocate(files_[region], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(file_offset(a)),
              static_cast<off_t>(a.page_bytes));
  a.freed = true;
  a.usable = false;
  a.words.reset();
  protect(a, false);
  ASAN_POISON_MEMORY_REGION(a.pages, a.page_bytes);
  used_[region] -= a.bytes;
}

Allocation* Memory::map_foreign(int fd, std::size_t pages_offset, std::size_t page_bytes, std::size_t inside,
                                std::size_t bytes, int device) {
  Allocation* a = place_at(Place::foreign, device, files_.size(), bytes, page_bytes);
  if (a == nullptr) return nullptr;
  a->start = a->pages + inside;
  if (mmap(a->pages, page_bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, fd, static_cast<off_t>(pages_offset)) ==
      MAP_FAILED) {
    a->freed = true;
    return nullptr;
  }
  a->usable = true;
  protect(*a, true);
  return a;
}

std::size_t Memory::file_offset(const Allocation& a) const {
  return static_cast<std::size_t>(a.pages - base_) % region_bytes;
}

Allocation* Memory::find(const void* address) {
  if (!contains(address)) return nullptr;
  const std::uint32_t owner = page_owner_[(static_cast<const char*>(address) - base_) / std::ptrdiff_t{page}];
  return owner == 0 ? nullptr : all_[owner - 1].get();
}

Allocation* Memory::whole(const void* address, std::size_t bytes, bool now) {
  Allocation* a = find(address);
  if (a == nullptr || a->freed || (now && !a->usable)) return nullptr;
  const auto offset = static_cast<const char*>(address) - a->start;
  return offset >= 0 && static_cast<std::size_t>(offset) + bytes <= a->bytes ? a : nullptr;
}

std::vector<Allocation*> Memory::live() const {
  std::vector<Allocation*> all;
  for (const auto& a : all_)
    if (!a->freed) all.push_back(a.get());
  return all;
}

void Memory::allow(bool yes) {
  if (key_ >= 0) {
    pkey_set(key_, yes ? 0 : PKEY_DISABLE_ACCESS);
    return;
  }
  for (const auto& a : all_)
    if (!a->freed && a->usable && a->place != Place::pinned)
      mprotect(a->pages, a->page_bytes, yes ? PROT_READ | PROT_WRITE : PROT_NONE);
}

std::string Memory::describe(const void* address) {
  const Allocation* a = find(address);
  const char* kind[] = {"device memory", "pinned host memory", "device memory of another process", ""};
  if (a == nullptr) return join("an address between allocations of ", kind[0]);
  const auto offset = static_cast<const char*>(address) - a->start;
  std::string where = offset == 0 ? "" : join("byte ", offset, " of ");
  return join(where, kind[static_cast<int>(a->place)], " of ", a->bytes, " bytes",
              a->freed    ? ", freed"
              : a->usable ? ""
                          : ", not yet allocated in stream order",
              a->place == Place::pinned ? std::string() : join(", device ", a->device));
}

}  // namespace virtual_gpu
