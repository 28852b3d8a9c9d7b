#include "core/lane.h"

#include <condition_variable>
#include <deque>
#include <exception>
#include <limits>
#include <mutex>
#include <utility>

#include "core/error.h"

namespace distill {

// Operations are numbered from 1; all up to `finished` are done, those from `first_failed` on with `error`.
struct Lane::State {
  std::mutex mutex;
  std::condition_variable came, done;
  std::deque<std::function<void()>> queue;
  bool stops = false;
  std::uint64_t finished = 0, first_failed = std::numeric_limits<std::uint64_t>::max();
  std::exception_ptr error;
  std::atomic<bool> is_given_up{false};

  void run() {
    std::unique_lock lock(mutex);
    for (;;) {
      came.wait(lock, [this] { return stops || !queue.empty(); });
      if (queue.empty()) return;
      const std::function<void()> work = std::move(queue.front());
      queue.pop_front();
      if (!error) {
        lock.unlock();
        std::exception_ptr now = error_of(work);
        lock.lock();
        if (now) {
          error = std::move(now);
          first_failed = finished + 1;
        }
      }
      ++finished;
      done.notify_all();
    }
  }

  void wait_for(std::uint64_t number) {
    std::unique_lock lock(mutex);
    done.wait(lock, [&] { return finished >= number; });
  }
  void throw_failure(std::uint64_t number) {
    const std::lock_guard lock(mutex);
    if (number >= first_failed) std::rethrow_exception(error);
  }
  bool is_finished(std::uint64_t number) {
    const std::lock_guard lock(mutex);
    return finished >= number;
  }

 private:
  std::exception_ptr error_of(const std::function<void()>& work) const {
    try {
      check(!is_given_up.load(std::memory_order_relaxed), "an operation was given up before it began");
      work();
      return nullptr;
    } catch (...) {
      return std::current_exception();
    }
  }
};

class Lane::Started final : public Pending {
 public:
  Started(std::shared_ptr<State> state, std::uint64_t number)
      : state_(std::move(state)), number_(number), exceptions_at_start_(std::uncaught_exceptions()) {}
  ~Started() override {
    if (std::uncaught_exceptions() > exceptions_at_start_ && !is_done()) state_->is_given_up = true;
    state_->wait_for(number_);
  }
  void wait() override {
    state_->wait_for(number_);
    state_->throw_failure(number_);
  }
  bool is_done() const override { return state_->is_finished(number_); }

 private:
  std::shared_ptr<State> state_;
  std::uint64_t number_;
  int exceptions_at_start_;
};

Lane::Lane() : state_(std::make_shared<State>()) {}
Lane::~Lane() { stop(); }

std::unique_ptr<Pending> Lane::start(std::function<void()> work) {
  if (!thread_.joinable()) thread_ = std::thread([state = state_] { state->run(); });
  {
    const std::lock_guard lock(state_->mutex);
    state_->queue.push_back(std::move(work));
  }
  state_->came.notify_one();
  return std::make_unique<Started>(state_, ++started_);
}

void Lane::finish() {
  if (started_ == 0) return;
  state_->wait_for(started_);
  state_->throw_failure(started_);
}

void Lane::stop() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(state_->mutex);
    state_->stops = true;
  }
  state_->came.notify_one();
  thread_.join();
}

void Lane::give_up() { state_->is_given_up.store(true, std::memory_order_relaxed); }
bool Lane::is_given_up() const { return state_->is_given_up.load(std::memory_order_relaxed); }

}  // namespace distill
