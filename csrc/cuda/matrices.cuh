// Stiefel matrices in shared memory, one to a team of threads: a warp to 32 rows, a block to 128. The formulas are
// those of manifolds/stiefel.h, by products of matrices.
#pragma once

#include "cuda/householder.cuh"
#include "cuda/products.cuh"
#include "cuda/spans.cuh"

namespace mk {
namespace cuda {

template <class R, class T>
class Matrix {
  const Tables& t;
  const Group& g;
  const Rules<R>& rules;
  const Span<R, T> span;
  const bool stored;  // the buffer holds the new momentum
  const R scale;
  R *Q, *D, *A;
  const int n, p;
  Unit<R> unit;

  // f(e, w, gradient, new buffer) over the elements; with Write, w and the buffer are stored as flags say.
  template <bool Write, class F>
  MK_DEVICE void each(bool write_weight, bool write_momentum, const F& f) const {
    const Momentum<R>& momentum = rules.momentum;
    const bool read_grad = !stored || !momentum.buffer_is_direction();
    const bool read_momentum = momentum.buffered && (stored || !momentum.first);
    span.template each<Write>(read_grad, read_momentum, write_weight, write_momentum && momentum.buffered,
                              [&](int64_t e, R& w, R grad, R& m, auto s) {
                                grad = read_grad ? rules.gradient(R(0), grad) : R(0);
                                if (!momentum.buffered) {
                                  m = grad;
                                } else if (!stored) {
                                  m = as_stored<decltype(s)>(momentum.buffer(grad, m));
                                }
                                f(int(e), w, grad, m);
                              });
  }

  // The rotation E of the skew part of step Q^T D (p x p), for matrices that are square.
  MK_DEVICE R* rotation(R step, bool exp) {
    R *E = A + p * p, *work = E + p * p;
    product<true, T>(Q, p, D, p, p, n, p, [&](int i, int j, R x) { E[i * p + j] = x; });
    each_element<T>(p * p, [&](int e) {
      const int i = e / p, j = e % p;
      A[e] = R(0.5) * step * (E[i * p + j] - E[j * p + i]);
    });
    if (exp) return exponential<T>(A, E, work, p);
    // (I - A/2) E = I + A/2, as [K B]
    R* M = E;
    each_element<T>(2 * p * p, [&](int e) {
      const int i = e / (2 * p), j = e % (2 * p), k = j < p ? j : j - p;
      const R half = R(0.5) * A[i * p + k], one = R(i == k ? 1 : 0);
      M[e] = j < p ? one - half : one + half;
    });
    solve<T>(M, p, p);
    each_element<T>(p * p, [&](int e) { A[e] = M[e / p * 2 * p + p + e % p]; });
    return A;
  }

  // Y = Q E, then its polar factor.
  MK_DEVICE R* turn(R step, bool exp) {
    const R* E = rotation(step, exp);
    product<false, T>(Q, p, E, p, n, p, p, [&](int i, int j, R x) { D[i * p + j] = x; });
    return polar_factor<T>(D, Q, A, n, p);
  }

  // Y = Q + U (I - Z^T U / 2)^{-1} Z^T Q with P = I - Q Q^T / 2, U = [P X, Q], Z = [Q, -P X], X = step D.
  MK_DEVICE R* cayley(R step) {
    const int m = 2 * p;
    R *PX = A + p * p, *Y = PX + n * p, *QQ = Y + n * p, *PP = QQ + p * p, *M = PP + p * p;
    product<true, T>(Q, p, D, p, p, n, p, [&](int i, int j, R x) { A[i * p + j] = R(0.5) * x; });
    product<false, T>(Q, p, A, p, n, p, p, [&](int i, int j, R x) { PX[i * p + j] = step * (D[i * p + j] - x); });
    product<true, T>(Q, p, PX, p, p, n, p, [&](int i, int j, R x) { A[i * p + j] = x; });
    product<true, T>(Q, p, Q, p, p, n, p, [&](int i, int j, R x) { QQ[i * p + j] = x; });
    product<true, T>(PX, p, PX, p, p, n, p, [&](int i, int j, R x) { PP[i * p + j] = x; });
    // [K B] with Z^T U = [[Q^T PX, Q^T Q], [-PX^T PX, -PX^T Q]], Z^T Q = [Q^T Q; -PX^T Q]
    each_element<T>(m * (m + p), [&](int e) {
      const int i = e / (m + p), j = e % (m + p), r = i < p ? i : i - p;
      const auto product_at = [&](int column) {
        const int c = column < p ? column : column - p;
        if (i < p) return column < p ? A[r * p + c] : QQ[r * p + c];
        return column < p ? -PP[r * p + c] : -A[c * p + r];
      };
      M[e] = j < m ? fma(R(-0.5), product_at(j), R(i == j ? 1 : 0)) : product_at(j - m + p);
    });
    solve<T>(M, m, p);
    product<false, T>(PX, p, M + m, m + p, n, p, p, [&](int i, int j, R x) { Y[i * p + j] = Q[i * p + j] + x; });
    product<false, T>(Q, p, M + p * (m + p) + m, m + p, n, p, p,
                      [&](int i, int j, R x) { D[i * p + j] = Y[i * p + j] + x; });
    return polar_factor<T>(D, Q, A, n, p);
  }

  // Y = [Q X] expm([[A, -X^T X], [I, A]]) [I; 0] expm(-A), A = Q^T X, X = step D.
  MK_DEVICE R* exponential_map(R step) {
    const int m = 2 * p;
    R *Y = A + p * p, *S = Y + n * p, *block = S + p * p, *E = block + m * m, *work = E + m * m;
    project();  // once more: the exponential grows with what is symmetric in A
    product<true, T>(Q, p, D, p, p, n, p, [&](int i, int j, R x) { S[i * p + j] = x; });
    each_element<T>(p * p, [&](int e) { A[e] = R(0.5) * step * (S[e] - S[e % p * p + e / p]); });
    each_element<T>(n * p, [&](int e) { D[e] = step * D[e]; });
    product<true, T>(D, p, D, p, p, n, p, [&](int i, int j, R x) { S[i * p + j] = x; });
    each_element<T>(m * m, [&](int e) {
      const int i = e / m, j = e % m, r = i < p ? i : i - p, c = j < p ? j : j - p;
      if ((i < p) == (j < p)) {
        block[e] = A[r * p + c];
      } else {
        block[e] = i < p ? -S[r * p + c] : R(r == c ? 1 : 0);
      }
    });
    const R* big = mk::cuda::exponential<T>(block, E, work, m);
    product<false, T>(Q, p, big, m, n, p, p, [&](int i, int j, R x) { Y[i * p + j] = x; });
    product<false, T>(D, p, big + p * m, m, n, p, p, [&](int i, int j, R x) { Y[i * p + j] = Y[i * p + j] + x; });
    each_element<T>(p * p, [&](int e) { A[e] = -A[e]; });
    const R* small = mk::cuda::exponential<T>(A, block, block + p * p, p);
    product<false, T>(Y, p, small, p, n, p, p, [&](int i, int j, R x) { D[i * p + j] = x; });
    return polar_factor<T>(D, Q, A, n, p);
  }

 public:
  MK_DEVICE Matrix(const Tables& t, const Group& g, const Rules<R>& rules, int64_t position, bool stored, R* shared)
      : t(t),
        g(g),
        rules(rules),
        span(t, g, position),
        stored(stored && rules.momentum.buffered),
        scale(span.scale()),
        Q(shared),
        D(shared + span.length),
        A(shared + 2 * span.length),
        n(int(t.geometries[g.geometry].n)),
        p(int(t.geometries[g.geometry].p)) {}

  // W/s and the direction into shared memory; false where a number is not finite.
  MK_DEVICE bool load() {
    const R inverse = R(1) / scale;
    const bool ahead = rules.momentum.buffered && rules.momentum.nesterov;
    uint32_t top = 0, weights = 0;
    T::sync();  // the last matrix is done with
    each<false>(false, false, [&](int e, R w, R grad, R kept) {
      Q[e] = w * inverse;
      D[e] = kept;
      weights = larger(weights, magnitude(w));
      top = larger(top, magnitude(kept));
      if (ahead) top = larger(top, magnitude(grad));
    });
    top = T::largest(top);
    unit = Unit<R>(top);
    // By the threads that have written it.
    each<false>(false, false, [&](int e, R, R grad, R kept) {
      D[e] = rules.momentum.direction(grad * unit.inverse, kept * unit.inverse);
    });
    T::sync();
    return larger(top, T::largest(weights)) < Range<R>::beyond;
  }

  // D becomes the tangent direction; returns its squared norm.
  MK_DEVICE R project() {
    product<true, T>(Q, p, D, p, p, n, p, [&](int i, int j, R x) { A[i * p + j] = x; });
    each_element<T>(p * p, [&](int e) {
      const int i = e / p, j = e % p;
      if (i < j) A[i * p + j] = A[j * p + i] = R(0.5) * (A[i * p + j] + A[j * p + i]);
    });
    product<false, T>(Q, p, A, p, n, p, p, [&](int i, int j, R x) { D[i * p + j] = D[i * p + j] - x; });
    return sum_of_squares<T>(D, n * p);
  }

  MK_DEVICE double wide(R square) const { return double(square) * double(unit.size) * double(unit.size); }

  // W <- R_W(-rate xi) for the projected direction in D, with its squared norm.
  MK_DEVICE void step(double rate, R square) {
    const R norm = sqrt(square), longest = longest_step<R>(g.retraction);
    R length = R(rate) * unit.size / scale;
    if (!(length * norm <= longest)) length = longest / norm;
    const R* result;
    if (g.retraction == Retraction::cayley) {
      result = n == p ? turn(-length, false) : cayley(-length);
    } else if (g.retraction == Retraction::exp) {
      result = n == p ? turn(-length, true) : exponential_map(-length);
    } else if (g.retraction == Retraction::polar) {
      // Singular values between 1 and sqrt(1 + k) come about 1, see linalg/polar.h.
      const R shrink = R(1) / sqrt(fma(R(0.5) * length * length, square, R(1)));
      each_element<T>(n * p, [&](int e) { D[e] = fma(-length * shrink, D[e], shrink * Q[e]); });
      result = polar_factor<T>(D, Q, A, n, p);
    } else {
      each_element<T>(n * p, [&](int e) { D[e] = fma(-length, D[e], Q[e]); });
      result = orthonormal_by_products<T>(D, Q, A, n, p);
      if (result == nullptr) {
        const SharedMatrix<R> Y{D, n, p, p, 1};
        const Reflections<R> of = reflections_at(Q, p);  // 3 p numbers, which n p are: small.cuh has all with n < 6
        reflections<T>(Y, of);
        reflections_to_q<T>(Y, of);
        result = D;
      }
    }
    each<true>(true, !stored, [&](int e, R& w, R, R) { w = result[e] * scale; });
  }

  MK_DEVICE void store_momentum() const {
    each<true>(false, true, [](int, R, R, R) {});
  }
};

template <class R, class T, Pass pass>
__global__ void __launch_bounds__(block_threads, 1) matrices(Tables t, const Tile* tiles) {
  if (is_skipped(t)) return;
  MK_SHARED(R, shared);
  constexpr int teams = block_threads / T::size;
  const Tile tile = tiles[blockIdx.x];
  const Group& g = t.groups[tile.group];
  const Rules<R> rules(t, g);
  const Addressing& geometry = t.geometries[g.geometry];
  R* own = shared + T::number() * matrix_numbers(g.retraction, geometry.n, geometry.p);
  const StepSize<double> step_size = step_size_of<double>(t, g);
  double rate = 0, sum = 0;
  if (pass == Pass::step && g.partials) {
    const double total = total_of(t, g);
    rate = step_size(total);
    if (t.norms && threadIdx.x == 0 && tile.first == 0) t.norms[g.norm] = sqrt(total);
  }
  const int64_t rounds = (tile.count + teams - 1) / teams;
  for (int64_t round = 0; round < rounds; round++) {
    // All threads meet at the block's sum of a group that is alone; those without a matrix have nothing else to do.
    const int64_t i = round * teams + T::number(), position = tile.first + i;
    const bool mine = i < tile.count;
    const bool before = pass == Pass::step && g.partials != 0;
    Matrix<R, T> matrix(t, g, rules, mine ? position : tile.first, before, own);
    bool moves = mine && matrix.load();
    if (before) moves = mine && !t.left_out[g.state + position];
    const R square = moves ? matrix.project() : R(0);
    const double wide = moves ? matrix.wide(square) : 0;
    if (pass == Pass::measure) {
      if (T::rank() == 0) {
        sum += wide;
        if (mine) t.left_out[g.state + position] = !moves;
      }
      if (moves && rules.momentum.buffered) matrix.store_momentum();
    } else {
      double own_rate = rate;
      if (tile.alone) {
        const double total = Block::sum(T::rank() == 0 ? wide : 0);
        own_rate = step_size(total);
        if (t.norms && threadIdx.x == 0) t.norms[g.norm] = sqrt(total);
      } else if (!before) {
        own_rate = step_size(wide);
        if (t.norms && g.individual && mine && T::rank() == 0)
          t.norms[g.norm + position] = moves ? sqrt(wide) : double(__builtin_nan(""));
      }
      if (moves) matrix.step(own_rate, square);
    }
    if (mine && !moves && !before && T::rank() == 0) count_nonfinite(t, g, 1);
  }
  if (pass == Pass::measure) {
    sum = Block::sum(sum);
    if (threadIdx.x == 0) t.partials[tile.partial] = sum;
  }
}

}  // namespace cuda
}  // namespace mk
