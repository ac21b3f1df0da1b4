// The thin QR decomposition of any matrix by Householder reflections: no pivoting, no branch on data, every lane in
// step. Matrices are column-major here: element (i, j) of an n x p one stands at j n + i.
#pragma once

#include "lane.h"
#include "linalg/power_of_two.h"
#include "linalg/small_matrix.h"

namespace mk {

// A size known at run time only: its code is compiled once for a lane type, and not into every caller.
struct RunTimeSize {
  int n, p;
  static constexpr int square_capacity = 64;  // what a row is kept in: p <= 64 where n >= p
};

// What the decomposition of A (n x p) leaves beside it, k = min(n, p). A itself holds R above the diagonal and, from
// the diagonal down, the vectors v_j of the reflections H_j = I - weight_j v_j v_j^T.
template <class T>
struct Reflections {
  T* weight;     // k numbers; 0 where H_j = I
  T* diagonal;   // k: of R, >= 0
  T* sign;       // k: column j of Q is sign_j H_0 ... H_j e_j
  T* magnitude;  // p powers of two that the columns of A were divided by; those of R are still to be multiplied by them
};

// As they lie in so many numbers of memory.
constexpr int reflections_numbers(int k, int p) { return 3 * k + p; }
template <class T>
MK_FN Reflections<T> reflections_at(T* memory, int k) {
  return {memory, memory + k, memory + 2 * k, memory + 3 * k};
}

// C neighbouring columns from row `from` down: A <- (I - weight v v^T) A. Several columns at a time, since the sum of
// one is a chain of multiply-adds that each wait for the last.
template <int C, class T>
MK_FN void reflect(const T* v, T weight, T* columns, int n, int from) {
  T sum[C];
  MK_UNROLL
  for (int c = 0; c < C; c++) sum[c] = T(0);
  MK_UNROLL
  for (int i = from; i < n; i++) {
    MK_UNROLL
    for (int c = 0; c < C; c++) sum[c] = fma(v[i], columns[c * n + i], sum[c]);
  }
  MK_UNROLL
  for (int c = 0; c < C; c++) sum[c] = -(sum[c] * weight);
  MK_UNROLL
  for (int i = from; i < n; i++) {
    const T one = v[i];  // read once: what is stored might be v, for all that a compiler knows
    MK_UNROLL
    for (int c = 0; c < C; c++) columns[c * n + i] = fma(one, sum[c], columns[c * n + i]);
  }
}

// Two reflections at a time, which halves the reading and writing of A: with u one row below v and cross = <u, v>,
// first that of v, then that of u, or the other way round.
template <bool v_first, int C, class T>
MK_FN void reflect_twice(const T* v, T weight_v, const T* u, T weight_u, T cross, T* columns, int n, int from) {
  T along_v[C], along_u[C];
  MK_UNROLL
  for (int c = 0; c < C; c++) {
    along_v[c] = v[from] * columns[c * n + from];
    along_u[c] = T(0);
  }
  MK_UNROLL
  for (int i = from + 1; i < n; i++) {
    MK_UNROLL
    for (int c = 0; c < C; c++) {
      along_v[c] = fma(v[i], columns[c * n + i], along_v[c]);
      along_u[c] = fma(u[i], columns[c * n + i], along_u[c]);
    }
  }
  MK_UNROLL
  for (int c = 0; c < C; c++) {
    if (v_first) along_v[c] = -(along_v[c] * weight_v);
    along_u[c] = -((v_first ? fma(cross, along_v[c], along_u[c]) : along_u[c]) * weight_u);
    if (!v_first) along_v[c] = -(fma(cross, along_u[c], along_v[c]) * weight_v);
    columns[c * n + from] = fma(v[from], along_v[c], columns[c * n + from]);
  }
  MK_UNROLL
  for (int i = from + 1; i < n; i++) {
    const T v_i = v[i], u_i = u[i];
    MK_UNROLL
    for (int c = 0; c < C; c++) columns[c * n + i] = fma(u_i, along_u[c], fma(v_i, along_v[c], columns[c * n + i]));
  }
}

// The columns [begin, end) of A by H_j.
template <class T>
MK_FN void reflect_columns(T* A, Reflections<T> of, int n, int j, int begin, int end) {
  const T *v = A + j * n, weight = of.weight[j];
  int c = begin;
  MK_UNROLL
  for (; c + 4 <= end; c += 4) reflect<4>(v, weight, A + c * n, n, j);
  MK_UNROLL
  for (; c + 2 <= end; c += 2) reflect<2>(v, weight, A + c * n, n, j);
  MK_UNROLL
  for (; c < end; c++) reflect<1>(v, weight, A + c * n, n, j);
}

// The columns [j + 2, end) of A by H_j and H_{j+1}.
template <bool j_first, class T>
MK_FN void reflect_columns_twice(T* A, Reflections<T> of, int n, int j, int end) {
  const T *v = A + j * n, *u = v + n, weight_v = of.weight[j], weight_u = of.weight[j + 1];
  const T cross = inner(v + j + 1, u + j + 1, n - j - 1, 1);
  int c = j + 2;
  MK_UNROLL
  for (; c + 4 <= end; c += 4) reflect_twice<j_first, 4>(v, weight_v, u, weight_u, cross, A + c * n, n, j);
  MK_UNROLL
  for (; c + 2 <= end; c += 2) reflect_twice<j_first, 2>(v, weight_v, u, weight_u, cross, A + c * n, n, j);
  MK_UNROLL
  for (; c < end; c++) reflect_twice<j_first, 1>(v, weight_v, u, weight_u, cross, A + c * n, n, j);
}

// H_j and H_{j+1} are a pair where they meet enough columns before `end` to be worth their cross product.
MK_FN bool worth_a_pair(int j, int end, int n) { return j + 2 < n && j + 6 <= end; }
// On the way from the first of k to the last.
MK_FN bool begins_a_pair(int j, int k, int p, int n) { return j % 2 == 0 && j + 1 < k && worth_a_pair(j, p, n); }

// Divides every column by a power of two, so that no square leaves the range: the columns of R have the same factors
// and Q has none. A matrix with NaN or Inf becomes NaN altogether.
template <class T, class Size>
MK_FN void balance(T* A, Reflections<T> of, Size size) {
  const int n = size.n, p = size.p;
  T poison = T(0);
  MK_UNROLL
  for (int j = 0; j < p; j++) {
    T largest = T(0), sick = T(0);
    MK_UNROLL
    for (int i = 0; i < n; i++) {
      largest = max(largest, abs(A[j * n + i]));
      sick = fma(A[j * n + i], T(0), sick);
    }
    of.magnitude[j] = magnitude(largest);
    poison = poison + sick;
  }
  MK_UNROLL
  for (int j = 0; j < p; j++) {
    const T inverse = T(1) / of.magnitude[j];
    MK_UNROLL
    for (int i = 0; i < n; i++) A[j * n + i] = fma(A[j * n + i], inverse, poison);
  }
}

// The reflection that turns a vector, `alpha` its first number and `square` its squared length, into a multiple of e_0.
template <class T>
struct Reflection {
  T first;     // of the vector v of H = I - weight v v^T; its other numbers are those of the vector that is turned
  T weight;    // 0 where H = I
  T diagonal;  // the length, what R gets
  T sign;      // of H e_0 in Q
  MK_FN Reflection(T alpha, T square) {
    const auto below = alpha < T(0), zero = square < T(Limits<Real<T>>::tiny_square);
    const T length = sqrt(select(zero, T(1), square));
    const T longer = length + abs(alpha);
    // H x = -sign(alpha) |x| e_0, the sign that cancels nothing.
    first = select(below, -longer, longer);
    weight = select(zero, T(0), T(1) / (length * longer));
    sign = select(below, T(1), T(-1)) * select(zero, T(-1), T(1));
    diagonal = select(zero, abs(alpha), length);
  }
  // Of a single number: nothing to reflect; NaN is to reach the sign.
  MK_FN explicit Reflection(T alpha)
      : first(alpha), weight(T(0)), diagonal(abs(alpha)), sign(fma(alpha, T(0), select(alpha < T(0), T(-1), T(1)))) {}
};

// H_j from column j, which H_0 ... H_{j-1} have been applied to.
template <class T>
MK_FN void make_reflection(T* A, Reflections<T> of, int n, int j) {
  T* v = A + j * n;
  const Reflection<T> h = j == n - 1 ? Reflection<T>(v[j]) : Reflection<T>(v[j], inner(v + j, v + j, n - j, 1));
  v[j] = h.first;
  of.weight[j] = h.weight;
  of.sign[j] = h.sign;
  of.diagonal[j] = h.diagonal;
}

// Row j of R has got its values; the columns [j + 1, end) take the sign that makes its diagonal >= 0.
template <class T>
MK_FN void turn_row(T* A, Reflections<T> of, int n, int j, int end) {
  MK_UNROLL
  for (int c = j + 1; c < end; c++) A[c * n + j] = A[c * n + j] * of.sign[j];
}

// A = Q R with diag(R) >= 0 for any A: where the rest of a column is zero, H_j = I, so that Q is orthonormal always.
template <class T, class Size>
MK_FN void householder(T* A, Reflections<T> of, Size size) {
  const int n = size.n, p = size.p, k = n < p ? n : p;
  balance(A, of, size);
  MK_UNROLL
  for (int j = 0; j < k; j++) {
    if (j > 0 && begins_a_pair(j - 1, k, p, n)) continue;
    make_reflection(A, of, n, j);
    if (begins_a_pair(j, k, p, n)) {
      reflect_columns(A, of, n, j, j + 1, j + 2);
      make_reflection(A, of, n, j + 1);
      reflect_columns_twice<true>(A, of, n, j, p);
      turn_row(A, of, n, j, p);
      turn_row(A, of, n, j + 1, p);
    } else {
      reflect_columns(A, of, n, j, j + 1, p);
      turn_row(A, of, n, j, p);
    }
  }
}

template <class T>
MK_RARE void householder(T* A, Reflections<T> of, RunTimeSize size) {
  householder<T, RunTimeSize>(A, of, size);
}

// Column j, which holds the vector of H_j, becomes sign_j H_j e_j.
template <class T>
MK_FN void reflected_unit(T* A, Reflections<T> of, int n, int j) {
  T* v = A + j * n;
  const T factor = -(of.weight[j] * v[j] * of.sign[j]);
  v[j] = fma(factor, v[j], of.sign[j]);
  MK_UNROLL
  for (int i = j + 1; i < n; i++) v[i] = v[i] * factor;
}

// The first k columns of A, which hold the reflections, become Q (n x k): from the last to the first, H_j is applied to
// the columns behind j, which are zero up to row j.
template <class T, class Size>
MK_FN void reflections_to_q(T* A, Reflections<T> of, Size size) {
  const int n = size.n, k = n < size.p ? n : size.p;
  // The last j for which worth_a_pair(j - 1, k, n): it and every second one before it goes with the next.
  const int last = n - 2 < k - 5 ? n - 2 : k - 5;
  MK_UNROLL
  for (int j = k - 1; j >= 0; j--) {
    if (j < last && (last - j) % 2 == 1) continue;
    MK_UNROLL
    for (int c = j + 1; c < k; c++) A[c * n + j] = T(0);
    if (j > 0 && j <= last) {
      MK_UNROLL
      for (int c = j; c < k; c++) A[c * n + j - 1] = T(0);
      reflect_columns_twice<false>(A, of, n, j - 1, k);
      reflected_unit(A, of, n, j);
      reflect_columns(A, of, n, j - 1, j, j + 1);
      reflected_unit(A, of, n, j - 1);
    } else {
      reflect_columns(A, of, n, j, j + 1, k);
      reflected_unit(A, of, n, j);
    }
  }
}

template <class T>
MK_RARE void reflections_to_q(T* A, Reflections<T> of, RunTimeSize size) {
  reflections_to_q<T, RunTimeSize>(A, of, size);
}

// Element (i, j) of R.
template <class T>
MK_FN T element_of_r(const T* A, Reflections<T> of, int n, int i, int j) {
  if (i > j) return T(0);
  return (i == j ? of.diagonal[j] : A[j * n + i]) * of.magnitude[j];
}

}  // namespace mk
