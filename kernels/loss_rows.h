// The loss of one position, written once for every backend: passes over one rank's columns of the vocabulary by a Team
// of lanes. Between passes stands a small struct of the position; with the vocabulary cut over ranks it is all-reduced
// there (Maxima by maximum, the others by sum) and nothing else is ever sent. distill_row() is the sequence; with a
// team whose reductions reach over ranks it is the sequence for a cut vocabulary.
//
// Units: a_j = (s_j − max s)/τ and b_j = (t_j − max t)/(τ τ_t), both ≤ 0; natural logarithms. S is float or double, T
// the teacher's storage type, G the gradient's. NaN and +infinity in logits reach the terms as NaN.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/distill/divergence.h"
#include "core/distill/loss_spec.h"
#include "kernels/team.h"

namespace distill {

// −infinity, and whatever lies below −1e9, reads as −1e9: differences stay finite. NaN stays.
template <class S>
DISTILL_HD S readable(S logit) {
  return logit < S(-1e9) ? S(-1e9) : logit;
}
template <class S, class T>
DISTILL_HD S readable_as(T stored) {
  return readable(S(Compute<T>(stored)));
}

// A column of the vocabulary: its id and both readable logits.
template <class S>
struct Column {
  std::int64_t id;
  S student, teacher;
};

// This rank's columns of one position.
template <class S, class T>
struct LossRow {
  const S* student = nullptr;
  const T* teacher = nullptr;  // null: no teacher, only cross-entropy
  std::int64_t columns = 0;    // columns of the real vocabulary here
  std::int64_t padded = 0;     // columns of the gradient here, ≥ columns
  std::int64_t first = 0;      // vocabulary id of column 0
  std::int64_t label = 0;      // vocabulary id, here or on another rank
  DISTILL_HD Column<S> column(std::int64_t j, S s, T t) const { return {first + j, readable(s), readable_as<S>(t)}; }
};

// body(column) for this lane's columns. Without a teacher its logits read as 0.
template <class Team, class S, class T, class Body>
DISTILL_HD void for_columns(Team team, const LossRow<S, T>& row, Body&& body) {
  const auto visit = [&](std::int64_t j, S student, T teacher) { body(row.column(j, student, teacher)); };
  for_elements(team, row.columns, visit, row.student, row.teacher);
}

// A sum that does not lose digits over 150,000 terms (Kahan 1965).
template <class S>
class LongSum {
 public:
  DISTILL_HD void add(S x) {
    const S y = x - lost_;
    const S next = sum_ + y;
    lost_ = (next - sum_) - y;
    sum_ = next;
  }
  DISTILL_HD S value() const { return sum_; }

 private:
  S sum_ = 0, lost_ = 0;
};

// --- pass 1: maxima

template <class S>
struct Maxima {
  S student = S(-1e9), teacher = S(-1e9);
};

template <class Team, class S, class T>
DISTILL_HD Maxima<S> row_maxima(Team team, const LossRow<S, T>& row) {
  Maxima<S> most;
  for_columns(team, row, [&](const Column<S>& c) {
    if (c.student > most.student) most.student = c.student;
    if (row.teacher && c.teacher > most.teacher) most.teacher = c.teacher;
  });
  return {team.max(most.student), team.max(most.teacher)};
}

// The row in the units above.
template <class S, class T>
struct CentredRow {
  DISTILL_HD CentredRow(const LossRow<S, T>& r, const Maxima<S>& m, const LossSpec& spec)
      : row(r), most(m), inverse_t(S(1) / S(spec.temperature)), inverse_tt(inverse_t / S(spec.teacher_temperature)) {}
  DISTILL_HD S plain(const Column<S>& c) const { return c.student - most.student; }
  DISTILL_HD S a(const Column<S>& c) const { return plain(c) * inverse_t; }
  DISTILL_HD S b(const Column<S>& c) const { return (c.teacher - most.teacher) * inverse_tt; }

  LossRow<S, T> row;
  Maxima<S> most;
  S inverse_t, inverse_tt;  // 1/τ, 1/(τ τ_t)
};

// --- pass 2: sums of exponentials over the whole vocabulary

template <class S>
struct SoftmaxSums {
  S plain = 0;                     // Σ exp(s − max s), of the cross-entropy
  S label = 0;                     // s_label − max s, from the rank that owns the label
  S student = 0, student_dot = 0;  // Σ exp(a), Σ exp(a) a
  S teacher = 0, teacher_dot = 0;  // Σ exp(b), Σ exp(b) b
  S agreements = 0;                // columns where both sides have their maximum
};

template <class Team, class S, class T>
DISTILL_HD SoftmaxSums<S> row_sums(Team team, const CentredRow<S, T>& x) {
  using std::exp;
  LongSum<S> plain, student, student_dot, teacher, teacher_dot;
  S agreements = 0;
  for_columns(team, x.row, [&](const Column<S>& c) {
    const S s = x.plain(c), a = x.a(c), e = exp(a);
    plain.add(exp(s));
    student.add(e);
    student_dot.add(e * a);
    if (!x.row.teacher) return;
    const S b = x.b(c), f = exp(b);
    teacher.add(f);
    teacher_dot.add(f * b);
    if (s == S(0) && b == S(0)) agreements += S(1);
  });
  SoftmaxSums<S> sums;
  sums.plain = team.sum(plain.value());
  sums.student = team.sum(student.value());
  sums.student_dot = team.sum(student_dot.value());
  sums.teacher = team.sum(teacher.value());
  sums.teacher_dot = team.sum(teacher_dot.value());
  sums.agreements = team.sum(agreements);
  const std::int64_t label = x.row.label - x.row.first;
  const bool owns_label = team.lane() == 0 && label >= 0 && label < x.row.columns;
  sums.label = team.sum(owns_label ? readable(x.row.student[label]) - x.most.student : S(0));
  return sums;
}

// --- thresholds, found digit by digit in the order-preserving bits of a number

// The unsigned number that orders like x, −0 and +0 alike.
DISTILL_HD inline std::uint32_t ordered_bits(float x) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(x + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
DISTILL_HD inline std::uint64_t ordered_bits(double x) {
  const std::uint64_t u = std::bit_cast<std::uint64_t>(x + 0.0);
  return u >> 63 ? ~u : u | (std::uint64_t{1} << 63);
}
template <class S>
using OrderedBits = decltype(ordered_bits(S{}));

// n sums at once where a team has a way to do that.
template <class Team, class S>
DISTILL_HD void sum_each(Team team, S* x, int n) {
  if constexpr (requires { team.sum_each(x, n); })
    team.sum_each(x, n);
  else
    for (int i = 0; i < n; ++i) x[i] = team.sum(x[i]);
}

// The largest key such that the entries with that key or a larger one weigh more than `goal` together; when rounding
// keeps the total from exceeding it, the smallest key there is. `above` is what the larger ones weigh. Items has
// each(team, visit) which calls visit(key, weight) for the lane's share. Per digit 16 sums, the same on every rank
// after an all-reduce.
template <class Key, class S>
struct Threshold {
  Key key = 0;
  S above = 0;
};

template <class S>
struct DigitSums {
  static constexpr int bits = 4, bins = 1 << bits;
  S weight[bins] = {};
};

// The 16 sums of one digit, shift bits from the right, over the entries that share the digits found before it.
template <class Key, class S, class Team, class Items>
DISTILL_HD DigitSums<S> digit_sums(Team team, const Items& items, Key found, int shift) {
  using Sums = DigitSums<S>;
  // Two shifts: one by all bits is undefined.
  const Key fixed = Key(Key(~Key(0)) << shift << Sums::bits);
  LongSum<S> weight[Sums::bins];
  items.each(team, [&](Key key, S w) {
    if ((key & fixed) == found) weight[(key >> shift) & Key(Sums::bins - 1)].add(w);
  });
  Sums sums;
  for (int d = 0; d < Sums::bins; ++d) sums.weight[d] = weight[d].value();
  sum_each(team, sums.weight, Sums::bins);
  return sums;
}

template <class Key, class S>
DISTILL_HD void take_digit(Threshold<Key, S>& found, const DigitSums<S>& sums, int shift, S goal) {
  int digit = DigitSums<S>::bins - 1, least = digit;
  for (int d = digit; d >= 0; --d)
    if (sums.weight[d] > S(0)) least = d;
  while (digit > least && !(found.above + sums.weight[digit] > goal)) found.above += sums.weight[digit--];
  found.key |= Key(digit) << shift;
}

// The shifts of the digits, from the left.
template <class Key>
inline constexpr int first_digit = int(sizeof(Key)) * 8 - DigitSums<float>::bits;

template <class Key, class S, class Team, class Items>
DISTILL_HD Threshold<Key, S> find_threshold(Team team, const Items& items, S goal) {
  Threshold<Key, S> found;
  for (int shift = first_digit<Key>; shift >= 0; shift -= DigitSums<S>::bits)
    take_digit(found, digit_sums<Key, S>(team, items, found.key, shift), shift, goal);
  return found;
}

// --- top-k: S = {t > key} ∪ {t = key, id ≤ last_id}

template <class S>
struct TopkCut {
  OrderedBits<S> key = 0;
  std::uint32_t last_id = UINT32_MAX;
  DISTILL_HD bool keeps(const Column<S>& c) const {
    const auto k = ordered_bits(c.teacher);
    return k > key || (k == key && std::uint32_t(c.id) <= last_id);
  }
};

template <class S, class T>
struct TeacherCounts {  // one per entry
  const LossRow<S, T>& row;
  template <class Team, class Visit>
  DISTILL_HD void each(Team team, Visit&& visit) const {
    for_columns(team, row, [&](const Column<S>& c) { visit(ordered_bits(c.teacher), S(1)); });
  }
};
template <class S, class T>
struct TieCounts {  // one per entry that equals the k-th largest; a smaller id is a larger key
  const LossRow<S, T>& row;
  OrderedBits<S> key;
  template <class Team, class Visit>
  DISTILL_HD void each(Team team, Visit&& visit) const {
    for_columns(team, row, [&](const Column<S>& c) {
      if (ordered_bits(c.teacher) == key) visit(~std::uint32_t(c.id), S(1));
    });
  }
};

template <class Team, class S, class T>
DISTILL_HD TopkCut<S> find_topk(Team team, const LossRow<S, T>& row, int k) {
  const auto value = find_threshold<OrderedBits<S>, S>(team, TeacherCounts<S, T>{row}, S(k) - S(0.5));
  const auto id = find_threshold<std::uint32_t, S>(team, TieCounts<S, T>{row, value.key}, S(k) - value.above - S(0.5));
  return {value.key, ~id.key};
}

// --- the outcomes that D compares: the whole vocabulary or S, and perhaps a bucket for the rest

// log Σ exp of both sides over some entries, as the largest of each side and the logarithm of what is left: the largest
// may be −1e9, which would swallow the logarithm. The difference of the logarithms has fewer roundings than they: they
// are about 10, and a divergence may be 1e-8.
template <class S>
struct LogSums {
  Maxima<S> most = {S(0), S(0)};
  S student = 0, teacher = 0, difference = 0;  // log Σ exp(a − most a), log Σ exp(b − most b), student − teacher
};
template <class S>
DISTILL_HD LogSums<S> log_sums(const Maxima<S>& most, S student, S teacher) {
  using std::log;
  return {most, log(student), log(teacher), log(student / teacher)};
}

template <class S, class T>
struct Outcomes {
  CentredRow<S, T> x;
  LogSums<S> whole = {};  // over the outcomes
  TopkCut<S> cut = {};
  bool is_cut = false, has_bucket = false;
  LogSums<S> rest = {};  // over what is in the bucket

  DISTILL_HD bool has(const Column<S>& c) const { return !is_cut || cut.keeps(c); }
  // The bucket counts once: where column 0 is.
  DISTILL_HD bool has_bucket_here() const { return has_bucket && x.row.first == 0 && x.row.columns > 0; }
  DISTILL_HD Outcome<S> at(S a, S b) const {
    const S student = a - whole.most.student, teacher = b - whole.most.teacher;
    return {student - whole.student, teacher - whole.teacher, whole.difference - (student - teacher)};
  }
  // With a bucket the outcomes are all of the vocabulary, and the largest of it is 0.
  DISTILL_HD S bucket_a() const { return rest.most.student + rest.student; }
  DISTILL_HD S bucket_b() const { return rest.most.teacher + rest.teacher; }
  DISTILL_HD Outcome<S> bucket() const {
    return {bucket_a() - whole.student, bucket_b() - whole.teacher,
            whole.difference - ((rest.most.student - rest.most.teacher) + rest.difference)};
  }
};

// body(b, outcome) for this lane's outcomes; the bucket comes after the columns.
template <class Team, class S, class T, class Body>
DISTILL_HD void for_outcomes(Team team, const Outcomes<S, T>& outcomes, Body&& body) {
  for_columns(team, outcomes.x.row, [&](const Column<S>& c) {
    if (!outcomes.has(c)) return;
    const S b = outcomes.x.b(c);
    body(b, outcomes.at(outcomes.x.a(c), b));
  });
  if (team.lane() == 0 && outcomes.has_bucket_here()) body(outcomes.bucket_b(), outcomes.bucket());
}

// The largest a and b of those entries; the lowest number when there are none.
template <class Team, class S, class T>
DISTILL_HD Maxima<S> cut_maxima(Team team, const CentredRow<S, T>& x, const TopkCut<S>& cut, bool kept) {
  constexpr S lowest = std::numeric_limits<S>::lowest();
  Maxima<S> most{lowest, lowest};
  for_columns(team, x.row, [&](const Column<S>& c) {
    if (cut.keeps(c) != kept) return;
    if (x.a(c) > most.student) most.student = x.a(c);
    if (x.b(c) > most.teacher) most.teacher = x.b(c);
  });
  return {team.max(most.student), team.max(most.teacher)};
}

// Σ exp(a − most a), Σ exp(b − most b)
template <class S>
struct CutSums {
  S student = 0, teacher = 0;
};
template <class Team, class S, class T>
DISTILL_HD CutSums<S> cut_sums(Team team, const CentredRow<S, T>& x, const TopkCut<S>& cut, bool kept,
                               const Maxima<S>& most) {
  using std::exp;
  LongSum<S> student, teacher;
  for_columns(team, x.row, [&](const Column<S>& c) {
    if (cut.keeps(c) != kept) return;
    student.add(exp(x.a(c) - most.student));
    teacher.add(exp(x.b(c) - most.teacher));
  });
  return {team.sum(student.value()), team.sum(teacher.value())};
}

template <class Team, class S, class T>
DISTILL_HD LogSums<S> cut_log_sums(Team team, const CentredRow<S, T>& x, const TopkCut<S>& cut, bool kept) {
  const Maxima<S> most = cut_maxima(team, x, cut, kept);
  const CutSums<S> sums = cut_sums(team, x, cut, kept, most);
  return log_sums(most, sums.student, sums.teacher);
}

// The teacher's share of these entries.
template <class S>
DISTILL_HD S mass(const LogSums<S>& kept, const SoftmaxSums<S>& sums) {
  using std::exp;
  return exp(kept.most.teacher) * exp(kept.teacher) / sums.teacher;
}

// --- what a divergence must know of the position before its sums: only adaptive_kl does

template <class Team, class S, class T, class Divergence>
DISTILL_HD Divergence settled(Team, const Outcomes<S, T>&, const Divergence& divergence) {
  return divergence;
}

// The mass of q by distance from the largest: the larger the distance b ↦ |b|, the smaller q.
template <class S, class T>
struct TeacherMass {
  const Outcomes<S, T>& outcomes;
  DISTILL_HD static OrderedBits<S> key(S b) { return ordered_bits(-b); }
  template <class Team, class Visit>
  DISTILL_HD void each(Team team, Visit&& visit) const {
    for_outcomes(team, outcomes, [&](S b, const Outcome<S>& y) { visit(key(b), y.q); });
  }
};

// Σ |q − p| over the two sides. The head is what is left when the smallest q are taken away as long as they sum to at
// most α; equal q share one side.
template <class S>
struct HeadTailSums {
  S head = 0, tail = 0;
};
template <class Team, class S, class T>
DISTILL_HD HeadTailSums<S> head_tail_sums(Team team, const Outcomes<S, T>& outcomes, OrderedBits<S> head_key) {
  LongSum<S> head, tail;
  for_outcomes(team, outcomes, [&](S b, const Outcome<S>& y) {
    const S gap = y.q > y.p ? y.q - y.p : y.p - y.q;
    if (TeacherMass<S, T>::key(b) > head_key)  // not a choice of references, which would keep the sums in memory
      tail.add(gap);
    else
      head.add(gap);
  });
  return {team.sum(head.value()), team.sum(tail.value())};
}

template <class S>
DISTILL_HD AdaptiveKl weighted(const AdaptiveKl& divergence, const HeadTailSums<S>& sums) {
  const double head = double(sums.head), both = head + double(sums.tail);
  AdaptiveKl result = divergence;
  result.head_weight = both < 1e-12 ? 0.5 : head / both;
  result.tail_weight = 1 - result.head_weight;
  return result;
}

template <class Team, class S, class T>
DISTILL_HD AdaptiveKl settled(Team team, const Outcomes<S, T>& outcomes, const AdaptiveKl& divergence) {
  const auto head = find_threshold<OrderedBits<S>, S>(team, TeacherMass<S, T>{outcomes}, S(divergence.alpha));
  return weighted(divergence, head_tail_sums(team, outcomes, head.key));
}

// --- pass 3: the divergence

template <class S>
struct DivergenceSums {
  S value = 0, slope = 0;
};

template <class Team, class S, class T, class Divergence>
DISTILL_HD DivergenceSums<S> divergence_sums(Team team, const Outcomes<S, T>& outcomes, const Divergence& divergence) {
  LongSum<S> value, slope;
  for_outcomes(team, outcomes, [&](S, const Outcome<S>& y) {
    value.add(divergence.value(y));
    slope.add(divergence.slope(y));
  });
  return {team.sum(value.value()), team.sum(slope.value())};
}

// --- pass 4: the gradient, scale · ∂((1−w) CE + w D)/∂s; padding columns get 0

// dlogits = gradient(column) for this lane's columns.
template <class Team, class G, class S, class T, class Gradient>
DISTILL_HD void write_gradient(Team team, G* dlogits, const LossRow<S, T>& row, Gradient&& gradient) {
  const auto of_column = [&](std::int64_t j, S student, T teacher) {
    return gradient(row.column(j, student, teacher));
  };
  write_elements(team, dlogits, row.columns, of_column, row.student, row.teacher);
  for (std::int64_t j = row.columns + team.lane(); j < row.padded; j += team.lanes()) dlogits[j] = G(0.0f);
}

// (1−w) scale (softmax(s) − [j = label]); weight = (1−w) scale
template <class S, class T>
DISTILL_HD S cross_entropy_gradient(const CentredRow<S, T>& x, S log_plain, S weight, const Column<S>& c) {
  using std::exp;
  return weight * (exp(x.plain(c) - log_plain) - S(c.id == x.row.label));
}

// Without a teacher.
template <class Team, class G, class S, class T>
DISTILL_HD void cross_entropy_row_gradient(Team team, G* dlogits, const CentredRow<S, T>& x, S log_plain,
                                           const LossSpec& spec, S scale) {
  const S weight = scale * (S(1) - S(spec.distill_weight));
  write_gradient(team, dlogits, x.row,
                 [&](const Column<S>& c) { return cross_entropy_gradient(x, log_plain, weight, c); });
}

template <class Team, class G, class S, class T, class Divergence>
DISTILL_HD void row_gradient(Team team, G* dlogits, const Outcomes<S, T>& outcomes, const Divergence& divergence,
                             S slope_sum, S log_plain, const LossSpec& spec, S scale) {
  using std::exp;
  const CentredRow<S, T>& x = outcomes.x;
  const S ce_weight = scale * (S(1) - S(spec.distill_weight)), weight = scale * S(spec.distill_weight) * x.inverse_t;
  S rest = 0;  // of an entry in the bucket: gradient over exp(a)
  if (outcomes.has_bucket) {
    const Outcome<S> bucket = outcomes.bucket();
    rest = divergence.slope(bucket) - bucket.p * slope_sum;
  }
  write_gradient(team, dlogits, x.row, [&](const Column<S>& c) {
    S g = 0;
    if (outcomes.has(c)) {
      const Outcome<S> y = outcomes.at(x.a(c), x.b(c));
      g = divergence.slope(y) - y.p * slope_sum;
    } else if (outcomes.has_bucket) {
      g = rest * exp((x.a(c) - outcomes.rest.most.student) - outcomes.rest.student);
    }
    return weight * g + cross_entropy_gradient(x, log_plain, ce_weight, c);
  });
}

// --- one position

// terms: LossTerms::count values. dlogits: row.padded columns.
template <class Team, class G, class S, class T, class Divergence>
DISTILL_HD void distill_row(Team team, G* dlogits, S* terms, const LossRow<S, T>& row, const Divergence& divergence,
                            const LossSpec& spec, S scale) {
  using std::log;
  const CentredRow<S, T> x(row, row_maxima(team, row), spec);
  const SoftmaxSums<S> sums = row_sums(team, x);
  const S log_plain = log(sums.plain), log_zs = log(sums.student);
  S distance = 0, teacher_entropy = 0, topk_mass = 1;

  if (!row.teacher) {
    cross_entropy_row_gradient(team, dlogits, x, log_plain, spec, scale);
  } else {
    const S log_zt = log(sums.teacher);
    teacher_entropy = log_zt - sums.teacher_dot / sums.teacher;
    Outcomes<S, T> outcomes{x};
    outcomes.whole = log_sums({S(0), S(0)}, sums.student, sums.teacher);
    if (spec.topk > 0 && spec.topk < spec.vocabulary) {
      outcomes.is_cut = true;
      outcomes.cut = find_topk(team, row, spec.topk);
      const LogSums<S> kept = cut_log_sums(team, x, outcomes.cut, true);
      topk_mass = mass(kept, sums);
      outcomes.has_bucket = spec.topk_mode == TopkMode::tail;
      if (outcomes.has_bucket)
        outcomes.rest = cut_log_sums(team, x, outcomes.cut, false);
      else
        outcomes.whole = kept;
    }
    const Divergence d = settled(team, outcomes, divergence);
    const DivergenceSums<S> total = divergence_sums(team, outcomes, d);
    // A NaN that the cut left out must still be seen.
    distance = total.value + S(0) * (teacher_entropy + log_zs);
    row_gradient(team, dlogits, outcomes, d, total.slope, log_plain, spec, scale);
  }
  if (team.lane() != 0) return;
  terms[LossTerms::cross_entropy] = log_plain - sums.label;
  terms[LossTerms::divergence] = distance;
  terms[LossTerms::student_entropy] = log_zs - sums.student_dot / sums.student;
  terms[LossTerms::teacher_entropy] = teacher_entropy;
  terms[LossTerms::top1_agreement] = sums.agreements > S(0) ? S(1) : S(0);
  terms[LossTerms::topk_mass] = topk_mass;
}

}  // namespace distill
