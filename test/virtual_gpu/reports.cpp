// What was found wrong: printed when found, kept for tests, and the process's exit code.
#include <cxxabi.h>
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "virtual_gpu/internal.h"

namespace virtual_gpu {
namespace {

constexpr int exit_code_of_reports = 98;

std::mutex reports_lock;
std::vector<Report>& reports() {
  static auto* all = new std::vector<Report>;
  return *all;
}

// At the end of the process: what is still alive is a leak, and reports that nobody took are a failure.
void at_exit(int status, void* owner) {
  if (getpid() != static_cast<pid_t>(reinterpret_cast<std::intptr_t>(owner))) return;
  stop_background();
  report_leaks();
  const std::lock_guard held(reports_lock);
  if (reports().empty() || status != 0) return;
  std::fprintf(stderr, "virtual GPU: %zu reports, exit code %d\n", reports().size(), exit_code_of_reports);
  std::fflush(nullptr);
  _exit(exit_code_of_reports);
}

}  // namespace

void report(const std::string& kind, const std::string& text) {
  const std::lock_guard held(reports_lock);
  std::fprintf(stderr, "virtual GPU: %s: %s\n", kind.c_str(), text.c_str());
  reports().push_back({kind, text});
}

std::vector<Report> take_reports() {
  const std::lock_guard held(reports_lock);
  return std::exchange(reports(), {});
}

void watch_exit() {
  static const int once = on_exit(at_exit, reinterpret_cast<void*>(static_cast<std::intptr_t>(getpid())));
  static_cast<void>(once);
}

std::string code_line(const void* address) {
  Dl_info object{};
  if (dladdr(address, &object) == 0) return "?";
  // A return address: the call is just before it.
  const auto offset = static_cast<const char*>(address) - static_cast<const char*>(object.dli_fbase) - 1;
  char command[4096];
  std::snprintf(command, sizeof command, "addr2line -e '%s' 0x%tx 2>/dev/null", object.dli_fname, offset);
  char line[1024] = "";
  if (FILE* pipe = popen(command, "r")) {
    if (std::fgets(line, sizeof line, pipe) == nullptr) line[0] = 0;
    pclose(pipe);
  }
  line[std::strcspn(line, " \n")] = 0;
  if (line[0] != 0 && std::strncmp(line, "??", 2) != 0) return line;
  if (object.dli_sname == nullptr) return "?";
  int status = 0;
  char* name = abi::__cxa_demangle(object.dli_sname, nullptr, nullptr, &status);
  std::string result = status == 0 ? name : object.dli_sname;
  std::free(name);
  return result;
}

}  // namespace virtual_gpu
