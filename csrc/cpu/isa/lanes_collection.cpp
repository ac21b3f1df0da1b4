// Collections of 3 x 3 kernels: two sweeps over a weight in its own order, in which every block goes by the formulas of
// all its manifolds and each lane takes what its own gives. Groups are drawn at random, and a kernel fetched from where
// its group has it costs two cache lines and a wait; arithmetic is cheaper.
#include "cpu/collection.h"
#include "cpu/job_rules.h"
#include "cpu/pass.h"
#include "cpu/storage.h"
#include "cpu/transpose.h"
#include "manifolds/sphere.h"
#include "manifolds/turn.h"

namespace mk {
namespace MK_ISA {
namespace {

using R = float;
using T = Pack<R>;
using Size = Fixed<3, 3>;
constexpr int N = T::lanes, E = Size::capacity, P = Size::p;
constexpr Size size;

// Where kernel c is, counted in lanes.
MK_FN int64_t place(int64_t c) {
  const int inside = int(c % N);
  return c - inside + (rotates<R, Size> ? inside * E % N : inside);
}

MK_FN Pack<R> numbers_of(const int32_t* p) {
#if defined(__AVX512F__)
  return T(_mm512_maskz_cvtepi32_ps(0xffff, _mm512_loadu_si512(p)));
#else
  T x;
  for (int l = 0; l < N; l++) x.v[l] = R(p[l]);
  return x;
#endif
}

MK_FN T look_up(const R* table, const int32_t* index) {
#if defined(__AVX512F__)
  return T(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, _mm512_loadu_si512(index), table, 4));
#else
  R x[N];
  for (int l = 0; l < N; l++) x[l] = table[index[l]];
  return T::load(x);
#endif
}

class Sweep {
  const Collection& all;
  const Job& job;  // all jobs agree in what is taken from this one
  const Momentum<R> momentum;
  const bool ordinary;  // a buffer from the steps before, and gradients as they are
  const bool has_stiefel;
  const T sphere_scale, oblique_scale, stiefel_scale, sphere_inverse, oblique_inverse, stiefel_inverse;

  struct Kinds {
    Mask<R> euclidean, sphere, oblique, stiefel;
  };
  MK_FN Kinds kinds_at(int64_t l) const {
    const T number = numbers_of(all.group + l);
    const auto up_to = [&](ManifoldCode m) { return number < T(R(all.end[int(m)])); };
    const auto a = up_to(ManifoldCode::euclidean), b = up_to(ManifoldCode::sphere), c = up_to(ManifoldCode::oblique);
    return {a, b & !a, c & !b, !c};
  }
  T scale(ManifoldCode m) const { return T(R(all.scale[int(m)])); }
  T inverse(ManifoldCode m) const { return T(R(1)) / scale(m); }

  // xi = d - c w, c = <q, d>/s column by column, over whole kernels or none.
  MK_FN void project(const T* w, const T* d, const Kinds& kinds, T* xi) const {
    T c[P];
    for (int j = 0; j < P; j++) c[j] = inner(w + j, d + j, Size::n, P);
    const T whole = (c[0] + c[1] + c[2]) * (sphere_inverse * sphere_inverse);
    for (int j = 0; j < P; j++) {
      const T column = select(kinds.oblique, c[j] * (oblique_inverse * oblique_inverse), T(R(0)));
      const T factor = select(kinds.sphere, whole, column);
      for (int i = 0; i < Size::n; i++) xi[i * P + j] = sphere::rgrad(w[i * P + j], d[i * P + j], factor);
    }
  }

  // The directions of a block, which are its new momentum where there is one.
  MK_FN void form(const R* w, const R* g, const R* m, int64_t l, T* d) const {
    if (ordinary) {
      const T mu = T(momentum.momentum);
      for (int i = 0; i < E; i++) d[i] = load(g + i * N) + load(m + i * N) * mu;
    } else {
      form_any(w, g, m, l, d);
    }
  }
  __attribute__((noinline)) void form_any(const R* w, const R* g, const R* m, int64_t l, T* d) const {
    Momentum<R> rule = momentum;
    rule.weight_decay = R(0);  // not of all lanes
    const T decay = select(kinds_at(l).euclidean, T(R(job.hyper.weight_decay)), T(R(0)));
    for (int i = 0; i < E; i++) {
      T gradient = rule.gradient(T(R(0)), load(g + i * N));
      if (job.hyper.weight_decay != 0) gradient = fma(load(w + i * N), spread(decay, i, size), gradient);
      d[i] = momentum.buffered ? rule.buffer(gradient, momentum.first ? T(R(0)) : load(m + i * N)) : gradient;
    }
  }

 public:
  explicit Sweep(const Collection& all)
      : all(all),
        job(*all.job),
        momentum(momentum_of<R>(job)),
        ordinary(momentum.buffered && !momentum.first && momentum.plain && momentum.one_minus_dampening == R(1) &&
                 job.hyper.weight_decay == 0),
        has_stiefel(all.end[int(ManifoldCode::stiefel)] > all.end[int(ManifoldCode::oblique)]),
        sphere_scale(scale(ManifoldCode::sphere)),
        oblique_scale(scale(ManifoldCode::oblique)),
        stiefel_scale(scale(ManifoldCode::stiefel)),
        sphere_inverse(inverse(ManifoldCode::sphere)),
        oblique_inverse(inverse(ManifoldCode::oblique)),
        stiefel_inverse(inverse(ManifoldCode::stiefel)) {}

  // The first sweep over the block at place l: its squares, and its new momentum. False, with nothing written, where
  // something is not finite or may be out of range and nobody has seen to it yet.
  template <bool Seen>
  MK_FN bool observe(const R* w, const R* g, R* m, int64_t l, R* squares) const {
    T direction[E], weight[E], d[E], q[E];
    form(w, g, m, l, direction);
    for (int i = 0; i < E; i++) weight[i] = load(w + i * N);
    // Sums as the numbers lie, a ninth of a kernel's at least.
    const T largest = T(Limits<R>::huge_square / E);
    if (!Seen && any(!((square_norm(direction, E) <= largest) & (square_norm(weight, E) <= largest)))) return false;
    if (momentum.buffered)
      for (int i = 0; i < E; i++) store(m + i * N, direction[i]);
    to_lanes(direction, d, size);
    to_lanes(weight, q, size);
    const Kinds kinds = kinds_at(l);
    T xi[E];
    project(q, d, kinds, xi);
    T square = square_norm(xi, E);
    if (has_stiefel) {
      T turn[Size::square_capacity];
      square = select(kinds.stiefel, stiefel::turn(q, d, stiefel_inverse, turn, size), square);
    }
    square.store(squares);
    return true;
  }

  // The same for a block in which there is something: its other kernels. Returns the lanes of those that are left.
  __attribute__((noinline)) uint32_t observe_rest(const R* w, const R* g, R* m, int64_t l, R* squares) const {
    R copy[3][N * E];
    uint32_t left = 0;
    const auto bring = [&](int kernel, int from) {
      for (int e = 0; e < E; e++) {
        copy[0][kernel * E + e] = w[from * E + e];
        copy[1][kernel * E + e] = g[from * E + e];
        copy[2][kernel * E + e] = momentum.buffered ? m[from * E + e] : R(0);
      }
    };
    for (int kernel = 0; kernel < N; kernel++) {  // in a block of nothing else
      for (int i = 0; i < N; i++) bring(i, kernel);
      if (!observe<false>(copy[0], copy[1], copy[2], l, squares)) left |= 1u << place(kernel);
    }
    for (int kernel = 0; kernel < N; kernel++) {
      bring(kernel, kernel);
      for (int e = 0; left >> place(kernel) & 1 && e < E; e++)
        for (R* const numbers : copy) numbers[kernel * E + e] = R(0);
    }
    observe<true>(copy[0], copy[1], copy[2], l, squares);
    for (int kernel = 0; kernel < N; kernel++) {
      const bool is_left = left >> place(kernel) & 1;
      if (is_left) squares[place(kernel)] = R(0);
      for (int e = 0; momentum.buffered && !is_left && e < E; e++) m[kernel * E + e] = copy[2][kernel * E + e];
    }
    return left;
  }

  MK_FN void add(const R* squares, int64_t l, double* sums) const {
    for (int i = 0; i < N; i++) sums[all.group[l + i]] += squares[i];
  }

  // What the second sweep's first half hands on to the other, a block behind: each is a long chain of dependent
  // operations, and the two keep each other's waiting times busy.
  struct Kept {
    T q[E], y[E], turn[Size::square_capacity];
    T length;
  };

  // q, y = q - lr/tau xi, and the turn.
  MK_FN void prepare(const R* w, const R* g, const R* m, int64_t l, Kept& kept) const {
    T in_memory[E], q[E], d[E], y[E];
    if (momentum.buffered) {
      for (int i = 0; i < E; i++) in_memory[i] = load(m + i * N);
    } else {
      form_any(w, g, m, l, in_memory);
    }
    to_lanes(in_memory, d, size);
    for (int i = 0; i < E; i++) in_memory[i] = load(w + i * N);
    to_lanes(in_memory, q, size);
    const T length = -look_up(all.step, all.group + l);
    if (has_stiefel) stiefel::turn(q, d, stiefel_inverse, kept.turn, size);
    project(q, d, kinds_at(l), y);
    for (int e = 0; e < E; e++) kept.y[e] = fma(length, y[e], q[e]);
    for (int e = 0; e < E; e++) kept.q[e] = q[e];
    kept.length = length;
  }

  // The retraction. Returns the kernels that need more than these formulas: long turns, and columns that vanish or
  // overflow. With any of them nothing is written; Rest: the weights of all but them and those in `left` are.
  template <bool Rest>
  MK_FN Mask<R> finish(R* w, int64_t l, const Kept& kept, Mask<R> left) const {
    T in_memory[E], q[E], y[E];
    for (int e = 0; e < E; e++) y[e] = kept.y[e];
    const Kinds kinds = kinds_at(l);
    T columns[P];
    for (int j = 0; j < P; j++) columns[j] = inner(y + j, y + j, Size::n, P);
    const T whole = columns[0] + columns[1] + columns[2];
    const T least = min(columns[0], min(columns[1], columns[2]));
    auto good = kinds.euclidean | ((T(Limits<R>::tiny_square) <= select(kinds.sphere, whole, least)) &
                                   (whole <= T(Limits<R>::huge_square)));
    const T scale = select(kinds.sphere, sphere_scale, oblique_scale);
    for (int j = 0; j < P; j++) {
      const T square = select(kinds.sphere, whole, columns[j]);
      const T factor = select(kinds.euclidean, T(R(1)), scale * rsqrt(square));
      for (int i = 0; i < Size::n; i++) y[i * P + j] = y[i * P + j] * factor;
    }
    if (has_stiefel) {
      T turned[E];
      for (int e = 0; e < E; e++) q[e] = kept.q[e];
      const T* const A = kept.turn;
      const T square = fma(A[0], A[0], fma(A[1], A[1], A[2] * A[2])) * T(R(2));
      const auto near = stiefel::retract_near(q, A, kept.length * stiefel_inverse, square, stiefel_scale, turned, size);
      for (int e = 0; e < E; e++) y[e] = select(kinds.stiefel, turned[e], y[e]);
      good = (good & !kinds.stiefel) | (near & kinds.stiefel);
    }
    if (Rest) {
      for (int e = 0; e < E; e++) y[e] = select(good & !left, y[e], kept.q[e]);
    } else if (any(!good)) {
      return !good;
    }
    from_lanes(y, in_memory, size);
    for (int i = 0; i < E; i++) store(w + i * N, in_memory[i]);
    return !good;
  }
  __attribute__((noinline)) void finish_rest(R* w, int64_t l, const Kept& kept, uint32_t* left) const {
    R is_left[N];
    for (int i = 0; i < N; i++) is_left[i] = R(*left >> i & 1);
    const Mask<R> more = finish<true>(w, l, kept, T(R(0)) < T::load(is_left));
    for (int i = 0; i < N; i++)
      if (is_left[i] == R(0) && more.at(i)) *left |= 1u << (i + Collection::most_lanes);
  }
  MK_FN void finish_any(R* w, int64_t l, const Kept& kept, uint32_t* left) const {
    if (*left || any(finish<false>(w, l, kept, Mask<R>{}))) finish_rest(w, l, kept, left);
  }

  template <class Number>
  MK_FN static Number* after(Number* buffer, int64_t at) {  // which may not be there
    return buffer ? buffer + at : buffer;
  }

  // f(w, g, m): the last block, where it is a part of one, in a copy.
  template <class F>
  MK_FN void in_copy(const F& f) const {
    R* const w = static_cast<R*>(job.weight);
    R* const m = static_cast<R*>(job.momentum);
    const int64_t start = all.count / N * N * E;
    const int numbers = int(all.count % N) * E;
    R copy[3][N * E];
    for (int i = 0; i < N * E; i++) {
      const int64_t from = start + (i < numbers ? i : numbers - E + i % E);  // the last kernel, over and over
      copy[0][i] = w[from];
      copy[1][i] = static_cast<const R*>(job.grad)[from];
      copy[2][i] = m ? m[from] : R(0);
    }
    f(copy[0], copy[1], copy[2]);
    for (int i = 0; i < numbers; i++) {
      w[start + i] = copy[0][i];
      if (m) m[start + i] = copy[2][i];
    }
  }

  void first(int64_t chunk) const {
    double* const sums = all.square + chunk * all.groups;
    R* const w = static_cast<R*>(job.weight);
    const R* const g = static_cast<const R*>(job.grad);
    R* const m = static_cast<R*>(job.momentum);
    const int64_t whole = all.count / N, begin = chunk * Collection::chunk, end = begin + Collection::chunk;
    const int64_t last = end < whole ? end : whole;
    // Squares are added a block later: to wait for them would keep everything behind them waiting.
    R squares[2][N];
    for (int64_t b = begin; b <= last; b++) {
      const int64_t at = b * N * E;
      if (b < last && !observe<false>(w + at, g + at, after(m, at), b * N, squares[b % 2]))
        all.left[b] = observe_rest(w + at, g + at, after(m, at), b * N, squares[b % 2]);
      if (b > begin) add(squares[(b - 1) % 2], (b - 1) * N, sums);
    }
    if (whole < end && all.count % N != 0)
      in_copy([&](R* w, const R* g, R* m) {
        if (!observe<false>(w, g, m, whole * N, squares[0]))
          all.left[whole] = observe_rest(w, g, m, whole * N, squares[0]);
        add(squares[0], whole * N, sums);
      });
  }

  void second(int64_t begin, int64_t end) const {
    R* const w = static_cast<R*>(job.weight);
    const R* const g = static_cast<const R*>(job.grad);
    const R* const m = static_cast<const R*>(job.momentum);
    const int64_t whole = all.count / N, last = end < whole ? end : whole;
    Kept kept[2];
    for (int64_t b = begin; b <= last; b++) {
      const int64_t at = b * N * E;
      if (b < last) prepare(w + at, g + at, after(m, at), b * N, kept[b % 2]);
      if (b > begin) finish_any(w + at - N * E, (b - 1) * N, kept[(b - 1) % 2], all.left + b - 1);
    }
    if (end > whole)
      in_copy([&](R* w, const R* g, const R* m) {
        prepare(w, g, m, whole * N, kept[0]);
        finish_any(w, whole * N, kept[0], all.left + whole);
      });
  }
};

}  // namespace

int64_t collection_place(int64_t kernel) { return place(kernel); }

void collection_first(const Collection& all, int64_t chunk) { Sweep(all).first(chunk); }
void collection_second(const Collection& all, int64_t begin, int64_t end) { Sweep(all).second(begin, end); }

}  // namespace MK_ISA
}  // namespace mk
