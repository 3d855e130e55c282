// Small matrix products over the channels of a block of pixels: sum_k a(i, k) b[k, j], tile by tile in
// registers.
#pragma once

#include <cstdint>

#include "simd.h"

namespace visattn {

// A factor whose elements are broadcast: it may have any strides.
template <class T>
struct Broadcast {
  const T* p;
  int64_t stride_i, stride_k;
};

// One tile of R rows and V vectors from (i, j) on. f(i, j, sum, lanes) receives each vector of sums.
template <int R, int V, class A, class TA, class TB, class Lanes, class F>
VF_INLINE inline void gemm_tile(Broadcast<TA> a, const TB* b, int64_t ldb, int64_t depth, int64_t i,
                                int64_t j, Lanes lanes, const F& f) {
  Vec<A> sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = set1<A>(0);
  }
  const TA* pa = a.p + i * a.stride_i;
  const TB* pb = b + j;
  for (int64_t k = 0; k < depth; ++k, pa += a.stride_k, pb += ldb) {
    Vec<A> w[V];
    for (int v = 0; v < V; ++v) w[v] = load(pb + v * kLanes<A>, lanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const A factor = static_cast<A>(pa[r * a.stride_i]);  // a scalar: GCC broadcasts it from memory
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += factor * w[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) f(i + r, j + v * kLanes<A>, sum[r][v], lanes);
  }
}

// Calls f for the tiles of V vectors from column j on. Twelve sums in registers keep two multipliers busy.
template <int V, class A, class TA, class TB, class Lanes, class F>
VF_INLINE inline void gemm_columns(Broadcast<TA> a, const TB* b, int64_t ldb, int64_t depth, int64_t rows,
                                   int64_t j, Lanes lanes, const F& f) {
  int64_t i = 0;
  while (i < rows) {
    const int64_t left = rows - i;
    if (left >= 6 && left != 8) {
      gemm_tile<6, V, A>(a, b, ldb, depth, i, j, lanes, f), i += 6;
    } else if (left >= 4) {
      gemm_tile<4, V, A>(a, b, ldb, depth, i, j, lanes, f), i += 4;
    } else {
      gemm_tile<1, V, A>(a, b, ldb, depth, i, j, lanes, f), ++i;
    }
  }
}

// Calls f(i, j, sum_k a(i, k) b[k, j], lanes) for all i < rows and all vectors of j < cols, k ascending.
// `step` rows at a time pass over all columns, so that b is still in cache for the next row of tiles.
template <class A, class TA, class TB, class F>
VF_INLINE inline void gemm(Broadcast<TA> a, const TB* b, int64_t ldb, int64_t rows, int64_t cols,
                           int64_t depth, int64_t step, const F& f) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t i0 = 0; i0 < rows; i0 += step) {
    const int64_t count = rows - i0 < step ? rows - i0 : step;
    const Broadcast<TA> part{a.p + i0 * a.stride_i, a.stride_i, a.stride_k};
    const auto shifted = [&](int64_t i, int64_t j, Vec<A> v, auto lanes)
                             VF_INLINE { f(i0 + i, j, v, lanes); };
    int64_t j = 0;
    for (; j + 2 * L <= cols; j += 2 * L) gemm_columns<2, A>(part, b, ldb, depth, count, j, Full{}, shifted);
    for (; j + L <= cols; j += L) gemm_columns<1, A>(part, b, ldb, depth, count, j, Full{}, shifted);
    if (j < cols) {
      gemm_columns<1, A>(part, b, ldb, depth, count, j, Tail{static_cast<int>(cols - j)}, shifted);
    }
  }
}

}  // namespace visattn
