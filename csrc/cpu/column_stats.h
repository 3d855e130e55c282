// Reductions down the columns of a matrix: sum_r x[r, c] * scale[r] (scale may be null), and its maximum.
#pragma once

#include <cstdint>
#include <limits>

#include "matrix.h"
#include "simd.h"
#include "wide_sums.h"

namespace visattn {

template <class T, bool kMax, bool kScale, int R>
VF_INLINE inline void column_stats_group(const Matrix<const T>& x, int64_t r0, const Acc<T>* scale,
                                         Acc<T>* sum, Acc<T>* max, Index<Acc<T>>* at) {
  using A = Acc<T>;
  const T* row[R];
  Vec<A> w[R];
  IVec<A> here[R];
  for (int r = 0; r < R; ++r) {
    row[r] = x.row(r0 + r);
    w[r] = set1<A>(kScale ? scale[r0 + r] : A(1));
    here[r] = set1_index<A>(r0 + r);
  }
  for_vectors<A>(x.cols, [&](int64_t c, auto lanes) VF_INLINE {
    Vec<A> part = set1<A>(0), top;
    IVec<A> where;
    if constexpr (kMax) top = load(max + c), where = load_index<A>(at + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec<A> v = load(row[r] + c, lanes);
      if constexpr (kScale) v = v * w[r];
      part += v;
      if constexpr (kMax) {
        keep_max<A>(v, here[r], top, where);
      }
    }
    store(sum + c, load(sum + c) + part);
    if constexpr (kMax) store(max + c, top), store_index<A>(at + c, where);
  });
}

// Overwrites sum, max and at, which are whole vectors long (Buffer pads them).
template <class T, bool kMax, bool kScale>
void column_stats(Matrix<const T> x, const Acc<T>* scale, Acc<T>* sum, Acc<T>* max = nullptr,
                  Index<Acc<T>>* at = nullptr) {
  using A = Acc<T>;
  ColumnTotals<A> totals(x.rows, x.cols);
  double* const total[] = {totals.of(0)};
  simd([=]() VF_INLINE {
    for (int64_t c = 0; c < x.cols; c += kLanes<A>) {
      store(sum + c, set1<A>(0));
      if constexpr (kMax) {
        store(max + c, set1<A>(-std::numeric_limits<A>::infinity()));
        store_index<A>(at + c, IVec<A>{});
      }
    }
    A* const sums[] = {sum};
    add_in_chunks(x.rows, x.cols, sums, total, [&](int64_t r, int64_t end) VF_INLINE {
      for (; r + 8 <= end; r += 8) column_stats_group<T, kMax, kScale, 8>(x, r, scale, sum, max, at);
      for (; r < end; ++r) column_stats_group<T, kMax, kScale, 1>(x, r, scale, sum, max, at);
    });
    if constexpr (kMax) {
      for (int64_t c = 0; c < x.cols; ++c) {
        if (sum[c] == sum[c]) continue;
        for (int64_t r = 0; r < x.rows; ++r) {
          const A v = static_cast<A>(x.row(r)[c]) * (kScale ? scale[r] : A(1));
          if (v != v) {
            max[c] = v, at[c] = static_cast<Index<A>>(r);
            break;
          }
        }
      }
    }
  });
}

}  // namespace visattn
