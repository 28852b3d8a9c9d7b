// Steps whose loss or gradient norm stands out from those before: a damaged batch, or a run about to diverge.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <string_view>
#include <utility>
#include <vector>

namespace distill {

// warn: it is said, and the step is taken. skip: it is said, and the step changes nothing, as one that is not finite.
// stop: the run saves the state before the step and ends.
enum class OutlierAction { off, warn, skip, stop };
inline constexpr std::array<std::string_view, 4> outlier_action_names = {"off", "warn", "skip", "stop"};

// The last values of a series that were accepted, and how far another is above them. A value far below is no outlier:
// that is what training is for.
class OutlierWindow {
 public:
  // size: how many values are kept, at least 2.
  explicit OutlierWindow(std::size_t size) : size_(size) {}

  // (value − mean) / standard deviation of the kept values (the sample's: over n − 1); 0 until they are as many as fit.
  double zscore(double value) const {
    if (values_.size() < size_ || value == mean()) return 0;
    return (value - mean()) / deviation();
  }
  double mean() const { return std::accumulate(values_.begin(), values_.end(), 0.0) / double(values_.size()); }
  double deviation() const {
    const double centre = mean();
    double squares = 0;
    for (const double value : values_) squares += (value - centre) * (value - centre);
    return std::sqrt(squares / double(values_.size() - 1));
  }

  void accept(double value) {
    values_.push_back(value);
    drop_oldest();
  }

  // Oldest first: what a resumed run must know.
  const std::vector<double>& values() const { return values_; }
  void restore(std::vector<double> values) {
    values_ = std::move(values);
    drop_oldest();
  }

 private:
  void drop_oldest() {
    if (values_.size() > size_) values_.erase(values_.begin(), values_.end() - std::ptrdiff_t(size_));
  }

  std::size_t size_;
  std::vector<double> values_;
};

}  // namespace distill
