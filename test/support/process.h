// Runs a program and collects what it prints, or starts one to be signalled later.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace distill::test {

// Words; NAME=value before the program's name goes to its environment.
class Process {
 public:
  explicit Process(std::vector<std::string> words) {
    int ends[2];
    if (pipe(ends) != 0) throw std::runtime_error("pipe failed");
    pid_ = fork();
    if (pid_ < 0) throw std::runtime_error("fork failed");
    if (pid_ == 0) {
      setpgid(0, 0);
      dup2(ends[1], STDOUT_FILENO);
      dup2(ends[1], STDERR_FILENO);
      close(ends[0]);
      close(ends[1]);
      std::size_t first = 0;
      for (; first < words.size() && words[first].find('=') != std::string::npos; ++first) putenv(words[first].data());
      std::vector<char*> arguments;
      for (std::size_t i = first; i < words.size(); ++i) arguments.push_back(words[i].data());
      arguments.push_back(nullptr);
      execvp(arguments[0], arguments.data());
      _exit(127);
    }
    close(ends[1]);
    output_ = ends[0];
  }
  ~Process() {
    if (pid_ > 0) {
      kill(-pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    close(output_);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  void signal(int number) const { kill(pid_, number); }
  // To the whole group: what a job's end does.
  void signal_group(int number) const { kill(-pid_, number); }

  // Not yet ended; wait() tells how it did.
  bool is_running() const {
    siginfo_t info{};
    return waitid(P_PID, id_t(pid_), &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == 0;
  }

  // Its child with this NAME=value in the environment: a rank of mpirun. 0 where there is none.
  pid_t child_with(const std::string& variable) const {
    for (const pid_t child : children()) {
      std::ifstream environment(in_proc(child, "environ"));
      for (std::string one; std::getline(environment, one, '\0');)
        if (one == variable) return child;
    }
    return 0;
  }
  // Whether a child lives or has memory left to give back; one that has only not been waited for does not count.
  bool has_children() const {
    for (const pid_t child : children())
      if (std::ifstream(in_proc(child, "environ")).peek() != std::ifstream::traits_type::eof()) return true;
    return false;
  }

  struct Result {
    int code;            // exit code, or 128 + signal
    std::string output;  // standard output and error
  };
  Result wait() {
    std::string output;
    char part[4096];
    for (ssize_t n; (n = read(output_, part, sizeof part)) > 0;) output.append(part, std::size_t(n));
    int status = 0;
    waitpid(std::exchange(pid_, -1), &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), output};
  }

 private:
  static std::string in_proc(pid_t process, const std::string& name) {
    return "/proc/" + std::to_string(process) + "/" + name;
  }
  std::vector<pid_t> children() const {
    std::vector<pid_t> all;
    std::ifstream list(in_proc(pid_, "task/" + std::to_string(pid_) + "/children"));
    for (pid_t child; list >> child;) all.push_back(child);
    return all;
  }

  pid_t pid_ = -1;
  int output_ = -1;
};

}  // namespace distill::test
