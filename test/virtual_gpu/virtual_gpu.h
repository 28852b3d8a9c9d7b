// How a test steers the virtual GPU and asks what it saw. The program under test sees only cuda_runtime.h, cublasLt.h
// and nccl.h. README.md lists the environment variables that do the same for a whole process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace virtual_gpu {

enum class Races { off, shared, all };  // all: also between blocks, in global memory

struct Options {
  std::uint64_t seed = 1;                 // order of independent streams and of threads within a block
  int devices = 8;                        // described as H100
  std::size_t memory = 4ull << 30;        // bytes of each
  std::size_t shared_memory = 227 << 10;  // bytes of a block, for a kernel that asks; not more
  bool peer_access = true;                // whether devices can reach each other
  bool isolated = false;                  // devices that CUDA_VISIBLE_DEVICES hides cannot be reached either
  int driver = 13000;                     // what cudaDriverGetVersion says
  int runtime = 0;                        // what cudaRuntimeGetVersion says; 0: the toolkit's
  int capability = 90;                    // compute capability
  int compute_mode = 0;                   // cudaComputeMode; said, not kept to
  Races races = Races::all;
  bool lazy_loading = false;    // the first launch of a kernel waits for all that the device has to do, as it may
  bool protection_keys = true;  // false: host access to device memory is kept out by mprotect, as without PKU
};
Options options_from_environment();

// Starts over: forgets devices, streams, memory and plans to fail; what was still alive is reported as leaked.
void restart(const Options& options);
// Reports everything that is still alive. Called at exit, too.
void report_leaks();

// The `count`th call of this name from now on (1: the next) returns `error` and does nothing. "*": any call.
// Errors that end a context on a real GPU (launch failure, illegal address, ECC …) are returned by every later call.
void fail(const std::string& name, int count, int error);
// How often a call was made since restart; "*": all calls together.
std::uint64_t calls(const std::string& name);

// What was found wrong since the last time. A process with reports that nobody took ends with 98 instead of 0.
struct Report {
  std::string kind;  // "race", "leak", "divergent barrier" …
  std::string text;
};
std::vector<Report> take_reports();

// Operations that were enqueued and not run yet.
std::size_t pending();

}  // namespace virtual_gpu
