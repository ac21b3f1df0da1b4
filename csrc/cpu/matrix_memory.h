// Components of any size between memory, with any strides and storage type, and padded rows of the arithmetic type.
#pragma once

#include "cpu/products.h"
#include "cpu/rows.h"

namespace mk {
namespace MK_ISA {
namespace {

// Where the elements of a component lie from its first one: row[i] + column[j].
struct Places {
  const int64_t *row, *column;
  bool rows_dense, columns_dense;  // neighbours in a row (column) are neighbours in memory
  int64_t column_stride;           // 0 where there is no single one

  // Writes n + p offsets to `table`.
  Places(const Geometry& g, const int64_t* stride, int64_t* table) : row(table), column(table + g.n) {
    fill(g, stride, g.batch_dims, g.batch_dims + g.row_dims, table);
    fill(g, stride, g.batch_dims + g.row_dims, g.dims, table + g.n);
    rows_dense = dense(column, g.p);
    columns_dense = dense(row, g.n);
    column_stride = g.dims - g.batch_dims - g.row_dims == 1 ? stride[g.dims - 1] : 0;
  }

 private:
  static void fill(const Geometry& g, const int64_t* stride, int from, int to, int64_t* table) {
    // One dimension after the other, from the innermost: what is there is repeated along the next.
    int64_t done = 1;
    table[0] = 0;
    for (int d = to - 1; d >= from; d--) {
      for (int64_t i = done; i < done * g.size[d]; i++) table[i] = table[i - done] + stride[d];
      done *= g.size[d];
    }
  }
  static bool dense(const int64_t* offset, int64_t count) {
    for (int64_t i = 0; i < count; i++)
      if (offset[i] != i) return false;
    return true;
  }
};

// Copies rows [from, end) of a component with p columns from (Write: to) memory to (from) rows that are `stride`
// numbers apart; `from` is a multiple of `padding`.
template <class R, bool Write>
__attribute__((noinline)) void copy_matrix(Storage storage, void* base, int64_t start, const Places& places, int from,
                                           int end, int p, R* rows, int64_t stride) {
  constexpr int lanes = Pack<R>::lanes;
  with_storage<R>(storage, [&](auto s) {
    using S = decltype(s);
    S* memory = static_cast<S*>(base) + start;
    const auto element = [&](int i, int j) {
      S* there = memory + places.row[i] + places.column[j];
      if constexpr (Write) put(there, rows[i * stride + j]);
      if constexpr (!Write) rows[i * stride + j] = real(*there);
    };
    if (places.rows_dense) {
      for (int i = from; i < end; i++) {
        S* there = memory + places.row[i];
        R* here = rows + i * stride;
        sweep<R>(p, [&](int64_t j, auto tag) {
          if constexpr (Write) put(there + j, at<decltype(tag)>(here + j));
          if constexpr (!Write) to(here + j, get_as<decltype(tag)>(there + j));
        });
      }
      return;
    }
    int done = from;  // rows that whole blocks have covered, in the columns of whole registers
    const int whole = p / lanes * lanes;
    if constexpr (std::is_same<S, R>::value) {
      if (places.columns_dense && places.column_stride != 0) {
        for (; done + padding <= end; done += padding) {
          for (int j = 0; j < whole; j += lanes) {
            Pack<R> x[padding];
            R *there = memory + done + places.column[j], *here = rows + done * stride + j;
            if constexpr (Write) {
              for (int e = 0; e < padding; e++) x[e] = Pack<R>::load(here + e * stride);
              to_columns(x, there, places.column_stride);
            } else {
              columns_of(there, places.column_stride, x);
              for (int e = 0; e < padding; e++) x[e].store(here + e * stride);
            }
          }
        }
      }
    }
    for (int i = from; i < end; i++)
      for (int j = i < done ? whole : 0; j < p; j++) element(i, j);
  });
}

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
