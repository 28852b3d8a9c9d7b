#include "core/train/balance.h"

#include <algorithm>
#include <numeric>
#include <optional>

#include "core/error.h"

namespace distill {

namespace {

using Indices = std::vector<std::size_t>;

// Items dealt to one receiver, and their work.
struct Hand {
  Indices items;
  std::int64_t work = 0;
};
using Hands = std::vector<Hand>;

std::int64_t heaviest(const Hands& hands) {
  std::int64_t most = 0;
  for (const Hand& hand : hands) most = std::max(most, hand.work);
  return most;
}

class Dealer {
 public:
  explicit Dealer(std::span<const std::int64_t> work) : work_(work) {}

  // Hands of the same sizes over the same items, the heaviest no heavier than before.
  Hands deal(const Hands& before) const {
    Hands hands = heaviest_items_first(before);
    exchange(hands);
    return heaviest(hands) < heaviest(before) ? hands : before;
  }
  Hand hand(Indices items) const {
    Hand hand{std::move(items), 0};
    for (const std::size_t i : hand.items) hand.work += work_[i];
    return hand;
  }

 private:
  bool is_heavier(std::size_t a, std::size_t b) const { return work_[a] != work_[b] ? work_[a] > work_[b] : a < b; }

  // Each item, heaviest first, to the lightest hand that has room.
  Hands heaviest_items_first(const Hands& before) const {
    Indices items;
    for (const Hand& hand : before) items.insert(items.end(), hand.items.begin(), hand.items.end());
    std::sort(items.begin(), items.end(), [&](std::size_t a, std::size_t b) { return is_heavier(a, b); });
    Hands hands(before.size());
    for (const std::size_t item : items) {
      std::optional<std::size_t> lightest;
      for (std::size_t h = 0; h < hands.size(); ++h)
        if (hands[h].items.size() < before[h].items.size() && (!lightest || hands[h].work < hands[*lightest].work))
          lightest = h;
      hands[*lightest].items.push_back(item);
      hands[*lightest].work += work_[item];
    }
    return hands;
  }

  // The heaviest hand swaps an item with the lightest hand that it can, until none is of use. Every swap makes the pair
  // more even, so this ends; the bound is for its time.
  void exchange(Hands& hands) const {
    Indices by_work(hands.size());
    std::iota(by_work.begin(), by_work.end(), std::size_t{0});
    for (std::size_t rounds = 4 * work_.size(); rounds > 0; --rounds) {
      std::stable_sort(by_work.begin(), by_work.end(),
                       [&](std::size_t a, std::size_t b) { return hands[a].work < hands[b].work; });
      Hand& heavy = hands[by_work.back()];
      const bool swapped = std::any_of(by_work.begin(), by_work.end() - 1,
                                       [&](std::size_t light) { return swap_best(heavy, hands[light]); });
      if (!swapped) return;
    }
  }

  // Swaps the pair of items that makes the two hands most even; false where none makes the heavy one lighter without
  // making the other as heavy.
  bool swap_best(Hand& heavy, Hand& light) const {
    const std::int64_t gap = heavy.work - light.work;
    std::sort(light.items.begin(), light.items.end(), [&](std::size_t a, std::size_t b) { return is_heavier(b, a); });
    std::size_t from = 0, to = 0;
    std::int64_t best = gap;  // what would be left of the gap
    for (std::size_t i = 0; i < heavy.items.size(); ++i) {
      // Of the light hand's items those next to work − gap / 2 leave least.
      const std::int64_t wanted = work_[heavy.items[i]] - gap / 2;
      const auto above = std::lower_bound(light.items.begin(), light.items.end(), wanted,
                                          [&](std::size_t item, std::int64_t value) { return work_[item] < value; });
      const std::size_t next = std::size_t(above - light.items.begin());
      for (std::size_t j = next > 0 ? next - 1 : 0; j < std::min(next + 1, light.items.size()); ++j) {
        const std::int64_t moved = work_[heavy.items[i]] - work_[light.items[j]];
        const std::int64_t left = std::abs(gap - 2 * moved);
        if (left >= best) continue;
        best = left;
        from = i;
        to = j;
      }
    }
    if (best == gap) return false;
    const std::int64_t moved = work_[heavy.items[from]] - work_[light.items[to]];
    std::swap(heavy.items[from], light.items[to]);
    heavy.work -= moved;
    light.work += moved;
    return true;
  }

  std::span<const std::int64_t> work_;
};

}  // namespace

std::vector<std::int32_t> balanced_order(std::span<const std::int32_t> samples, std::span<const std::int64_t> work,
                                         const BatchShape& shape) {
  check(samples.size() == work.size(), "work of ", work.size(), " sequences, there are ", samples.size());
  std::vector<std::int32_t> places(samples.size());
  std::iota(places.begin(), places.end(), 0);
  const Dealer dealer(work);
  Hands ranks;
  for (int rank = 0; rank < shape.dp_size; ++rank) {
    Indices items;
    for (int m = 0; m < shape.accumulation; ++m)
      for (const std::int32_t i : shape.cut(places, m, rank)) items.push_back(std::size_t(i));
    ranks.push_back(dealer.hand(std::move(items)));
  }
  ranks = dealer.deal(ranks);

  std::vector<std::int32_t> order(samples.size());
  for (int rank = 0; rank < shape.dp_size; ++rank) {
    Indices items = ranks[std::size_t(rank)].items;
    std::sort(items.begin(), items.end());
    Hands micro;
    auto next = items.begin();
    for (int m = 0; m < shape.accumulation; ++m) {
      const auto end = next + std::ptrdiff_t(shape.cut(places, m, rank).size());
      micro.push_back(dealer.hand(Indices(next, end)));
      next = end;
    }
    micro = dealer.deal(micro);
    for (int m = 0; m < shape.accumulation; ++m) {
      Indices& mine = micro[std::size_t(m)].items;
      std::sort(mine.begin(), mine.end());
      const auto cell = shape.cut(places, m, rank);
      for (std::size_t i = 0; i < mine.size(); ++i) order[std::size_t(cell[i])] = samples[mine[i]];
    }
  }
  return order;
}

}  // namespace distill
