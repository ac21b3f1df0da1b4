// FG-SGD of oblique matrices whose rows lie one after the other: a register holds neighbouring columns, a lane each,
// and goes down the rows. The mathematics is that of vector_sphere.h; columns that need more than its closed forms are
// left to it.
#pragma once

#include "cpu/vector_sphere.h"

namespace mk {
namespace MK_ISA {
namespace {

// Sums over rows, a number a lane; quick as QuickSum is, or in double all along.
template <class R, bool quick>
class LaneSum {
  Pack<R> now{R(0)};
  Pack<double> low{0.0}, high{0.0};

 public:
  MK_FN void add(Pack<R> a, Pack<R> b) {
    if constexpr (quick) {
      now = fma(a, b, now);
    } else if constexpr (sizeof(R) == 8) {
      low = fma(a, b, low);
    } else {
      low = fma(lower(a), lower(b), low);
      high = fma(upper(a), upper(b), high);
    }
  }
  MK_FN void fold() {
    if constexpr (quick) {
      low = low + lower(now);
      high = high + upper(now);
      now = Pack<R>(R(0));
    }
  }
  MK_FN void store(double* lanes) const {
    low.store(lanes);
    if constexpr (sizeof(R) == 4) high.store(lanes + Pack<double>::lanes);
  }
};

template <class R>
class ColumnLanes {
  static constexpr int lanes = Pack<R>::lanes;
  const Job& job;
  R* const scratch;  // column_scratch numbers a row
  const int64_t n, weight_stride, grad_stride;

  template <class S>
  struct Block {
    VectorElements<R, R, S> elements;
    int64_t weight_stride, grad_stride;
  };

  // f(block): in place, or in copies padded with zeros, where there are fewer columns than lanes; `writes_weight` and
  // `writes_momentum` of them go back.
  template <class F>
  MK_FN void with_block(int64_t vector, int width, bool stored, bool writes_weight, bool writes_momentum,
                        const F& f) const {
    const Span span = span_of(job, vector);
    const Momentum<R> momentum = momentum_of<R>(job);
    with_storage<R>(job.storage, [&](auto s) {
      using S = decltype(s);
      S* const w = static_cast<S*>(job.weight) + span.weight;
      S* const m = job.momentum ? static_cast<S*>(job.momentum) + span.weight : nullptr;
      const S* const g = static_cast<const S*>(job.grad) + span.grad;
      if (width == lanes)
        return f(Block<S>{{w, m, g, momentum, momentum, job.storage, stored}, weight_stride, grad_stride});
      R *const some_w = scratch, *const some_m = scratch + n * lanes, *const some_g = scratch + 2 * n * lanes;
      pad(w, weight_stride, width, some_w);
      pad(g, grad_stride, width, some_g);
      if (m && (stored || !job.first_step)) pad(m, weight_stride, width, some_m);
      f(Block<R>{{some_w, some_m, some_g, momentum, momentum, job.storage, stored}, lanes, lanes});
      if (writes_weight) unpad(some_w, width, w);
      if (writes_momentum) unpad(some_m, width, m);
    });
  }
  template <class S>
  void pad(const S* from, int64_t stride, int width, R* to) const {
    for (int64_t r = 0; r < n; r++)
      for (int c = 0; c < lanes; c++) to[r * lanes + c] = c < width ? real(from[r * stride + c]) : R(0);
  }
  template <class S>
  void unpad(const R* from, int width, S* to) const {
    for (int64_t r = 0; r < n; r++)
      for (int c = 0; c < width; c++) put(to + r * weight_stride + c, from[r * lanes + c]);
  }

  template <bool quick, class S>
  bool measure_by(const Block<S>& block, int width, double scale, double least_tangent, VectorState* states) const {
    const auto from = block.elements;
    const int64_t down = block.weight_stride, grad_down = block.grad_stride;
    LaneSum<R, quick> qq, qm, dd;
    for (int64_t begin = 0; begin < n; begin += folding) {
      const int64_t end = begin + folding < n ? begin + folding : n;
      for (int64_t r = begin; r < end; r++) {
        const Pack<R> w = from.template weight<Pack<R>>(r * down);
        const Pack<R> d = from.template direction<Pack<R>>(r * down, r * grad_down).d;
        qq.add(w, w);
        qm.add(w, d);
        dd.add(d, d);
      }
      qq.fold();
      qm.fold();
      dd.fold();
    }
    double norm[lanes], inner[lanes], square[lanes], tangent[lanes];
    qq.store(norm);
    qm.store(inner);
    dd.store(square);
    const double unit = 1 / scale, most = fast_square();
    const auto in_range = [most](double x) { return x <= most && (!quick || in_float_range(x)); };
    bool fits = true;
    for (int c = 0; c < width; c++) fits &= in_range(norm[c]) && in_range(square[c]);
    for (int c = 0; c < lanes; c++) {  // all of them: in registers
      norm[c] *= unit * unit;
      inner[c] *= unit;
      tangent[c] = sphere::tangent_square(norm[c], inner[c], square[c]);
    }
    for (int c = 0; c < width; c++) fits &= tangent[c] >= square[c] * least_tangent;
    if (!fits) return false;
    for (int c = 0; c < width; c++) states[c] = {norm[c], inner[c], tangent[c], false, false};
    return true;
  }

  double fast_square() const {
    return job.storage == Storage::float16 ? double(largest_float16) * largest_float16 : double(Limits<R>::huge_square);
  }

 public:
  ColumnLanes(const Job& job, R* scratch)
      : job(job),
        scratch(scratch),
        n(job.geometry->n),
        weight_stride(job.geometry->weight_stride[job.geometry->batch_dims]),
        grad_stride(job.geometry->grad_stride[job.geometry->batch_dims]) {}

  static bool fits(const Job& job) {
    const Geometry& g = *job.geometry;
    const int column = g.batch_dims + 1;
    return job.manifold == ManifoldCode::oblique && g.row_dims == 1 && g.dims == column + 1 &&
           g.weight_stride[column] == 1 && g.grad_stride[column] == 1;
  }

  // Sums of columns `vector`, `vector` + 1, …; nothing is written but `states`. False where they are left to another.
  bool measure(int64_t vector, int width, double scale, VectorState* states) const {
    constexpr bool quick = sizeof(R) == 4;
    bool fits = false;
    with_block(vector, width, false, false, false, [&](const auto& block) {
      fits = (quick && measure_by<quick>(block, width, scale, 1.0 / 16, states)) ||
             measure_by<false>(block, width, scale, quick ? 1e-6 : 0.25, states);
    });
    return fits;
  }

  void store_momentum(int64_t vector, int width) const {
    if (!job.momentum) return;
    with_block(vector, width, false, false, true, [&](const auto& block) {
      const auto from = block.elements;
      const int64_t down = block.weight_stride, grad_down = block.grad_stride;
      for (int64_t r = 0; r < n; r++)
        from.to(from.m + r * down, from.buffer(r * down, from.template gradient<Pack<R>>(r * grad_down)));
    });
  }

  // As SphereVector::retract. False, with nothing written, where the columns are left to another.
  bool retract(int64_t vector, int width, double scale, double step, const VectorState* states, bool stored) const {
    const double v = -step / scale;
    double qq[lanes] = {}, qm[lanes] = {}, square[lanes] = {};
    bool fits = true;
    for (int c = 0; c < width; c++) {
      qq[c] = states[c].qq;
      qm[c] = states[c].qm;
      square[c] = states[c].square;
      fits &= !states[c].wide && v * v * square[c] <= double(Limits<R>::huge_square);
    }
    if (!fits) return false;
    sphere::Arc<double> arc[lanes];
    for (int c = 0; c < lanes; c++) arc[c] = sphere::projection(v);
    if (job.retraction == Retraction::exp)
      for (int c = 0; c < width; c++) arc[c] = sphere::exp(v, square[c]);
    R alpha[lanes], beta[lanes];
    for (int c = 0; c < lanes; c++) {
      const auto end = sphere::combination(arc[c], qq[c], qm[c], square[c]);
      alpha[c] = R(end.a);
      beta[c] = R(scale * end.b);
      fits &= !(abs(arc[c].b * qm[c]) > 0.5);
    }
    if (!fits) return false;
    const Pack<R> a = Pack<R>::load(alpha), b = Pack<R>::load(beta);
    const bool writes_momentum = job.momentum && !stored;
    with_block(vector, width, stored, true, writes_momentum, [&](const auto& block) {
      const auto from = block.elements;
      const int64_t down = block.weight_stride, grad_down = block.grad_stride;
      for (int64_t r = 0; r < n; r++) {
        const auto [d, buffer] = from.template direction<Pack<R>>(r * down, r * grad_down);
        const Pack<R> w = fma(from.template weight<Pack<R>>(r * down), a, d * b);
        if (writes_momentum) from.to(from.m + r * down, buffer);
        from.to(from.w + r * down, w);
      }
    });
    return true;
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
