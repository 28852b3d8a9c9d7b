// Norms and sums. Every sum is cut by the shape alone and its parts are added in order: same shape, same bits. No
// atomics.
#include "kernels/cuda/language.h"  // before what includes the toolkit's headers

#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/memory.cuh"
#include "kernels/cuda/team.cuh"
#include "kernels/rows.h"

namespace distill {

using namespace cuda;

namespace {

// --- column sums: 32 columns × 32 rows of threads

constexpr int across = 32, down = 32;

// Sums over `block_rows` rows of x, in A. to_partial: row blockIdx.y of it; else sums += (there is one block of rows).
template <class S, class A, class T>
__global__ void column_sums_kernel(S* sums, A* to_partial, Rows<const T> x, std::int64_t rows, std::int64_t cols,
                                   std::int64_t block_rows) {
  SHARED_ARRAY(A, part, down * (across + 1));
  const std::int64_t column = std::int64_t(blockIdx.x) * across + threadIdx.x;
  const std::int64_t first = std::int64_t(blockIdx.y) * block_rows;
  const std::int64_t last = rows < first + block_rows ? rows : first + block_rows;
  A sum = 0;
  if (column < cols)
    for (std::int64_t r = first + threadIdx.y; r < last; r += down) sum += A(Compute<T>(x[r][column]));
  part[threadIdx.y * (across + 1) + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= cols) return;
  for (int y = 1; y < down; ++y) sum += part[y * (across + 1) + int(threadIdx.x)];
  if (to_partial)
    to_partial[std::int64_t(blockIdx.y) * cols + column] = sum;
  else
    sums[column] = S(Compute<S>(A(Compute<S>(sums[column])) + sum));
}

template <class S, class A, class T>
void add_columns(cudaStream_t stream, S* sums, A* to_partial, const Rows<const T>& x, std::int64_t rows,
                 std::int64_t cols, std::int64_t block_rows) {
  const std::int64_t blocks = to_partial ? blocks_for(rows, block_rows) : 1;
  check(blocks <= 65535, "column sums of ", rows, " rows");
  launch(column_sums_kernel<S, A, T>,
         Grid(dim3(as_blocks(blocks_for(cols, across)), unsigned(blocks)), dim3(across, down)), stream, sums,
         to_partial, x, rows, cols, to_partial ? block_rows : rows);
}

// --- Σ x²

constexpr int span = 1 << 14, span_threads = 256;

// parts[row · spans + span], each over 16384 neighbours.
template <class T>
__global__ void square_parts_kernel(double* parts, Rows<const T> x, std::int64_t cols, std::int64_t spans) {
  constexpr int n = pack<T>;
  const std::int64_t row = blockIdx.x / spans, first = blockIdx.x % spans * span;
  const std::int64_t last = cols < first + span ? cols : first + span;
  double sum = 0;
  for (std::int64_t c = first + std::int64_t(threadIdx.x) * n; c < last; c += span_threads * n) {
    const auto few = load<n>(x[row] + c, int(last - c < n ? last - c : n), x.is_aligned);
    sum += sum_of_squares_row(Lone{}, few.value, n);
  }
  sum = Block().sum(sum);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__global__ void add_parts_kernel(double* sum, const double* parts, std::int64_t count) {
  double part = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += span_threads) part += parts[i];
  part = Block().sum(part);
  if (threadIdx.x == 0) *sum += part;
}

// --- the gradient of an embedding: a block per token, of which the first of each id works for all of them

constexpr int token_threads = 256;

// How many threads before this one in the block say yes, and all of them together.
struct Rank {
  int before, all;
};
__device__ Rank rank_in_block(bool yes) {
  SHARED_ARRAY(int, of_warp, token_threads / Warp::size);
  const unsigned votes = __ballot_sync(all_lanes, yes);
  const int warp = int(threadIdx.x) / Warp::size;
  if (Warp().lane() == 0) of_warp[warp] = __popc(votes);
  __syncthreads();
  Rank rank{__popc(votes & ((1u << Warp().lane()) - 1)), 0};
  for (int w = 0; w < token_threads / Warp::size; ++w) {
    if (w < warp) rank.before += of_warp[w];
    rank.all += of_warp[w];
  }
  return rank;
}

template <class T>
__global__ void embedding_backward_kernel(Rows<Compute<T>> dtable, Rows<const T> dout, const std::int32_t* ids,
                                          std::int64_t first_id, std::int64_t table_rows, std::int64_t tokens,
                                          std::int64_t cols) {
  SHARED_ARRAY(int, same, token_threads);  // tokens of this id, from the current 256, in order
  const std::int64_t token = blockIdx.x, row = std::int64_t(ids[token]) - first_id;
  const std::int32_t id = ids[token];
  if (row < 0 || row >= table_rows) return;
  bool seen = false;
  for (std::int64_t i = threadIdx.x; i < token; i += token_threads) seen = seen || ids[i] == id;
  if (__syncthreads_or(seen)) return;
  for (std::int64_t first = token; first < tokens; first += token_threads) {
    const std::int64_t mine = first + threadIdx.x;
    const bool is_same = mine < tokens && ids[mine] == id;
    const Rank rank = rank_in_block(is_same);  // a barrier: all have done with `same`
    if (is_same) same[rank.before] = int(threadIdx.x);
    __syncthreads();
    for (std::int64_t c = threadIdx.x; rank.all > 0 && c < cols; c += token_threads) {
      Compute<T> sum = dtable[row][c];
      for (int i = 0; i < rank.all; ++i) sum += Compute<T>(dout[first + same[i]][c]);
      dtable[row][c] = sum;
    }
  }
}

// --- norms. A row is one group of n columns, of `groups` to a token. Rows of at most 1024 columns are a warp's, wider
// ones a block's.

constexpr int norm_threads = 256, warps = norm_threads / Warp::size;
constexpr std::int64_t widest_for_warp = 1024;

template <class T>
struct NormRows {
  Rows<T> rows;
  std::int64_t groups = 1, n = 0;
  __device__ T* operator[](std::int64_t row) const { return rows[row / groups] + row % groups * n; }
};
template <class T>
NormRows<T> norm_rows(Rows<T> rows, std::int64_t groups, std::int64_t n) {
  rows.is_aligned = rows.is_aligned && (groups == 1 || std::size_t(n) * sizeof(T) % 16 == 0);
  return {rows, groups, n};
}

template <class Team>
struct TeamOf;
template <>
struct TeamOf<Warp> {
  static constexpr int per_block = warps, rows_each = 4;
  __device__ static int index() { return int(threadIdx.x) / Warp::size; }
};
template <>
struct TeamOf<Block> {
  static constexpr int per_block = 1, rows_each = 8;
  __device__ static int index() { return 0; }
};
template <class Team>
inline constexpr int norm_block_rows = TeamOf<Team>::per_block* TeamOf<Team>::rows_each;

// body(first column, columns) for the chunks of n elements of a row that are this lane's.
template <int n, class Team, class Body>
__device__ void for_row(Team team, std::int64_t cols, Body&& body) {
  for (std::int64_t c = std::int64_t(team.lane()) * n; c < cols; c += std::int64_t(team.lanes()) * n)
    body(c, int(cols - c < n ? cols - c : n));
}

// With delta: sum = x + delta, y = rms_norm(sum). A lane reads back only what it wrote.
template <class T, class Team>
__global__ void rms_norm_kernel(NormRows<T> y, NormRows<Compute<T>> inv_rms, NormRows<T> sum, NormRows<const T> x,
                                NormRows<const T> delta, Rows<const T> w, std::int64_t rows, float eps) {
  constexpr int n = pack<T>;
  using C = Compute<T>;
  const Team team;
  const std::int64_t row = std::int64_t(blockIdx.x) * TeamOf<Team>::per_block + TeamOf<Team>::index();
  if (row >= rows) return;
  C squares = 0;
  for_row<n>(team, x.n, [&](std::int64_t c, int count) {
    auto few = load<n>(x[row] + c, count, x.rows.is_aligned);
    if (delta.rows.data) {
      const auto more = load<n>(delta[row] + c, count, delta.rows.is_aligned);
      add_row(Lone{}, few.value, few.value, more.value, n);
      store(sum[row] + c, few, count, sum.rows.is_aligned);
    }
    for (int i = 0; i < n; ++i) squares += C(few.value[i]) * C(few.value[i]);
  });
  const C inv = inverse_rms_of(team.sum(squares), x.n, eps);
  if (team.lane() == 0) *inv_rms[row] = inv;
  for_row<n>(team, x.n, [&](std::int64_t c, int count) {
    auto few = delta.rows.data ? load<n>(sum[row] + c, count, sum.rows.is_aligned)
                               : load<n>(x[row] + c, count, x.rows.is_aligned);
    const auto weight = load<n>(w.data + c, count, w.is_aligned);
    for (int i = 0; i < n; ++i) few.value[i] = normed(few.value[i], inv, weight.value[i]);
    store(y[row] + c, few, count, y.rows.is_aligned);
  });
}

// rows.h, rms_norm_backward_row. dw_parts [blocks, n]: what the rows of one block give. dskip may have no data.
template <class T, class Team>
__global__ void rms_norm_backward_kernel(NormRows<T> dx, Compute<T>* dw_parts, NormRows<const T> dy,
                                         NormRows<const T> dskip, NormRows<const T> x, Rows<const T> w,
                                         NormRows<const Compute<T>> inv_rms, std::int64_t rows) {
  constexpr int n = pack<T>;
  using C = Compute<T>;
  const Team team;
  const std::int64_t width = x.n;
  C* const all_dw = dynamic_shared<C>();
  C* const dw = all_dw + TeamOf<Team>::index() * width;  // of this team; a lane has its own columns
  for_row<n>(team, width, [&](std::int64_t c, int count) {
    for (int i = 0; i < count; ++i) dw[c + i] = 0;
  });
  const std::int64_t first =
      (std::int64_t(blockIdx.x) * TeamOf<Team>::per_block + TeamOf<Team>::index()) * TeamOf<Team>::rows_each;
  const std::int64_t last = rows < first + TeamOf<Team>::rows_each ? rows : first + TeamOf<Team>::rows_each;
  for (std::int64_t row = first; row < last; ++row) {
    const C inv = *inv_rms[row];
    C dot = 0;
    for_row<n>(team, width, [&](std::int64_t c, int count) {
      const auto d = load<n>(dy[row] + c, count, dy.rows.is_aligned),
                 at = load<n>(x[row] + c, count, x.rows.is_aligned), weight = load<n>(w.data + c, count, w.is_aligned);
      for (int i = 0; i < n; ++i) dot += C(d.value[i]) * C(weight.value[i]) * C(at.value[i]);
    });
    const C along = team.sum(dot) * inv * inv / C(width);
    for_row<n>(team, width, [&](std::int64_t c, int count) {
      const auto d = load<n>(dy[row] + c, count, dy.rows.is_aligned),
                 at = load<n>(x[row] + c, count, x.rows.is_aligned), weight = load<n>(w.data + c, count, w.is_aligned);
      Few<T, n> skip{}, result;
      if (dskip.rows.data) skip = load<n>(dskip[row] + c, count, dskip.rows.is_aligned);
      for (int i = 0; i < n; ++i) {
        const C gradient = C(d.value[i]);
        if (i < count) dw[c + i] += gradient * C(at.value[i]) * inv;
        const C value = inv * (gradient * C(weight.value[i]) - C(at.value[i]) * along);
        result.value[i] = T(dskip.rows.data ? value + C(skip.value[i]) : value);
      }
      store(dx[row] + c, result, count, dx.rows.is_aligned);
    });
  }
  __syncthreads();
  for (std::int64_t c = threadIdx.x; c < width; c += norm_threads) {
    C sum = all_dw[c];
    for (int t = 1; t < TeamOf<Team>::per_block; ++t) sum += all_dw[t * width + c];
    dw_parts[std::int64_t(blockIdx.x) * width + c] = sum;
  }
}

template <class Body>
void with_team(std::int64_t width, Body&& body) {
  width <= widest_for_warp ? body(Warp()) : body(Block());
}

}  // namespace

void CudaDevice::do_column_sums(View sums, const ConstView& x) {
  constexpr std::int64_t block_rows = 256;
  if (x.size() == 0) return;
  const std::int64_t blocks = blocks_for(x.rows, block_rows);
  double* const parts = scratch<double>(blocks * x.cols);
  with_float_type(x.dtype, [&](auto t) {
    add_columns<double, double>(stream(), nullptr, parts, rows_of<decltype(t)>(x), x.rows, x.cols, block_rows);
  });
  with_float_type(sums.dtype, [&](auto s) {
    using S = decltype(s);
    if constexpr (sizeof(S) > 2)
      add_columns<S, double, double>(stream(), sums.as<S>(), nullptr, Rows<const double>{parts, x.cols}, blocks, x.cols,
                                     0);
  });
}

void CudaDevice::do_sum_of_squares(View sum, const ConstView& x) {
  if (x.size() == 0) return;
  const std::int64_t cols = x.contiguous() ? x.size() : x.cols, rows = x.size() / cols;
  const std::int64_t spans = blocks_for(cols, span), count = rows * spans;
  double* const parts = scratch<double>(count);
  with_float_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    launch(square_parts_kernel<T>, Grid(as_blocks(count), span_threads), stream(), parts, rows_of<T>(x), cols, spans);
  });
  launch(add_parts_kernel, Grid(1, span_threads), stream(), sum.as<double>(), parts, count);
}

void CudaDevice::do_embedding_backward(View dtable, const ConstView& dout, const ConstView& ids,
                                       std::int32_t first_id) {
  with_float_type(dout.dtype, [&](auto t) {
    using T = decltype(t);
    launch(embedding_backward_kernel<T>, Grid(as_blocks(dout.rows), token_threads), stream(),
           rows_of<Compute<T>>(dtable), rows_of<T>(dout), ids.as<std::int32_t>(), first_id, dtable.rows, dout.rows,
           dout.cols);
  });
}

void CudaDevice::norm(View sum, View y, View inv_rms, const ConstView& x, const ConstView& delta, const ConstView& w,
                      float eps) {
  with_float_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    const std::int64_t n = w.cols, groups = x.cols / n, rows = x.rows * groups;
    with_team(n, [&](auto team) {
      using Team = decltype(team);
      launch(rms_norm_kernel<T, Team>, Grid(as_blocks(blocks_for(rows, TeamOf<Team>::per_block)), norm_threads),
             stream(), norm_rows(rows_of<T>(y), groups, n), norm_rows(rows_of<C>(inv_rms), groups, 1),
             norm_rows(delta.data ? rows_of<T>(sum) : Rows<T>(), groups, n), norm_rows(rows_of<T>(x), groups, n),
             norm_rows(delta.data ? rows_of<T>(delta) : Rows<const T>(), groups, n), rows_of<T>(w), rows, eps);
    });
  });
}

void CudaDevice::norm_backward(View dx, View dw, const ConstView& dy, const ConstView& dskip, const ConstView& x,
                               const ConstView& w, const ConstView& inv_rms) {
  if (x.rows == 0) return;
  with_float_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    const std::int64_t n = w.cols, groups = x.cols / n, rows = x.rows * groups;
    with_team(n, [&](auto team) {
      using Team = decltype(team);
      const std::int64_t blocks = blocks_for(rows, norm_block_rows<Team>);
      C* const parts = scratch<C>(blocks * n);
      const std::size_t shared = std::size_t(TeamOf<Team>::per_block * n) * sizeof(C);
      launch(rms_norm_backward_kernel<T, Team>, Grid(as_blocks(blocks), norm_threads, shared), stream(),
             norm_rows(rows_of<T>(dx), groups, n), parts, norm_rows(rows_of<T>(dy), groups, n),
             norm_rows(dskip.data ? rows_of<T>(dskip) : Rows<const T>(), groups, n),
             norm_rows(rows_of<T>(x), groups, n), rows_of<T>(w), norm_rows(rows_of<C>(ConstView(inv_rms)), groups, 1),
             rows);
      add_columns<C, C, C>(stream(), dw.as<C>(), nullptr, Rows<const C>{parts, n}, blocks, n, 0);
    });
  });
}

void CudaDevice::do_rms_norm(View y, View inv_rms, const ConstView& x, const ConstView& w, float eps) {
  norm({}, y, inv_rms, x, {}, w, eps);
}
void CudaDevice::do_add_rms_norm(View sum, View y, View inv_rms, const ConstView& x, const ConstView& delta,
                                 const ConstView& w, float eps) {
  norm(sum, y, inv_rms, x, delta, w, eps);
}
void CudaDevice::do_rms_norm_backward(View dx, View dw, const ConstView& dy, const ConstView& x, const ConstView& w,
                                      const ConstView& inv_rms) {
  norm_backward(dx, dw, dy, {}, x, w, inv_rms);
}
void CudaDevice::do_rms_norm_backward_add(View dx, View dw, const ConstView& dy, const ConstView& dskip,
                                          const ConstView& x, const ConstView& w, const ConstView& inv_rms) {
  norm_backward(dx, dw, dy, dskip, x, w, inv_rms);
}

}  // namespace distill
