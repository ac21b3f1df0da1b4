// QR and polar decompositions of batches, lanes = matrices.
#include "cpu/decompose.h"

#include "cpu/columns.h"
#include "linalg/polar_of_any.h"

namespace mk {
namespace MK_ISA {

template <class R>
MK_FN Pack<R> without_mantissa(Pack<R> x) {
  using Bits = typename Vectors<R>::mask;
  return Pack<R>((typename Pack<R>::Numbers)((Bits)x.v & (Bits)Pack<R>(R(__builtin_inf())).v));
}

namespace {

template <int N, int P>
MK_FN constexpr Fixed<P, P> square_of(Fixed<N, P>) {
  return {};
}
MK_FN RunTimeSize square_of(RunTimeSize size) { return {size.p, size.p}; }

constexpr int min_of(int a, int b) { return a < b ? a : b; }

struct Qr {
  static constexpr int room(int n, int p) { return n * p + reflections_numbers(min_of(n, p), p); }

  template <class R, class Size>
  MK_FN static void run(const R* x, R* q, R* r, Size size, Pack<R>* room) {
    const int n = size.n, p = size.p, k = min_of(n, p);
    Pack<R>* A = room;
    const Reflections<Pack<R>> of = reflections_at(A + n * p, k);
    read_matrices(x, n, p, [&](int i, int j, Pack<R> one) { A[j * n + i] = one; });
    householder(A, of, size);
    if (r) write_matrices(r, k, p, [&](int i, int j) { return element_of_r(A, of, n, i, j); });
    reflections_to_q(A, of, size);
    write_matrices(q, n, k, [&](int i, int j) { return A[j * n + i]; });
  }
};

struct Polar {
  static constexpr int room(int n, int p) { return 2 * n * p + polar_work_numbers(p); }

  template <class R, class Size>
  MK_FN static void run(const R* x, R* q, R*, Size size, Pack<R>* room) {
    const int n = size.n, p = size.p;
    Pack<R>*A = room, *Z = A + n * p;
    read_matrices(x, n, p, [&](int i, int j, Pack<R> one) { A[j * n + i] = one; });
    polar_of_any(A, Z, polar_work_at(Z + n * p, p), size, square_of(size));
    write_matrices(q, n, p, [&](int i, int j) { return Z[j * n + i]; });
  }
};

// One register full of matrices; sizes known to the compiler stay in registers.
template <class Which, class R, int N, int P>
MK_FN void block(const R* x, R* q, R* r, Fixed<N, P> size, Pack<R>*) {
  Pack<R> room[Which::room(N, P)];
  Which::run(x, q, r, size, room);
}
template <class Which, class R>
MK_FN void block(const R* x, R* q, R* r, RunTimeSize size, Pack<R>* room) {
  Which::run(x, q, r, size, room);
}

template <class R>
MK_FN void copy(const R* from, R* to, int count) {
  for (int e = 0; e < count; e++) to[e] = from[e];
}

template <class Which, class R, class Size>
void blocks(const Batch& batch, int64_t begin, int64_t end, Size size, void* scratch) {
  constexpr int lanes = Pack<R>::lanes;
  const int n = size.n, p = size.p, k = min_of(n, p);
  Pack<R>* room = static_cast<Pack<R>*>(scratch);
  // The last block may have fewer matrices than lanes, which are copied to where there is room for all.
  R* spare = reinterpret_cast<R*>(room + Which::room(n, p));
  R *spare_q = spare + lanes * n * p, *spare_r = spare_q + lanes * n * k;
  for (int64_t b = begin; b < end; b += lanes) {
    const int count = int(end - b);
    const R* x = static_cast<const R*>(batch.x) + b * n * p;
    R *q = static_cast<R*>(batch.q) + b * n * k, *q_here = q;
    R *r = batch.r ? static_cast<R*>(batch.r) + b * k * p : nullptr, *r_here = r;
    if (count < lanes) {
      copy(x, spare, count * n * p);
      for (int e = count * n * p; e < lanes * n * p; e++) spare[e] = R(0);
      x = spare;
      q_here = spare_q;
      r_here = r ? spare_r : nullptr;
    }
    block<Which>(x, q_here, r_here, size, room);
    if (count < lanes) {
      copy(spare_q, q, count * n * k);
      if (r) copy(spare_r, r, count * k * p);
    }
  }
}

// The sizes with bodies of their own.
#if defined(__x86_64__) && !defined(__AVX2__)
#define MK_DECOMPOSED_SIZES(X)
#else
#define MK_DECOMPOSED_SIZES(X) X(2, 2) X(3, 3) X(4, 4)
#endif

template <class Which, class R>
void any_blocks(const Batch& batch, int64_t begin, int64_t end, void* scratch) {
  const int n = int(batch.n), p = int(batch.p);
#define MK_RUN(N, P) \
  if (n == N && p == P) return blocks<Which, R>(batch, begin, end, Fixed<N, P>{}, scratch);
  MK_DECOMPOSED_SIZES(MK_RUN)
#undef MK_RUN
  blocks<Which, R>(batch, begin, end, RunTimeSize{n, p}, scratch);
}

template <class Which>
void run(const Batch& batch, int64_t begin, int64_t end, void* scratch) {
  batch.is_double ? any_blocks<Which, double>(batch, begin, end, scratch)
                  : any_blocks<Which, float>(batch, begin, end, scratch);
}

int64_t scratch_bytes(const Batch& batch) {
  const int n = int(batch.n), p = int(batch.p);
  const int64_t room = n < p ? Qr::room(n, p) : Polar::room(n, p);
  return register_bytes * (room + 3 * n * p);
}

}  // namespace
}  // namespace MK_ISA

#define MK_TABLE_NAME(isa) decompositions_##isa
#define MK_TABLE(isa) MK_TABLE_NAME(isa)
const Decompositions MK_TABLE(MK_ISA) = {MK_ISA::run<MK_ISA::Qr>, MK_ISA::run<MK_ISA::Polar>, MK_ISA::scratch_bytes};

}  // namespace mk
