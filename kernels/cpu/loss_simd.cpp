#include "kernels/cpu/loss_simd.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>

#include "core/distill/divergence.h"
#include "core/error.h"
#include "kernels/loss_rows.h"

#include "kernels/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/loss_simd.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
//
#include "hwy/cache_control.h"
#include "kernels/cpu/exp-inl.h"

HWY_BEFORE_NAMESPACE();
namespace distill::simd {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Tag = hn::ScalableTag<float>;
using Vector = hn::Vec<Tag>;
constexpr Tag d;
constexpr int lanes = int(hn::MaxLanes(d));  // fixed-size vectors: MaxLanes is what they have

constexpr int block_columns = 2048;  // two blocks of logits and one of the gradient fit the first-level cache
constexpr float hole = -1e30f;       // exp of it is 0 and its products stay finite

HWY_INLINE Vector exp_of(Vector x) { return distill::HWY_NAMESPACE::fast_exp(d, x); }
HWY_INLINE float sum_of(Vector x) { return hn::GetLane(hn::SumOfLanes(d, x)); }

// --- logits as vectors of readable floats, straight from the row or from a block prepared beforehand

// As readable() in loss_rows.h: NaN stays.
HWY_INLINE Vector readable_lanes(Vector x) {
  const Vector limit = hn::Set(d, -1e9f);
#if HWY_ARCH_X86 && HWY_TARGET != HWY_SCALAR  // its maximum returns the second operand when one is NaN
  return hn::Max(limit, x);
#else
  return hn::IfThenElse(hn::Lt(x, limit), limit, x);
#endif
}

struct Prepared {
  const float* p;
};
HWY_INLINE Vector load_raw(const float* p, int i) { return hn::LoadU(d, p + i); }
HWY_INLINE Vector load_raw(const bf16* p, int i) {
  const hn::Rebind<hwy::bfloat16_t, Tag> half;
  return hn::PromoteTo(d, hn::LoadU(half, reinterpret_cast<const hwy::bfloat16_t*>(p + i)));
}
HWY_INLINE Vector load_raw(const f16* p, int i) {
  const hn::Rebind<hwy::float16_t, Tag> half;
  return hn::PromoteTo(d, hn::LoadU(half, reinterpret_cast<const hwy::float16_t*>(p + i)));
}
HWY_INLINE Vector load_raw(const double* p, int i) {
  HWY_ALIGN float x[lanes];
  for (int j = 0; j < lanes; ++j) x[j] = float(p[i + j]);
  return hn::Load(d, x);
}
HWY_INLINE Vector load(Prepared x, int i) { return hn::Load(d, x.p + i); }
template <class T>
HWY_INLINE Vector load(const T* p, int i) {
  return readable_lanes(load_raw(p, i));
}

// Copies n logits, then holes up to a whole vector.
template <class T>
void prepare(float* to, const T* from, int n) {
  int i = 0;
  for (; i + lanes <= n; i += lanes) hn::Store(load(from, i), d, to + i);
  for (; i < n; ++i) to[i] = readable_as<float>(from[i]);
  for (; i % lanes != 0; ++i) to[i] = hole;
}

template <class Body>
void with_teacher(const Row& row, Body&& body) {
  switch (row.teacher_type) {
    case DType::f32:
      return body(static_cast<const float*>(row.teacher));
    case DType::bf16:
      return body(static_cast<const bf16*>(row.teacher));
    case DType::f16:
      return body(static_cast<const f16*>(row.teacher));
    default:
      return body(static_cast<const double*>(row.teacher));
  }
}

// Walks over a row in blocks.
class Blocks {
 public:
  explicit Blocks(const Row& row) : row_(row) {}

  std::int64_t first = 0;
  int columns = 0, padded = 0;  // padded: whole vectors

  // body(student, teacher) for every block: where load() finds the logits of columns [first, first + columns). Whole
  // blocks of the usual types are read in place.
  template <bool has_teacher, class Body>
  void for_each(Body&& body) {
    std::size_t hole_index = 0;
    for (first = 0; first < row_.columns; first += block_columns) {
      columns = int(std::min<std::int64_t>(block_columns, row_.columns - first));
      padded = (columns + lanes - 1) / lanes * lanes;
      const std::size_t hole_begin = hole_index;
      while (hole_index < row_.holes.size() && row_.holes[hole_index] < first + columns) ++hole_index;
      const auto holes = row_.holes.subspan(hole_begin, hole_index - hole_begin);
      const float* student = row_.student + first;
      if (columns != padded || !holes.empty() || (has_teacher && !in_place())) {
        prepare(student_, student, columns);
        if constexpr (has_teacher) prepare_teacher();
        for (const std::int32_t id : holes) student_[id - first] = teacher_[id - first] = hole;
        body(Prepared{student_}, Prepared{teacher_});
      } else if constexpr (!has_teacher) {
        body(student, Prepared{teacher_});
      } else if (row_.teacher_type == DType::f32) {
        body(student, static_cast<const float*>(row_.teacher) + first);
      } else {
        body(student, static_cast<const bf16*>(row_.teacher) + first);
      }
    }
  }

  // The teacher's logits alone: body(prepared block).
  template <class Body>
  void for_each_of_teacher(Body&& body) {
    for (first = 0; first < row_.columns; first += block_columns) {
      columns = int(std::min<std::int64_t>(block_columns, row_.columns - first));
      padded = (columns + lanes - 1) / lanes * lanes;
      prepare_teacher();
      body(teacher_);
    }
  }

 private:
  bool in_place() const { return row_.teacher_type == DType::f32 || row_.teacher_type == DType::bf16; }
  void prepare_teacher() {
    with_teacher(row_, [&](const auto* teacher) { prepare(teacher_, teacher + first, columns); });
  }

  const Row& row_;
  HWY_ALIGN_MAX float student_[block_columns], teacher_[block_columns];
};

// --- pass 1 and 2 in one: sums relative to a reference near the maximum, moved when a block exceeds it by far

struct BlockMaxima {
  float student = 0, teacher = 0;
};

template <bool has_teacher, class Student, class Teacher>
BlockMaxima maxima_of(Student student, Teacher teacher, int n) {
  Vector most_s = hn::Set(d, -1e9f), most_t = most_s;
  for (int i = 0; i < n; i += lanes) {
    most_s = hn::Max(most_s, load(student, i));
    if constexpr (has_teacher) most_t = hn::Max(most_t, load(teacher, i));
  }
  return {hn::GetLane(hn::MaxOfLanes(d, most_s)), hn::GetLane(hn::MaxOfLanes(d, most_t))};
}

template <class Student, class Teacher>
bool share(Student student, Teacher teacher, int n, const BlockMaxima& value) {
  const Vector s = hn::Set(d, value.student), t = hn::Set(d, value.teacher);
  for (int i = 0; i < n; i += lanes)
    if (!hn::AllFalse(d, hn::And(hn::Eq(load(student, i), s), hn::Eq(load(teacher, i), t)))) return true;
  return false;
}

// none: all temperatures are 1. teacher: the student's is, so that p is also the softmax of the cross-entropy.
enum class Scaling { none, teacher, both };
Scaling scaling_of(const Row& row) {
  if (row.student_scale != 1) return Scaling::both;
  return row.teacher_scale == 1 ? Scaling::none : Scaling::teacher;
}
template <Scaling scaling>
HWY_INLINE Vector student_scaled(Vector x, Vector scale) {
  return scaling == Scaling::both ? hn::Mul(x, scale) : x;
}
template <Scaling scaling>
HWY_INLINE Vector teacher_scaled(Vector x, Vector scale) {
  return scaling == Scaling::none ? x : hn::Mul(x, scale);
}

// Adds the sums of a block relative to run's references; returns its maxima.
template <bool has_teacher, Scaling scaling, CrossSums cross, class Student, class Teacher>
BlockMaxima add_sums(RowSums& run, const Row& row, Student student, Teacher teacher, int n) {
  constexpr bool has_plain = scaling == Scaling::both;
  constexpr bool is_forward = cross == CrossSums::forward || cross == CrossSums::all;
  constexpr bool is_reverse = cross == CrossSums::reverse || cross == CrossSums::all;
  const Vector scale_s = hn::Set(d, row.student_scale), scale_t = hn::Set(d, row.teacher_scale);
  const Vector reference_s = hn::Set(d, float(run.student_max)), reference_t = hn::Set(d, float(run.teacher_max));
  Vector plain = hn::Zero(d), sum_s = plain, dot_s = plain, sum_t = plain, dot_t = plain, square = plain,
         forward = plain, reverse = plain;
  Vector most_s = hn::Set(d, -1e9f), most_t = most_s;
  for (int i = 0; i < n; i += lanes) {
    const Vector raw_s = load(student, i);
    most_s = hn::Max(most_s, raw_s);
    const Vector s = hn::Sub(raw_s, reference_s);
    const Vector a = student_scaled<scaling>(s, scale_s);
    const Vector e = exp_of(a);
    if constexpr (has_plain) plain = hn::Add(plain, exp_of(s));
    sum_s = hn::Add(sum_s, e);
    dot_s = hn::MulAdd(e, a, dot_s);
    if constexpr (has_teacher) {
      const Vector raw_t = load(teacher, i);
      most_t = hn::Max(most_t, raw_t);
      const Vector b = teacher_scaled<scaling>(hn::Sub(raw_t, reference_t), scale_t);
      const Vector f = exp_of(b);
      sum_t = hn::Add(sum_t, f);
      dot_t = hn::MulAdd(f, b, dot_t);
      if constexpr (is_forward) forward = hn::MulAdd(f, hn::Sub(b, a), forward);
      if constexpr (is_reverse) reverse = hn::MulAdd(e, hn::Sub(a, b), reverse);
      if constexpr (cross == CrossSums::all) square = hn::MulAdd(hn::Mul(f, b), b, square);
    }
  }
  run.student += sum_of(sum_s);
  run.student_dot += sum_of(dot_s);
  if constexpr (has_plain) run.plain += sum_of(plain);
  if constexpr (has_teacher) {
    run.teacher += sum_of(sum_t);
    run.teacher_dot += sum_of(dot_t);
    if constexpr (is_forward) run.forward += sum_of(forward);
    if constexpr (is_reverse) run.reverse += sum_of(reverse);
    if constexpr (cross == CrossSums::all) run.teacher_square += sum_of(square);
  }
  return {hn::GetLane(hn::MaxOfLanes(d, most_s)), hn::GetLane(hn::MaxOfLanes(d, most_t))};
}

template <bool has_teacher, Scaling scaling, CrossSums cross>
RowSums sums_of(const Row& row) {
  RowSums run;
  BlockMaxima most{-1e9f, -1e9f};
  bool agreement = false;
  // Little enough to lose no digits to the distance of the reference, enough for few second tries.
  constexpr double headroom = 2;
  const double headroom_s = headroom / std::max(1.0, double(row.student_scale));
  const double headroom_t = headroom / std::max(1.0, double(row.teacher_scale));
  Blocks blocks(row);
  blocks.for_each<has_teacher>([&](auto student, auto teacher) {
    if (blocks.first == 0) {
      const BlockMaxima start = maxima_of<has_teacher>(student, teacher, blocks.padded);
      run.student_max = std::max(-1e9f, start.student);
      run.teacher_max = std::max(-1e9f, start.teacher);
    }
    const RowSums before = run;
    BlockMaxima here = add_sums<has_teacher, scaling, cross>(run, row, student, teacher, blocks.padded);
    if (here.student > run.student_max + headroom_s || here.teacher > run.teacher_max + headroom_t) {
      run = before;
      run.recentre(std::max<double>(here.student, run.student_max), std::max<double>(here.teacher, run.teacher_max),
                   row.student_scale, row.teacher_scale);
      here = add_sums<has_teacher, scaling, cross>(run, row, student, teacher, blocks.padded);
    }
    if (here.student > most.student || here.teacher > most.teacher) agreement = false;
    most.student = std::max(most.student, here.student);
    most.teacher = std::max(most.teacher, here.teacher);
    if (has_teacher && !agreement && here.student == most.student && here.teacher == most.teacher)
      agreement = share(student, teacher, blocks.padded, most);
  });
  run.recentre(most.student, most.teacher, row.student_scale, row.teacher_scale);
  run.agreement = agreement;
  if (scaling != Scaling::both) run.plain = run.student;
  return run;
}

template <Scaling scaling>
RowSums sums_with_teacher(const Row& row, CrossSums cross) {
  switch (cross) {
    case CrossSums::none:
      return sums_of<true, scaling, CrossSums::none>(row);
    case CrossSums::forward:
      return sums_of<true, scaling, CrossSums::forward>(row);
    case CrossSums::reverse:
      return sums_of<true, scaling, CrossSums::reverse>(row);
    case CrossSums::all:
      return sums_of<true, scaling, CrossSums::all>(row);
  }
  fail("no such cross sums");
}

RowSums row_sums(const Row& row, CrossSums cross) {
  const Scaling scaling = scaling_of(row);
  if (!row.teacher)
    return scaling == Scaling::both ? sums_of<false, Scaling::both, CrossSums::none>(row)
                                    : sums_of<false, Scaling::none, CrossSums::none>(row);
  switch (scaling) {
    case Scaling::none:
      return sums_with_teacher<Scaling::none>(row, cross);
    case Scaling::teacher:
      return sums_with_teacher<Scaling::teacher>(row, cross);
    case Scaling::both:
      return sums_with_teacher<Scaling::both>(row, cross);
  }
  fail("no such scaling");
}

// --- adaptive_kl: where the head of q begins, and how far p is from it on either side

struct PivotLanes {
  explicit PivotLanes(const float* at) {
    for (int i = 0; i < pivots; ++i) {
      pivot[i] = hn::Set(d, at[i]);
      mass[i] = gap[i] = hn::Zero(d);
    }
  }
  HWY_INLINE void add(Vector distance, Vector q, Vector difference) {
    for (int i = 0; i < pivots; ++i) {
      const auto is_beyond = hn::Ge(distance, pivot[i]);
      mass[i] = hn::IfThenElse(is_beyond, hn::Add(mass[i], q), mass[i]);
      gap[i] = hn::IfThenElse(is_beyond, hn::Add(gap[i], difference), gap[i]);
    }
  }
  void flush(PivotSums& sums) {
    for (int i = 0; i < pivots; ++i) {
      sums.mass[i] += sum_of(mass[i]);
      sums.gap[i] += sum_of(gap[i]);
      mass[i] = gap[i] = hn::Zero(d);
    }
  }
  Vector pivot[pivots], mass[pivots], gap[pivots];
};

// Distance from the largest logit, q and |q − p|.
struct TeacherView {
  TeacherView(const Row& row, const RowSums& sums)
      : max_s(hn::Set(d, float(sums.student_max))),
        max_t(hn::Set(d, float(sums.teacher_max))),
        scale_s(hn::Set(d, row.student_scale)),
        scale_t(hn::Set(d, row.teacher_scale)),
        inverse_zs(hn::Set(d, float(1 / sums.student))),
        inverse_zt(hn::Set(d, float(1 / sums.teacher))) {}
  HWY_INLINE Vector distance(Vector teacher) const { return hn::Mul(hn::Sub(max_t, teacher), scale_t); }
  HWY_INLINE Vector q(Vector distance) const { return hn::Mul(exp_of(hn::Neg(distance)), inverse_zt); }
  HWY_INLINE Vector gap(Vector student, Vector q) const {
    const Vector a = hn::Mul(hn::Sub(student, max_s), scale_s);
    return hn::Abs(hn::Sub(q, hn::Mul(exp_of(a), inverse_zs)));
  }
  Vector max_s, max_t, scale_s, scale_t, inverse_zs, inverse_zt;
};

HWY_INLINE auto is_between(Vector distance, Vector near, Vector far) {
  return hn::And(hn::Ge(distance, near), hn::Lt(distance, far));
}

// Entries of the interval, one array per quantity, padded with zeros to whole vectors.
struct EntryList {
  explicit EntryList(Scratch& s, std::int64_t capacity) : scratch(s) {
    for (auto* v : {&s.distance, &s.mass, &s.gap})
      if (v->size() < std::size_t(capacity)) v->resize(std::size_t(capacity));
  }
  // With the student's logit where its mass will be, until evaluate().
  template <class Mask>
  HWY_INLINE void append(Mask mask, Vector distance, Vector student) {
    hn::StoreU(hn::Compress(distance, mask), d, scratch.distance.data() + size);
    hn::StoreU(hn::Compress(student, mask), d, scratch.mass.data() + size);
    size += std::int64_t(hn::CountTrue(d, mask));
  }
  void evaluate(const TeacherView& view) {
    for (std::int64_t i = 0; i < size; i += lanes) {
      const Vector q = view.q(hn::LoadU(d, scratch.distance.data() + i));
      hn::StoreU(view.gap(hn::LoadU(d, scratch.mass.data() + i), q), d, scratch.gap.data() + i);
      hn::StoreU(q, d, scratch.mass.data() + i);
    }
    pad();
  }
  void keep_between(const Boundary& boundary) {
    const Vector near = hn::Set(d, boundary.near), far = hn::Set(d, boundary.far);
    const std::int64_t before = size;
    size = 0;  // what is written lies before what is still to be read
    for (std::int64_t i = 0; i < before; i += lanes) {
      const Vector distance = hn::LoadU(d, scratch.distance.data() + i), gap = hn::LoadU(d, scratch.gap.data() + i);
      const auto here = hn::And(is_between(distance, near, far), hn::FirstN(d, std::size_t(before - i)));
      hn::StoreU(hn::Compress(gap, here), d, scratch.gap.data() + size);
      append(here, distance, hn::LoadU(d, scratch.mass.data() + i));
    }
    pad();
  }
  void pad() {
    for (float* v : {scratch.distance.data(), scratch.mass.data(), scratch.gap.data()})
      hn::StoreU(hn::Zero(d), d, v + size);
  }
  Scratch& scratch;
  std::int64_t size = 0;
};

PivotSums list_pivot_sums(const EntryList& list, const float* at) {
  PivotSums sums;
  PivotLanes run(at);
  for (std::int64_t i = 0; i < list.size; i += lanes) {
    run.add(hn::LoadU(d, list.scratch.distance.data() + i), hn::LoadU(d, list.scratch.mass.data() + i),
            hn::LoadU(d, list.scratch.gap.data() + i));
    if (i % block_columns == 0) run.flush(sums);
  }
  run.flush(sums);
  return sums;
}

PivotSums pivot_sums_of(const Row& row, const RowSums& sums, const float* at) {
  const TeacherView view(row, sums);
  Blocks blocks(row);
  PivotSums total;
  PivotLanes run(at);
  blocks.for_each<true>([&](auto student, auto teacher) {
    Vector total_gap = hn::Zero(d);
    for (int i = 0; i < blocks.padded; i += lanes) {
      const Vector distance = view.distance(load(teacher, i)), q = view.q(distance);
      const Vector gap = view.gap(load(student, i), q);
      total_gap = hn::Add(total_gap, gap);
      run.add(distance, q, gap);
    }
    run.flush(total);
    total.total_gap += sum_of(total_gap);
  });
  return total;
}

HeadTailGaps head_tail_gaps(const Row& row, const RowSums& sums, double alpha, Scratch& scratch) {
  float at[pivots];
  first_pivots(at, sums, alpha);
  const PivotSums first = pivot_sums_of(row, sums, at);
  Boundary boundary;
  boundary.narrow(at, first, alpha);

  const TeacherView view(row, sums);
  Blocks blocks(row);
  EntryList list(scratch, row.columns + 2 * lanes);
  const Vector near = hn::Set(d, boundary.near), far = hn::Set(d, boundary.far);
  blocks.for_each<true>([&](auto student, auto teacher) {
    for (int i = 0; i < blocks.padded; i += lanes) {
      const Vector distance = view.distance(load(teacher, i));
      const auto here = is_between(distance, near, far);
      if (!hn::AllFalse(d, here)) list.append(here, distance, load(student, i));
    }
  });
  list.evaluate(view);

  while (!boundary.found()) {
    boundary.spread(at);
    boundary.narrow(at, list_pivot_sums(list, at), alpha);
    list.keep_between(boundary);
  }
  return {std::max(0.0, first.total_gap - boundary.far_gap), boundary.far_gap};
}

void add_histogram(double* mass, double* gap, const Row& row, const RowSums& sums, const Boundary& boundary) {
  const TeacherView view(row, sums);
  const Vector near = hn::Set(d, boundary.near), far = hn::Set(d, boundary.far);
  const std::int32_t near_bits = std::bit_cast<std::int32_t>(boundary.near);
  const int shift = boundary.bin_shift();
  HWY_ALIGN float distances[lanes], masses[lanes], gaps[lanes];
  Blocks blocks(row);
  blocks.for_each<true>([&](auto student, auto teacher) {
    for (int i = 0; i < blocks.padded; i += lanes) {
      const Vector distance = view.distance(load(teacher, i));
      const auto here = is_between(distance, near, far);
      if (hn::AllFalse(d, here)) continue;
      const Vector q = view.q(distance);
      hn::Store(hn::IfThenElse(here, distance, near), d, distances);
      hn::Store(hn::IfThenElseZero(here, q), d, masses);
      hn::Store(hn::IfThenElseZero(here, view.gap(load(student, i), q)), d, gaps);
      for (int j = 0; j < lanes; ++j) {
        const float distance_j = distances[j] + 0.0f;  // −0 is +0
        const std::int32_t bin = (std::bit_cast<std::int32_t>(distance_j) - near_bits) >> shift;
        mass[bin] += double(masses[j]);
        gap[bin] += double(gaps[j]);
      }
    }
  });
}

// --- objectives in general: their value and slope on vectors

struct Lanes {
  Lanes() = default;
  HWY_INLINE Lanes(Vector x) : v(x) {}
  HWY_INLINE explicit Lanes(float x) : v(hn::Set(d, x)) {}
  Vector v;
};
HWY_INLINE Lanes operator+(Lanes x, Lanes y) { return hn::Add(x.v, y.v); }
HWY_INLINE Lanes operator-(Lanes x, Lanes y) { return hn::Sub(x.v, y.v); }
HWY_INLINE Lanes operator*(Lanes x, Lanes y) { return hn::Mul(x.v, y.v); }
HWY_INLINE Lanes operator/(Lanes x, Lanes y) { return hn::Div(x.v, y.v); }
HWY_INLINE Lanes operator-(Lanes x) { return hn::Neg(x.v); }
HWY_INLINE auto operator>(Lanes x, Lanes y) { return hn::Gt(x.v, y.v); }
HWY_INLINE Lanes exp(Lanes x) { return exp_of(x.v); }
HWY_INLINE Lanes log(Lanes x) { return distill::HWY_NAMESPACE::fast_log(d, x.v); }
template <class Mask>
HWY_INLINE Lanes select(Mask mask, Lanes x, Lanes y) {
  return hn::IfThenElse(mask, x.v, y.v);
}

#include "core/distill/divergence.inc"

// Outcomes of the columns of a row.
struct OutcomeView {
  OutcomeView(const Row& row, const RowSums& sums)
      : max_s(hn::Set(d, float(sums.student_max))),
        max_t(hn::Set(d, float(sums.teacher_max))),
        scale_s(hn::Set(d, row.student_scale)),
        scale_t(hn::Set(d, row.teacher_scale)),
        log_zs(hn::Set(d, float(std::log(sums.student)))),
        log_zt(hn::Set(d, float(std::log(sums.teacher)))),
        shift(hn::Set(d, float(std::log(sums.student) - std::log(sums.teacher)))) {}
  HWY_INLINE Outcome<Lanes> at(Vector student, Vector teacher) const {
    const Vector a = hn::Mul(hn::Sub(student, max_s), scale_s), b = hn::Mul(hn::Sub(teacher, max_t), scale_t);
    return {hn::Sub(a, log_zs), hn::Sub(b, log_zt), hn::Add(hn::Sub(b, a), shift)};
  }
  Vector max_s, max_t, scale_s, scale_t, log_zs, log_zt, shift;
};

template <class Divergence>
DivergenceSums objective_sums(const Row& row, const RowSums& sums, const Divergence& divergence, Scratch& scratch) {
  for (auto* v : {&scratch.slope, &scratch.probability})
    if (v->size() < std::size_t(row.columns) + lanes) v->resize(std::size_t(row.columns) + lanes);
  const OutcomeView view(row, sums);
  Blocks blocks(row);
  DivergenceSums total;
  blocks.for_each<true>([&](auto student, auto teacher) {
    float* slopes = scratch.slope.data() + blocks.first;
    float* probabilities = scratch.probability.data() + blocks.first;
    Vector value = hn::Zero(d), slope = value;
    const auto add = [&](const Outcome<Lanes>& x, int i) {
      const Vector slope_here = divergence.slope(x).v;
      value = hn::Add(value, divergence.value(x).v);
      slope = hn::Add(slope, slope_here);
      hn::StoreU(slope_here, d, slopes + i);
      hn::StoreU(x.p.v, d, probabilities + i);
    };
    // Exponentials of several vectors, then their logarithms: one after the other is a long chain of dependences.
    constexpr int group = 4;
    int i = 0;
    for (; i + group * lanes <= blocks.padded; i += group * lanes) {
      const auto at = [&](int k) { return view.at(load(student, i + k * lanes), load(teacher, i + k * lanes)); };
      const Outcome<Lanes> x0 = at(0), x1 = at(1), x2 = at(2), x3 = at(3);
      add(x0, i);
      add(x1, i + lanes);
      add(x2, i + 2 * lanes);
      add(x3, i + 3 * lanes);
    }
    for (; i < blocks.padded; i += lanes) add(view.at(load(student, i), load(teacher, i)), i);
    total.value += sum_of(value);
    total.slope += sum_of(slope);
  });
  return total;
}

DivergenceSums divergence_sums(const Row& row, const RowSums& sums, const LossSpec& spec, Scratch& scratch) {
  DivergenceSums total;
  with_divergence<Divergences>(spec,
                               [&](const auto& divergence) { total = objective_sums(row, sums, divergence, scratch); });
  return total;
}

// --- gradients

// Two vectors of finite numbers, rounded to nearest even.
HWY_INLINE void store(Vector x, Vector y, float* to, bool stream) {
  if (stream) {
    hn::Stream(x, d, to);
    hn::Stream(y, d, to + lanes);
  } else {
    hn::StoreU(x, d, to);
    hn::StoreU(y, d, to + lanes);
  }
}
HWY_INLINE auto rounded_up(Vector x) {  // the upper half is the bf16
  const hn::RebindToUnsigned<Tag> du;
  const auto bits = hn::BitCast(du, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  return hn::Add(hn::Add(bits, hn::Set(du, 0x7fffu)), odd);
}
HWY_INLINE void store(Vector x, Vector y, bf16* to, bool stream) {
#if HWY_TARGET == HWY_SCALAR
  (void)stream;
  to[0] = bf16(hn::GetLane(x));
  to[1] = bf16(hn::GetLane(y));
#else
  const hn::Repartition<std::uint16_t, Tag> d16;
  const auto both = hn::ConcatOdd(d16, hn::BitCast(d16, rounded_up(y)), hn::BitCast(d16, rounded_up(x)));
  if (stream)
    hn::Stream(both, d16, reinterpret_cast<std::uint16_t*>(to));
  else
    hn::StoreU(both, d16, reinterpret_cast<std::uint16_t*>(to));
#endif
}
HWY_INLINE void store(Vector x, Vector y, f16* to, bool) {
#if HWY_TARGET == HWY_SCALAR  // whose conversion does not round to nearest
  to[0] = f16(hn::GetLane(x));
  to[1] = f16(hn::GetLane(y));
#else
  const hn::Rebind<hwy::float16_t, Tag> half;
  hn::StoreU(hn::DemoteTo(half, x), half, reinterpret_cast<hwy::float16_t*>(to));
  hn::StoreU(hn::DemoteTo(half, y), half, reinterpret_cast<hwy::float16_t*>(to + lanes));
#endif
}

// Puts finished blocks of the gradient where they belong.
class GradientWriter {
 public:
  explicit GradientWriter(const GradientOut& out) : out_(out) {}

  // gradient: values of the block, may be changed.
  void write(float* gradient, const Blocks& block) {
    for (; next_ < out_.ids.size() && out_.ids[next_] < block.first + block.columns; ++next_)
      gradient[out_.ids[next_] - block.first] = out_.values[next_];
    const std::int64_t label = out_.label - block.first;
    if (label >= 0 && label < block.columns) gradient[label] += out_.label_gradient;
    switch (out_.type) {
      case DType::f32:
        return copy<float>(gradient, block.first, block.columns);
      case DType::bf16:
        return copy<bf16>(gradient, block.first, block.columns);
      default:
        return copy<f16>(gradient, block.first, block.columns);
    }
  }
  void finish(std::int64_t columns) {
    if (out_.padded > columns)
      std::memset(static_cast<char*>(out_.dlogits) + columns * std::int64_t(size_of(out_.type)), 0,
                  std::size_t(out_.padded - columns) * size_of(out_.type));
    if (out_.stream) hwy::FlushStream();
  }

 private:
  template <class T>
  void copy(const float* gradient, std::int64_t first, int n) {
    T* to = static_cast<T*>(out_.dlogits) + first;
    constexpr int pair = 2 * lanes;
    const bool stream = out_.stream && reinterpret_cast<std::uintptr_t>(to) % (pair * sizeof(T)) == 0;
    int i = 0;
    if (stream)
      for (; i + pair <= n; i += pair)
        store(hn::Load(d, gradient + i), hn::Load(d, gradient + i + lanes), to + i, true);
    else
      for (; i + pair <= n; i += pair)
        store(hn::Load(d, gradient + i), hn::Load(d, gradient + i + lanes), to + i, false);
    for (; i < n; ++i) to[i] = T(gradient[i]);
  }

  const GradientOut& out_;
  std::size_t next_ = 0;
};

template <bool has_reverse, bool has_forward, Scaling scaling>
void linear_gradient_of(const GradientOut& out, const Row& row, const RowSums& sums, const LinearGradient& c) {
  constexpr bool has_teacher = has_reverse || has_forward, has_plain = scaling == Scaling::both;
  const Vector max_s = hn::Set(d, float(sums.student_max)), max_t = hn::Set(d, float(sums.teacher_max));
  const Vector scale_s = hn::Set(d, row.student_scale), scale_t = hn::Set(d, row.teacher_scale);
  const Vector p0 = hn::Set(d, c.p0), p1 = hn::Set(d, c.p1), q0 = hn::Set(d, c.q0), c_plain = hn::Set(d, c.plain);
  const Vector shift = hn::Set(d, c.shift);
  Blocks blocks(row);
  HWY_ALIGN_MAX float gradient[block_columns];
  GradientWriter writer(out);
  blocks.for_each<has_teacher>([&](auto student, auto teacher) {
    for (int i = 0; i < blocks.padded; i += lanes) {
      const Vector s = hn::Sub(load(student, i), max_s);
      const Vector a = student_scaled<scaling>(s, scale_s);
      [[maybe_unused]] Vector b = a;
      if constexpr (has_teacher) b = teacher_scaled<scaling>(hn::Sub(load(teacher, i), max_t), scale_t);
      Vector factor = p0;
      if constexpr (has_reverse) factor = hn::MulAdd(p1, hn::Add(hn::Sub(a, b), shift), p0);
      Vector g = hn::Mul(exp_of(a), factor);
      // Two products and a difference: equal sides give exactly zero.
      if constexpr (has_forward) g = hn::Sub(g, hn::Mul(exp_of(b), q0));
      if constexpr (has_plain) g = hn::MulAdd(exp_of(s), c_plain, g);
      hn::Store(g, d, gradient + i);
    }
    writer.write(gradient, blocks);
  });
  writer.finish(row.columns);
}

template <bool has_reverse, bool has_forward>
void linear_gradient_with(const GradientOut& out, const Row& row, const RowSums& sums, const LinearGradient& c) {
  const Scaling scaling = scaling_of(row);
  if (scaling == Scaling::none)
    linear_gradient_of<has_reverse, has_forward, Scaling::none>(out, row, sums, c);
  else if (scaling == Scaling::teacher)
    linear_gradient_of<has_reverse, has_forward, Scaling::teacher>(out, row, sums, c);
  else
    linear_gradient_of<has_reverse, has_forward, Scaling::both>(out, row, sums, c);
}

void linear_gradient(const GradientOut& out, const Row& row, const RowSums& sums, const LinearGradient& c) {
  if (c.p1 != 0)
    c.q0 != 0 ? linear_gradient_with<true, true>(out, row, sums, c)
              : linear_gradient_with<true, false>(out, row, sums, c);
  else
    c.q0 != 0 ? linear_gradient_with<false, true>(out, row, sums, c)
              : linear_gradient_with<false, false>(out, row, sums, c);
}

template <bool has_plain>
void general_gradient_of(const GradientOut& out, const Row& row, const RowSums& sums, const GeneralGradient& c,
                         const Scratch& scratch) {
  const Vector weight = hn::Set(d, c.weight), p0 = hn::Set(d, c.p0);
  const Vector c_plain = hn::Set(d, c.plain), max_s = hn::Set(d, float(sums.student_max));
  Blocks blocks(row);
  HWY_ALIGN_MAX float gradient[block_columns];
  GradientWriter writer(out);
  blocks.for_each<false>([&](auto student, auto) {
    const float* slopes = scratch.slope.data() + blocks.first;
    const float* probabilities = scratch.probability.data() + blocks.first;
    for (int i = 0; i < blocks.padded; i += lanes) {
      Vector g = hn::Mul(hn::LoadU(d, probabilities + i), p0);
      g = hn::MulAdd(hn::LoadU(d, slopes + i), weight, g);
      if constexpr (has_plain) g = hn::MulAdd(exp_of(hn::Sub(load(student, i), max_s)), c_plain, g);
      hn::Store(g, d, gradient + i);
    }
    writer.write(gradient, blocks);
  });
  writer.finish(row.columns);
}

void general_gradient(const GradientOut& out, const Row& row, const RowSums& sums, const GeneralGradient& c,
                      const Scratch& scratch) {
  c.plain != 0 ? general_gradient_of<true>(out, row, sums, c, scratch)
               : general_gradient_of<false>(out, row, sums, c, scratch);
}

// --- top-k

// The k-th largest of the maxima of disjoint groups is a lower bound of the k-th largest logit, and a close one when
// there are several times k groups. A group is one lane over some consecutive vectors.
float topk_bound(const Row& row, int k, Scratch& scratch) {
  int vectors = block_columns / lanes;
  while (vectors > 1 && row.columns / vectors < 4 * std::int64_t(k)) vectors /= 2;
  scratch.group_maxima.resize(std::size_t((row.columns / block_columns + 1) * block_columns / vectors));
  std::size_t groups = 0;
  Blocks blocks(row);
  blocks.for_each_of_teacher([&](const float* teacher) {
    if (blocks.columns != block_columns) return;
    for (int i = 0; i < block_columns; i += vectors * lanes) {
      Vector most = hn::Load(d, teacher + i);
      for (int v = 1; v < vectors; ++v) most = hn::Max(most, hn::Load(d, teacher + i + v * lanes));
      hn::StoreU(most, d, scratch.group_maxima.data() + groups);
      groups += lanes;
    }
  });
  if (groups < std::size_t(k)) return hole;
  scratch.order.resize(groups);
  std::transform(scratch.group_maxima.begin(), scratch.group_maxima.begin() + std::ptrdiff_t(groups),
                 scratch.order.begin(),
                 [](float x) { return std::uint64_t(ordered_bits(x)) << 32 | std::bit_cast<std::uint32_t>(x); });
  const auto kth = scratch.order.begin() + k - 1;
  std::nth_element(scratch.order.begin(), kth, scratch.order.end(), std::greater<>());
  return std::bit_cast<float>(std::uint32_t(*kth));
}

bool find_topk(const Row& row, int k, Scratch& scratch) {
  const float bound = topk_bound(row, k, scratch);
  const Vector least = hn::Set(d, bound);
  scratch.candidates.clear();
  scratch.candidates.reserve(std::size_t(row.columns));
  Blocks blocks(row);
  blocks.for_each_of_teacher([&](const float* teacher) {
    for (int i = 0; i < blocks.columns; i += lanes) {
      if (hn::AllFalse(d, hn::Ge(hn::Load(d, teacher + i), least))) continue;
      for (int j = i; j < std::min(i + lanes, blocks.columns); ++j)
        if (teacher[j] >= bound)  // a smaller id is a larger key
          scratch.candidates.push_back(std::uint64_t(ordered_bits(teacher[j])) << 32 |
                                       ~std::uint32_t(blocks.first + j));
    }
  });
  if (scratch.candidates.size() < std::size_t(k)) return false;
  scratch.order = scratch.candidates;
  const auto kth = scratch.order.begin() + k - 1;
  std::nth_element(scratch.order.begin(), kth, scratch.order.end(), std::greater<>());
  scratch.ids.clear();
  for (const std::uint64_t key : scratch.candidates)
    if (key >= *kth) scratch.ids.push_back(std::int32_t(~std::uint32_t(key)));
  return true;
}

}  // namespace HWY_NAMESPACE
}  // namespace distill::simd
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace distill::simd {

void RowSums::recentre(double new_student_max, double new_teacher_max, double student_scale, double teacher_scale) {
  const double shift_plain = new_student_max - student_max, shift_s = shift_plain * student_scale;
  const double shift_t = (new_teacher_max - teacher_max) * teacher_scale;
  const double factor_s = std::exp(-shift_s), factor_t = std::exp(-shift_t);
  if (shift_s != 0 || shift_t != 0) agreement = false;
  plain *= std::exp(-shift_plain);
  forward = factor_t * (forward + (shift_s - shift_t) * teacher);
  reverse = factor_s * (reverse + (shift_t - shift_s) * student);
  student_dot = factor_s * (student_dot - shift_s * student);
  student *= factor_s;
  teacher_square = factor_t * (teacher_square - 2 * shift_t * teacher_dot + shift_t * shift_t * teacher);
  teacher_dot = factor_t * (teacher_dot - shift_t * teacher);
  teacher *= factor_t;
  student_max = new_student_max;
  teacher_max = new_teacher_max;
}

void RowSums::merge(RowSums other, double student_scale, double teacher_scale) {
  const double most_s = std::max(student_max, other.student_max), most_t = std::max(teacher_max, other.teacher_max);
  recentre(most_s, most_t, student_scale, teacher_scale);
  other.recentre(most_s, most_t, student_scale, teacher_scale);
  plain += other.plain;
  student += other.student;
  student_dot += other.student_dot;
  teacher += other.teacher;
  teacher_dot += other.teacher_dot;
  teacher_square += other.teacher_square;
  forward += other.forward;
  reverse += other.reverse;
  agreement = agreement || other.agreement;
}

void first_pivots(float* at, const RowSums& sums, double alpha) {
  // Around where a logistic distribution of the distances, with their mean (the entropy, up to a constant) and
  // deviation, would have the boundary.
  const double mean = -sums.teacher_dot / sums.teacher;
  const double deviation = std::sqrt(std::max(0.0, sums.teacher_square / sums.teacher - mean * mean));
  const double guess = mean + deviation * std::log((1 - alpha) / alpha) / 1.8;
  constexpr double spread[pivots] = {-0.5, -0.15, 0.15, 0.5};
  for (int i = 0; i < pivots; ++i) at[i] = float(std::max(1e-30, guess + spread[i] * deviation));
}

void Boundary::narrow(const float* at, const PivotSums& sums, double alpha) {
  int i = 0;
  while (i < pivots && far_mass + sums.mass[i] > alpha) ++i;
  if (i < pivots) {
    far = at[i];
    far_mass += sums.mass[i];
    far_gap += sums.gap[i];
  }
  if (i > 0) near = at[i - 1];
}

void Boundary::narrow(const double* mass, const double* gap, double alpha) {
  const int shift = bin_shift();
  int bin = (width() - 1) >> shift;
  for (; bin > 0 && !(far_mass + mass[bin] > alpha); --bin) {
    far_mass += mass[bin];
    far_gap += gap[bin];
  }
  const std::int32_t from = std::bit_cast<std::int32_t>(near) + (bin << shift), to = std::bit_cast<std::int32_t>(far);
  near = std::bit_cast<float>(from);
  far = std::bit_cast<float>(from + std::min(1 << shift, to - from));
}

void Boundary::spread(float* at) const {
  const std::int32_t from = std::bit_cast<std::int32_t>(near), to = std::bit_cast<std::int32_t>(far);
  for (int i = 0; i < pivots; ++i)
    at[i] = std::bit_cast<float>(std::min(to, from + std::max((to - from) / (pivots + 1), 1) * (i + 1)));
}

int Boundary::bin_shift() const {
  int shift = 0;
  while ((width() - 1) >> shift >= bins) ++shift;
  return shift;
}

bool RowSums::finite() const {
  return std::isfinite(plain + student + student_dot + teacher + teacher_dot + forward + reverse);
}

HWY_EXPORT(row_sums);
HWY_EXPORT(head_tail_gaps);
HWY_EXPORT(pivot_sums_of);
HWY_EXPORT(add_histogram);
HWY_EXPORT(divergence_sums);
HWY_EXPORT(linear_gradient);
HWY_EXPORT(general_gradient);
HWY_EXPORT(find_topk);

RowSums row_sums(const Row& row, CrossSums cross) { return HWY_DYNAMIC_DISPATCH(row_sums)(row, cross); }
HeadTailGaps head_tail_gaps(const Row& row, const RowSums& sums, double alpha, Scratch& scratch) {
  return HWY_DYNAMIC_DISPATCH(head_tail_gaps)(row, sums, alpha, scratch);
}
PivotSums pivot_sums(const Row& row, const RowSums& sums, const float* at) {
  return HWY_DYNAMIC_DISPATCH(pivot_sums_of)(row, sums, at);
}
void add_histogram(double* mass, double* gap, const Row& row, const RowSums& sums, const Boundary& boundary) {
  HWY_DYNAMIC_DISPATCH(add_histogram)(mass, gap, row, sums, boundary);
}
DivergenceSums divergence_sums(const Row& row, const RowSums& sums, const LossSpec& spec, Scratch& scratch) {
  return HWY_DYNAMIC_DISPATCH(divergence_sums)(row, sums, spec, scratch);
}
void linear_gradient(const GradientOut& out, const Row& row, const RowSums& sums, const LinearGradient& c) {
  HWY_DYNAMIC_DISPATCH(linear_gradient)(out, row, sums, c);
}
void general_gradient(const GradientOut& out, const Row& row, const RowSums& sums, const GeneralGradient& c,
                      const Scratch& scratch) {
  HWY_DYNAMIC_DISPATCH(general_gradient)(out, row, sums, c, scratch);
}
bool find_topk(const Row& row, int k, Scratch& scratch) { return HWY_DYNAMIC_DISPATCH(find_topk)(row, k, scratch); }

}  // namespace distill::simd
#endif
