// Sums of the elementwise product of two matrices: sum_c a b v[c] for each row, sum_r a b u[r] for each
// column.
#pragma once

#include <cstdint>

#include "matrix.h"
#include "parallel.h"
#include "simd.h"
#include "simd_lanes.h"
#include "wide_sums.h"

namespace visattn {

template <class T, bool kRow, bool kColumn, int R>
VF_INLINE inline void products_group(const Matrix<const T>& a, const Matrix<const T>& b, int64_t r0,
                                     const Acc<T>* u, const Acc<T>* v, Acc<T>* per_row, Acc<T>* per_column) {
  using A = Acc<T>;
  const T *pa[R], *pb[R];
  Vec<A> weight[R];
  Wide<A> total[R];
  for (int r = 0; r < R; ++r) {
    pa[r] = a.row(r0 + r);
    pb[r] = b.row(r0 + r);
    weight[r] = set1<A>(u ? u[r0 + r] : A(1));
    total[r] = Wide<A>{};
  }
  // A short row's last elements cost less one by one than as a vector that is filled and emptied.
  const int64_t cols = kColumn ? a.cols : a.cols - a.cols % kLanes<A>;
  for (int64_t c0 = 0; c0 < cols; c0 += kChunk * kLanes<A>) {
    const int64_t count = cols - c0 < kChunk * kLanes<A> ? cols - c0 : kChunk * kLanes<A>;
    Vec<A> part[R];
    for (int r = 0; r < R; ++r) part[r] = set1<A>(0);
    for_vectors<A>(count, [&](int64_t i, auto lanes) VF_INLINE {
      const int64_t c = c0 + i;
      Vec<A> across = set1<A>(0), w = set1<A>(1);
      if (kRow && v) w = load(v + c);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<A> product = load(pa[r] + c, lanes) * load(pb[r] + c, lanes);
        if constexpr (kRow && kColumn) part[r] += product * w;
        if constexpr (kRow && !kColumn) part[r] += product;
        if constexpr (kColumn && kRow) across += product * weight[r];
        if constexpr (kColumn && !kRow) across += product;
      }
      if constexpr (kColumn) store(per_column + c, load(per_column + c) + across);
    });
    for (int r = 0; r < R; ++r) total[r] += widen<A>(part[r]);
  }
  if constexpr (kRow) {
    for (int r = 0; r < R; ++r) {
      double sum = sum_wide<A>(total[r]);
      for (int64_t c = cols; c < a.cols; ++c) sum += static_cast<A>(pa[r][c]) * static_cast<A>(pb[r][c]);
      per_row[r0 + r] = static_cast<A>(sum);
    }
  }
}

// Both sums together take both weights (null for ones); one sum alone is unweighted. Overwrites per_column,
// which is padded.
template <class T, bool kRow, bool kColumn>
void products(Matrix<const T> a, Matrix<const T> b, const Acc<T>* u, const Acc<T>* v, Acc<T>* per_row,
              Acc<T>* per_column) {
  using A = Acc<T>;
  ColumnTotals<A> totals(kColumn ? a.rows : 0, a.cols);
  double* const total[] = {totals.of(0)};
  simd([=]() VF_INLINE {
    if constexpr (kColumn) {
      for (int64_t c = 0; c < a.cols; c += kLanes<A>) store(per_column + c, set1<A>(0));
    }
    A* const sums[] = {per_column};
    add_in_chunks(a.rows, a.cols, sums, total, [&](int64_t r, int64_t end) VF_INLINE {
      for (; r + 4 <= end; r += 4) products_group<T, kRow, kColumn, 4>(a, b, r, u, v, per_row, per_column);
      for (; r < end; ++r) products_group<T, kRow, kColumn, 1>(a, b, r, u, v, per_row, per_column);
    });
  });
}

}  // namespace visattn
