// Branches that a module weighs against each other, row by row: sums of K rows, weighted sums, and their
// gradients. A row holds the pixels of a channel (nchw: one gate for the row) or the channels of a pixel
// (nhwc: one gate for each column).
#pragma once

#include <algorithm>
#include <cstdint>

#include "elementwise.h"
#include "matrix.h"
#include "simd.h"
#include "simd_lanes.h"
#include "wide_sums.h"

namespace visattn {

// Row r of each of K branches. The functions below first apply the activation kAct, kNone or kRelu, to the
// branches.
template <class T, int K>
struct Rows {
  T* p[K];
};

// One factor for a row, or one for each column in a padded buffer.
template <class A, bool kPerRow>
struct Factor {
  const A* p;
  Vec<A> row;
  VF_INLINE explicit Factor(const A* q) : p(q), row(set1<A>(kPerRow ? *q : A(0))) {}
  VF_INLINE Vec<A> at(int64_t c) const { return kPerRow ? row : load(p + c); }
};

// The sum of all elements of the rows.
template <class T, int kAct, int K>
VF_INLINE inline Acc<T> row_total(const Rows<const T, K>& x, int64_t cols) {
  using A = Acc<T>;
  Wide<A> total = {};
  for (int64_t c0 = 0; c0 < cols; c0 += kChunk * kLanes<A>) {
    const int64_t count = std::min(cols - c0, kChunk * kLanes<A>);
    Vec<A> part[K];
    for (int k = 0; k < K; ++k) part[k] = set1<A>(0);
    for_vectors<A>(count, [&](int64_t i, auto lanes) VF_INLINE {
      for (int k = 0; k < K; ++k) part[k] += activate<kAct>(load(x.p[k] + c0 + i, lanes));
    });
    for (int k = 0; k < K; ++k) total += widen<A>(part[k]);
  }
  return static_cast<Acc<T>>(sum_wide<A>(total));
}

// sum[c] += the rows' elements in column c.
template <class T, int kAct, int K>
VF_INLINE inline void add_rows(const Rows<const T, K>& x, int64_t cols, Acc<T>* sum) {
  for_vectors<Acc<T>>(cols, [&](int64_t c, auto lanes) VF_INLINE {
    Vec<Acc<T>> part = activate<kAct>(load(x.p[0] + c, lanes));
    for (int k = 1; k < K; ++k) part += activate<kAct>(load(x.p[k] + c, lanes));
    store(sum + c, load(sum + c) + part);
  });
}

// dot[k] = the sum of grad * row k.
template <class T, int kAct, int K>
VF_INLINE inline void row_dots(const T* grad, const Rows<const T, K>& x, int64_t cols, Acc<T> (&dot)[K]) {
  using A = Acc<T>;
  Wide<A> total[K] = {};
  for (int64_t c0 = 0; c0 < cols; c0 += kChunk * kLanes<A>) {
    const int64_t count = std::min(cols - c0, kChunk * kLanes<A>);
    Vec<A> part[K];
    for (int k = 0; k < K; ++k) part[k] = set1<A>(0);
    for_vectors<A>(count, [&](int64_t i, auto lanes) VF_INLINE {
      const Vec<A> g = load(grad + c0 + i, lanes);
      for (int k = 0; k < K; ++k) part[k] += g * activate<kAct>(load(x.p[k] + c0 + i, lanes));
    });
    for (int k = 0; k < K; ++k) total[k] += widen<A>(part[k]);
  }
  for (int k = 0; k < K; ++k) dot[k] = static_cast<A>(sum_wide<A>(total[k]));
}

// dot[k][c] += grad * row k, column by column.
template <class T, int kAct, int K>
VF_INLINE inline void add_dots(const T* grad, const Rows<const T, K>& x, int64_t cols,
                               const Rows<Acc<T>, K>& dot) {
  for_vectors<Acc<T>>(cols, [&](int64_t c, auto lanes) VF_INLINE {
    const Vec<Acc<T>> g = load(grad + c, lanes);
    for (int k = 0; k < K; ++k)
      store(dot.p[k] + c, load(dot.p[k] + c) + g * activate<kAct>(load(x.p[k] + c, lanes)));
  });
}

// y = sum_k gate_k * row k.
template <class T, int kAct, bool kPerRow, int K>
VF_INLINE inline void weigh_rows(const Rows<const T, K>& x, const Factor<Acc<T>, kPerRow> (&gate)[K], T* y,
                                 int64_t cols) {
  for_vectors<Acc<T>>(cols, [&](int64_t c, auto lanes) VF_INLINE {
    Vec<Acc<T>> v = gate[0].at(c) * activate<kAct>(load(x.p[0] + c, lanes));
    for (int k = 1; k < K; ++k) v += gate[k].at(c) * activate<kAct>(load(x.p[k] + c, lanes));
    store(y + c, v, lanes);
  });
}

// dx_k = (grad * gate_k + shift) * kAct'(row k).
template <class T, int kAct, bool kPerRow, int K>
VF_INLINE inline void weigh_rows_grad(const T* grad, const Rows<const T, K>& x,
                                      const Factor<Acc<T>, kPerRow> (&gate)[K],
                                      const Factor<Acc<T>, kPerRow>& shift, const Rows<T, K>& dx,
                                      int64_t cols) {
  for_vectors<Acc<T>>(cols, [&](int64_t c, auto lanes) VF_INLINE {
    const Vec<Acc<T>> g = load(grad + c, lanes);
    for (int k = 0; k < K; ++k) {
      const Vec<Acc<T>> d = g * gate[k].at(c) + shift.at(c);
      store(dx.p[k] + c, activate_grad<kAct>(d, load(x.p[k] + c, lanes)), lanes);
    }
  });
}

}  // namespace visattn
