// Causal attention over packed sequences in blocks (Dao et al. 2022), never tokens × tokens. Keys and values are packed
// once per call; then blocks of queries meet blocks of keys in tiles that stay in a core's cache.
//
// Forward: a task is a block of queries of one head. Backward: a task owns the gradients dk, dv of one sequence and
// key/value head and adds what the queries give in a fixed order; where there are too few of those for the threads, the
// queries are dealt out to several tasks with partial sums of their own, added in order at the end. So for a given
// number of threads the result is always the same.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "kernels/cpu/attention_functions.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cpu/row_functions.h"

namespace distill {

namespace {

constexpr std::int64_t query_block = 96, key_block = 256, pack_block = 128;

std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Sequence {
  std::int64_t first, length;  // rows of the activations
  std::int64_t packed_first;   // rows of the packed ones, where every sequence starts at a multiple of the padding
  std::int64_t packed_length;
  std::int64_t splits, first_part;  // tasks of the backward per key/value head
};

// q, k, v, their gradients and results of one call, and how they are cut.
template <class T>
struct Problem {
  using C = Compute<T>;
  using F = AttentionFunctions<T>;
  using Word = typename F::Word;
  static constexpr std::int64_t per_word = F::values_per_word;

  AttentionFunctions<T> functions = attention_functions<T>();
  AttentionShape shape;
  ConstView q, k, v;
  std::int64_t group = shape.q_heads / shape.kv_heads;
  std::int64_t words = round_up(shape.head_dim, per_word) / per_word;  // of one row of a head
  std::int64_t columns = round_up(shape.head_dim, F::padding);         // of one row of a product
  Sequence* sequences = nullptr;
  std::int64_t count = 0, packed_rows = 0, longest = 0;

  const T* row(const ConstView& m, std::int64_t r, std::int64_t head) const {
    return m.as<T>() + r * m.stride + head * shape.head_dim;
  }
  T* row(const View& m, std::int64_t r, std::int64_t head) const {
    return m.as<T>() + r * m.stride + head * shape.head_dim;
  }

  void plan(const Segments& segments, Sequence* memory) {
    const std::int32_t* offsets = segments.offsets.as<std::int32_t>();
    sequences = memory;
    count = segments.count();
    for (std::int64_t s = 0; s < count; ++s) {
      const std::int64_t length = offsets[s + 1] - offsets[s], padded = round_up(length, F::padding);
      sequences[s] = {offsets[s], length, packed_rows, padded, 1, 0};
      packed_rows += padded;
      longest = std::max(longest, padded);
    }
  }

  // Where a head's words of a sequence start, and the distance of their rows.
  struct Packed {
    Word* memory = nullptr;
    std::int64_t head_size = 0;
  };
  Packed packed_transposed(Cutter& cutter) const {
    return {cutter.take<Word>(packed_rows * words * shape.kv_heads), packed_rows * words};
  }
  Packed packed_paired(Cutter& cutter) const {
    return {cutter.take<Word>(packed_rows / per_word * columns * shape.kv_heads), packed_rows / per_word * columns};
  }
  Word* transposed(const Packed& p, const Sequence& s, std::int64_t head) const {
    return p.memory + head * p.head_size + s.packed_first * words;
  }
  Word* paired(const Packed& p, const Sequence& s, std::int64_t head) const {
    return p.memory + head * p.head_size + s.packed_first / per_word * columns;
  }

  // body(sequence, head, first row, rows) for all blocks of all sequences, on any thread.
  template <class Body>
  void for_blocks(int threads, std::int64_t heads, std::int64_t block, Body body) const {
#pragma omp parallel num_threads(threads)
    {
      for (std::int64_t s = 0; s < count; ++s) {
        const Sequence& sequence = sequences[s];
        const std::int64_t blocks = (sequence.length + block - 1) / block;
#pragma omp for schedule(dynamic) collapse(2) nowait
        for (std::int64_t b = 0; b < blocks; ++b)
          for (std::int64_t head = 0; head < heads; ++head) {
            // The last blocks see the most keys: largest first.
            const std::int64_t first = (blocks - 1 - b) * block;
            body(sequence, head, first, std::min(block, sequence.length - first));
          }
      }
    }
  }

  void pack(int threads, const Packed* k_transposed, const Packed* k_paired, const Packed* v_transposed,
            const Packed* v_paired) const {
    for_blocks(threads, shape.kv_heads, pack_block,
               [&](const Sequence& s, std::int64_t head, std::int64_t first, std::int64_t rows) {
                 const auto pack_both = [&](const ConstView& m, const Packed* across, const Packed* along) {
                   const T* from = row(m, s.first + first, head);
                   if (across)
                     functions.pack_transposed(transposed(*across, s, head) + first, s.packed_length, from, m.stride,
                                               rows, shape.head_dim);
                   if (along) {
                     const std::int64_t padded = round_up(rows, F::padding);
                     Word* to = paired(*along, s, head) + first / per_word * columns;
                     functions.pack_paired(to, columns, from, m.stride, rows, shape.head_dim);
                     const std::int64_t used = round_up(rows, per_word) / per_word;
                     std::fill(to + used * columns, to + padded / per_word * columns, Word(0));
                   }
                 };
                 pack_both(k, k_transposed, k_paired);
                 pack_both(v, v_transposed, v_paired);
               });
  }

  // body(first key, keys padded, band) for the blocks of keys that queries [first, first + rows) see.
  template <class Body>
  void for_key_blocks(std::int64_t first, std::int64_t rows, Body body) const {
    const std::int64_t begin = shape.window > 0 ? std::max<std::int64_t>(0, first - shape.window + 1) : 0;
    const std::int64_t end = round_up(first + rows, F::padding);
    for (std::int64_t key = begin / F::padding * F::padding; key < end; key += key_block)
      body(key, std::min(key_block, end - key), Band{first - key, shape.window});
  }
};

template <class T>
void forward(View out, View log_sum, Problem<T>& problem, const Segments& segments, int threads, Scratch& shared,
             std::vector<Scratch>& own) {
  using C = Compute<T>;
  using P = Problem<T>;
  using Word = typename P::Word;
  const AttentionShape& shape = problem.shape;
  typename P::Packed keys, values;
  Scratch& plan = own[std::size_t(threads)];
  problem.plan(segments, plan.get<Sequence>(segments.count()));
  const auto cut = [&](Cutter cutter) {
    keys = problem.packed_transposed(cutter);
    values = problem.packed_paired(cutter);
    return cutter.used();
  };
  cut(Cutter(shared.bytes(cut(Cutter()))));
  problem.pack(threads, &keys, nullptr, nullptr, &values);

  problem.for_blocks(threads, shape.q_heads, query_block,
                     [&](const Sequence& s, std::int64_t head, std::int64_t first, std::int64_t rows) {
                       const auto& f = problem.functions;
                       const std::int64_t cols = problem.columns;
                       C *scores, *result, *maximum, *sum;
                       Word *queries, *p;
                       const auto cut_tile = [&](Cutter cutter) {
                         scores = cutter.take<C>(query_block * key_block);
                         p = cutter.take<Word>(query_block * key_block / P::per_word);
                         queries = cutter.take<Word>(query_block * problem.words);
                         result = cutter.take<C>(query_block * cols);
                         maximum = cutter.take<C>(query_block);
                         sum = cutter.take<C>(query_block);
                         return cutter.used();
                       };
                       cut_tile(Cutter(own[std::size_t(omp_get_thread_num())].bytes(cut_tile(Cutter()))));
                       const std::int64_t kv_head = head / problem.group;
                       const Word *k = problem.transposed(keys, s, kv_head), *v = problem.paired(values, s, kv_head);
                       f.pack(queries, problem.words, problem.row(problem.q, s.first + first, head), problem.q.stride,
                              rows, shape.head_dim);
                       std::fill_n(maximum, rows, C(-1e30));
                       std::fill_n(sum, rows, C(0));
                       std::fill_n(result, rows * cols, C(0));
                       problem.for_key_blocks(first, rows, [&](std::int64_t key, std::int64_t width, Band band) {
                         f.product(scores, key_block, queries, problem.words, 1, k + key, s.packed_length, rows, width,
                                   problem.words, false);
                         f.softmax(p, key_block / P::per_word, scores, key_block, rows, width, band, C(shape.scale),
                                   maximum, sum, result, cols);
                         f.product(result, cols, p, key_block / P::per_word, 1, v + key / P::per_word * cols, cols,
                                   rows, cols, width / P::per_word, true);
                       });
                       for (std::int64_t i = 0; i < rows; ++i) {
                         f.store(problem.row(out, s.first + first + i, head), result + i * cols, shape.head_dim,
                                 1 / sum[i]);
                         log_sum.as<C>()[(s.first + first + i) * log_sum.stride + head] = maximum[i] + std::log(sum[i]);
                       }
                     });
}

// P = exp(scale · Q Kᵀ − log_sum), dP = dO Vᵀ, dS = scale · P ∘ (dP − Σ dO ∘ O); dQ = dS K, dK = dSᵀ Q, dV = Pᵀ dO.
template <class T>
class Backward {
 public:
  using C = Compute<T>;
  using P = Problem<T>;
  using Word = typename P::Word;

  Backward(View dq, View dk, View dv, const ConstView& dout, const ConstView& out, const ConstView& log_sum,
           Problem<T>& problem, int threads)
      : dq_(dq), dk_(dk), dv_(dv), dout_(dout), out_(out), log_sum_(log_sum), problem_(problem), threads_(threads) {}

  void run(const Segments& segments, Scratch& shared, std::vector<Scratch>& own) {
    problem_.plan(segments, own[std::size_t(threads_)].get<Sequence>(segments.count()));
    const std::int64_t parts = deal_out();
    const auto cut = [&](Cutter cutter) {
      keys_transposed_ = problem_.packed_transposed(cutter);
      keys_paired_ = problem_.packed_paired(cutter);
      values_transposed_ = problem_.packed_transposed(cutter);
      partial_ = cutter.take<C>(parts * problem_.columns);
      return cutter.used();
    };
    cut(Cutter(shared.bytes(cut(Cutter()))));
    problem_.pack(threads_, &keys_transposed_, &keys_paired_, &values_transposed_, nullptr);
#pragma omp parallel num_threads(threads_)
    {
      for (std::int64_t i = 0; i < problem_.count; ++i) {
        const Sequence& s = problem_.sequences[i];
#pragma omp for schedule(dynamic) collapse(2) nowait
        for (std::int64_t head = 0; head < problem_.shape.kv_heads; ++head)
          for (std::int64_t split = 0; split < s.splits; ++split)
            task(s, head, split, own[std::size_t(omp_get_thread_num())]);
      }
    }
    add_parts();
  }

 private:
  // How many tasks share a sequence and head, so that no task is more than half a thread's share. Returns the rows of
  // partial sums.
  std::int64_t deal_out() {
    double work = 0;
    for (std::int64_t i = 0; i < problem_.count; ++i)
      work += double(problem_.sequences[i].length) * double(problem_.sequences[i].length);
    const double share = work * problem_.shape.kv_heads / (2 * threads_);
    std::int64_t rows = 0;
    for (std::int64_t i = 0; i < problem_.count; ++i) {
      Sequence& s = problem_.sequences[i];
      const double mine = double(s.length) * double(s.length);
      const std::int64_t blocks = (s.length + query_block - 1) / query_block * problem_.group;
      s.splits = threads_ == 1
                     ? 1
                     : std::clamp<std::int64_t>(std::llround(mine / share), 1, std::max<std::int64_t>(1, blocks));
      s.first_part = rows;
      if (s.splits > 1) rows += 2 * s.splits * problem_.shape.kv_heads * s.packed_length;
    }
    return rows;
  }

  // dk and dv of one task.
  C* part(const Sequence& s, std::int64_t head, std::int64_t split) const {
    return partial_ + (s.first_part + 2 * (head * s.splits + split) * s.packed_length) * problem_.columns;
  }

  // Memory of a thread: one tile.
  struct Tile {
    C *scores, *dp, *dqueries, *log_sum, *delta, *sums;
    Word *queries, *grads, *queries_paired, *grads_paired, *p_paired, *ds_paired, *ds;
    std::size_t cut(Cutter cutter, const P& problem) {
      constexpr std::int64_t tile = query_block * key_block;
      scores = cutter.take<C>(tile);
      dp = cutter.take<C>(tile);
      p_paired = cutter.take<Word>(tile / P::per_word);
      ds_paired = cutter.take<Word>(tile / P::per_word);
      ds = P::per_word == 1 ? ds_paired : cutter.take<Word>(tile / P::per_word);
      queries = cutter.take<Word>(query_block * problem.words);
      grads = cutter.take<Word>(query_block * problem.words);
      queries_paired = cutter.take<Word>(query_block / P::per_word * problem.columns);
      grads_paired = cutter.take<Word>(query_block / P::per_word * problem.columns);
      dqueries = cutter.take<C>(query_block * problem.columns);
      log_sum = cutter.take<C>(query_block);
      delta = cutter.take<C>(query_block);
      sums = cutter.take<C>(2 * problem.longest * problem.columns);
      return cutter.used();
    }
  };

  void task(const Sequence& s, std::int64_t kv_head, std::int64_t split, Scratch& memory) const {
    Tile tile;
    tile.cut(Cutter(memory.bytes(tile.cut(Cutter(), problem_))), problem_);
    const std::int64_t cols = problem_.columns;
    C *dkeys = s.splits > 1 ? part(s, kv_head, split) : tile.sums, *dvalues = dkeys + s.packed_length * cols;
    std::fill_n(dkeys, 2 * s.packed_length * cols, C(0));
    const std::int64_t blocks = (s.length + query_block - 1) / query_block;
    for (std::int64_t i = split; i < blocks * problem_.group; i += s.splits) {
      const std::int64_t first = i % blocks * query_block;
      queries(s, kv_head, kv_head * problem_.group + i / blocks, first, std::min(query_block, s.length - first), tile,
              dkeys, dvalues);
    }
    if (s.splits == 1)
      for (std::int64_t r = 0; r < s.length; ++r) store(s, kv_head, r, dkeys + r * cols, dvalues + r * cols);
  }

  void store(const Sequence& s, std::int64_t head, std::int64_t r, const C* dkey, const C* dvalue) const {
    problem_.functions.store(problem_.row(dk_, s.first + r, head), dkey, problem_.shape.head_dim, 1);
    problem_.functions.store(problem_.row(dv_, s.first + r, head), dvalue, problem_.shape.head_dim, 1);
  }

  // What queries [first, first + rows) of a head give: their own gradients, and more for dkeys and dvalues.
  void queries(const Sequence& s, std::int64_t kv_head, std::int64_t head, std::int64_t first, std::int64_t rows,
               const Tile& tile, C* dkeys, C* dvalues) const {
    const auto& f = problem_.functions;
    const AttentionShape& shape = problem_.shape;
    const std::int64_t cols = problem_.columns, words = problem_.words, row = s.first + first;
    constexpr std::int64_t pairs = P::per_word, ds_ld = key_block / pairs;
    const T *q = problem_.row(problem_.q, row, head), *grad = problem_.row(dout_, row, head);
    f.pack(tile.queries, words, q, problem_.q.stride, rows, shape.head_dim);
    f.pack(tile.grads, words, grad, dout_.stride, rows, shape.head_dim);
    f.pack_paired(tile.queries_paired, cols, q, problem_.q.stride, rows, shape.head_dim);
    f.pack_paired(tile.grads_paired, cols, grad, dout_.stride, rows, shape.head_dim);
    for (std::int64_t i = 0; i < rows; ++i) {
      tile.log_sum[i] = log_sum_.as<C>()[(row + i) * log_sum_.stride + head];
      tile.delta[i] = f.dot(grad + i * dout_.stride, problem_.row(out_, row + i, head), shape.head_dim);
    }
    bool is_first = true;
    problem_.for_key_blocks(first, rows, [&](std::int64_t key, std::int64_t width, Band band) {
      const std::int64_t length = s.packed_length, row_words = (rows + pairs - 1) / pairs;
      f.product(tile.scores, key_block, tile.queries, words, 1, problem_.transposed(keys_transposed_, s, kv_head) + key,
                length, rows, width, words, false);
      f.product(tile.dp, key_block, tile.grads, words, 1, problem_.transposed(values_transposed_, s, kv_head) + key,
                length, rows, width, words, false);
      f.softmax_backward(tile.p_paired, tile.ds_paired, tile.ds, ds_ld, tile.scores, tile.dp, key_block, rows, width,
                         band, C(shape.scale), tile.log_sum, tile.delta);
      f.product(tile.dqueries, cols, tile.ds, ds_ld, 1, problem_.paired(keys_paired_, s, kv_head) + key / pairs * cols,
                cols, rows, cols, width / pairs, !is_first);
      f.product(dkeys + key * cols, cols, tile.ds_paired, 1, key_block, tile.queries_paired, cols, width, cols,
                row_words, true);
      f.product(dvalues + key * cols, cols, tile.p_paired, 1, key_block, tile.grads_paired, cols, width, cols,
                row_words, true);
      is_first = false;
    });
    for (std::int64_t i = 0; i < rows; ++i)
      f.store(problem_.row(dq_, row + i, head), tile.dqueries + i * cols, shape.head_dim, 1);
  }

  void add_parts() const {
    const auto add = row_functions<C>().add;
    problem_.for_blocks(threads_, problem_.shape.kv_heads, pack_block,
                        [&](const Sequence& s, std::int64_t head, std::int64_t first, std::int64_t rows) {
                          if (s.splits == 1) return;
                          const std::int64_t cols = problem_.columns, values = s.packed_length * cols;
                          C* sum = part(s, head, 0);
                          for (std::int64_t split = 1; split < s.splits; ++split)
                            for (const std::int64_t start : {first * cols, values + first * cols})
                              add(sum + start, sum + start, part(s, head, split) + start, rows * cols);
                          for (std::int64_t r = first; r < first + rows; ++r)
                            store(s, head, r, sum + r * cols, sum + values + r * cols);
                        });
  }

  View dq_, dk_, dv_;
  ConstView dout_, out_, log_sum_;
  Problem<T>& problem_;
  int threads_;
  typename P::Packed keys_transposed_, keys_paired_, values_transposed_;
  C* partial_ = nullptr;
};

}  // namespace

void CpuDevice::do_attention(View out, View log_sum, const ConstView& q, const ConstView& k, const ConstView& v,
                             const Segments& segments, const AttentionShape& shape) {
  with_float_type(q.dtype, [&](auto t) {
    Problem<decltype(t)> problem{.shape = shape, .q = q, .k = k, .v = v};
    forward(out, log_sum, problem, segments, threads_, shared_scratch_, attention_scratch_);
  });
}

void CpuDevice::do_attention_backward(View dq, View dk, View dv, const ConstView& dout, const ConstView& q,
                                      const ConstView& k, const ConstView& v, const ConstView& out,
                                      const ConstView& log_sum, const Segments& segments, const AttentionShape& shape) {
  with_float_type(q.dtype, [&](auto t) {
    Problem<decltype(t)> problem{.shape = shape, .q = q, .k = k, .v = v};
    Backward<decltype(t)>(dq, dk, dv, dout, out, log_sum, problem, threads_)
        .run(segments, shared_scratch_, attention_scratch_);
  });
}

}  // namespace distill
