// A Team whose lanes are real threads, so that ThreadSanitizer sees what lanes share.
#pragma once

#include <barrier>
#include <thread>
#include <vector>

namespace distill {

class ThreadTeam {
 public:
  struct Shared {
    explicit Shared(int n) : barrier(n), slots(std::size_t(n)) {}
    std::barrier<> barrier;
    std::vector<double> slots;
  };
  ThreadTeam(Shared& shared, int lane) : shared_(&shared), lane_(lane) {}

  int lane() const { return lane_; }
  int lanes() const { return int(shared_->slots.size()); }
  template <class T>
  T sum(T x) const {
    return reduce(x, [](double a, double b) { return a + b; });
  }
  template <class T>
  T max(T x) const {
    return reduce(x, [](double a, double b) { return b > a ? b : a; });
  }

 private:
  template <class T, class Combine>
  T reduce(T x, Combine combine) const {
    shared_->slots[std::size_t(lane_)] = double(x);
    shared_->barrier.arrive_and_wait();
    double all = shared_->slots[0];
    for (std::size_t i = 1; i < shared_->slots.size(); ++i) all = combine(all, shared_->slots[i]);
    shared_->barrier.arrive_and_wait();
    return T(all);
  }

  Shared* shared_;
  int lane_;
};

// Runs body(team) on every lane of a team of n threads.
template <class Body>
void run_team(int n, Body&& body) {
  ThreadTeam::Shared shared(n);
  std::vector<std::jthread> threads;
  for (int lane = 0; lane < n; ++lane) threads.emplace_back([&, lane] { body(ThreadTeam(shared, lane)); });
}

}  // namespace distill
