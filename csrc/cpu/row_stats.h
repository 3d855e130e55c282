// Reductions along the rows of a matrix: sum_c x[r, c] * scale[c] (scale may be null), and its maximum.
#pragma once

#include <cstdint>
#include <limits>

#include "matrix.h"
#include "simd.h"
#include "simd_lanes.h"
#include "wide_sums.h"

namespace visattn {

constexpr int kBlock = 4;  // vectors of a row between two updates of its maximum

// The index of the first element that equals `max` in the kBlock vectors from column c on.
template <class T, bool kScale>
VF_INLINE inline int64_t find_in_block(const T* row, const Acc<T>* scale, int64_t c, Acc<T> max) {
  using A = Acc<T>;
  IVec<A> first = set1_index<A>(std::numeric_limits<int32_t>::max());
  for (int i = kBlock - 1; i >= 0; --i) {
    const int64_t at = c + i * kLanes<A>;
    Vec<A> v = load(row + at);
    if constexpr (kScale) v = v * load(scale + at);
    first = v == set1<A>(max) ? iota<A>() + set1_index<A>(at) : first;
  }
  return reduce_lanes(first, [](IVec<A> a, IVec<A> b) VF_INLINE { return a < b ? a : b; });
}

// Sums a row's columns from `begin` on, and updates the maximum and its index, ignoring NaN.
template <class T, bool kScale>
VF_INLINE inline void finish_row(const T* row, const Acc<T>* scale, int64_t begin, int64_t cols, double* sum,
                                 Acc<T>* max, int64_t* index) {
  for (int64_t c = begin; c < cols; ++c) {
    const Acc<T> v = static_cast<Acc<T>>(row[c]) * (kScale ? scale[c] : Acc<T>(1));
    *sum += v;
    if (v > *max) *max = v, *index = c;
  }
}

// Makes the first NaN of a row, if any, its maximum.
template <class T, bool kScale>
void find_nan(const T* row, const Acc<T>* scale, int64_t cols, Acc<T>* max, int64_t* index) {
  for (int64_t c = 0; c < cols; ++c) {
    const Acc<T> v = static_cast<Acc<T>>(row[c]) * (kScale ? scale[c] : Acc<T>(1));
    if (v != v) {
      *max = v, *index = c;
      return;
    }
  }
}

template <class T, bool kMax, bool kScale, int R>
VF_INLINE inline void row_stats_group(const Matrix<const T>& x, int64_t r0, const Acc<T>* scale, Acc<T>* sum,
                                      Acc<T>* max, Index<Acc<T>>* at) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const A lowest = -std::numeric_limits<A>::infinity();
  const T* row[R];
  Wide<A> total[R];
  Vec<A> top[R];
  IVec<A> where[R];
  for (int r = 0; r < R; ++r) {
    row[r] = x.row(r0 + r);
    total[r] = Wide<A>{};
    top[r] = set1<A>(lowest);
    where[r] = IVec<A>{};
  }
  const int64_t whole = x.cols - x.cols % (kBlock * L);
  for (int64_t c0 = 0; c0 < whole; c0 += kChunk * L) {
    const int64_t end = c0 + kChunk * L < whole ? c0 + kChunk * L : whole;
    Vec<A> part[R];
    for (int r = 0; r < R; ++r) part[r] = set1<A>(0);
    for (int64_t c = c0; c < end; c += kBlock * L) {
      Vec<A> w[kBlock];
      if constexpr (kScale) {
        for (int i = 0; i < kBlock; ++i) w[i] = load(scale + c + i * L);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Vec<A> v[kBlock];
#pragma GCC unroll 4
        for (int i = 0; i < kBlock; ++i) {
          v[i] = load(row[r] + c + i * L);
          if constexpr (kScale) v[i] = v[i] * w[i];
        }
        part[r] += (v[0] + v[1]) + (v[2] + v[3]);
        if constexpr (kMax) {
          keep_max<A>(greater(greater(v[0], v[1]), greater(v[2], v[3])), set1_index<A>(c), top[r], where[r]);
        }
      }
    }
    for (int r = 0; r < R; ++r) total[r] += widen<A>(part[r]);
  }
  int64_t done = whole;
  if constexpr (!kMax) {
    for (; done + L <= x.cols; done += L) {
      for (int r = 0; r < R; ++r) {
        Vec<A> v = load(row[r] + done);
        if constexpr (kScale) v = v * load(scale + done);
        total[r] += widen<A>(v);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    double total_of_row = sum_wide<A>(total[r]);
    A m = lowest;
    int64_t index = 0;
    if (kMax && whole) {
      max_lanes<A>(top[r], where[r], &m, &index);
      index = find_in_block<T, kScale>(row[r], scale, index, m);
    }
    finish_row<T, kScale>(row[r], scale, done, x.cols, &total_of_row, &m, &index);
    const A s = static_cast<A>(total_of_row);
    sum[r0 + r] = s;
    if constexpr (kMax) {
      if (s != s)
        find_nan<T, kScale>(row[r], scale, x.cols, &m, &index);  // NaN in the row, or both infinities
      max[r0 + r] = m, at[r0 + r] = static_cast<Index<A>>(index);
    }
  }
}

// As many short rows as a vector has lanes: their lanes are transposed and reduced for all rows at once.
template <class T, bool kScale>
VF_INLINE inline void short_row_stats(const Matrix<const T>& x, int64_t r0, const Acc<T>* scale, Acc<T>* sum,
                                      Acc<T>* max, Index<Acc<T>>* at) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t whole = x.cols - x.cols % L;
  Vec<A> total[L], top[L];
  IVec<A> where[L];
  for (int r = 0; r < L; r += 2) {
    const T *a = x.row(r0 + r), *b = x.row(r0 + r + 1);
    Vec<A> sum_a = set1<A>(0), sum_b = sum_a, top_a = set1<A>(-std::numeric_limits<A>::infinity()),
           top_b = top_a;
    IVec<A> here = iota<A>(), at_a = here, at_b = here;
    for (int64_t c = 0; c < whole; c += L) {
      Vec<A> va = load(a + c), vb = load(b + c);
      if constexpr (kScale) {
        const Vec<A> w = load(scale + c);
        va = va * w, vb = vb * w;
      }
      sum_a += va, sum_b += vb;
      keep_max<A>(va, here, top_a, at_a);
      keep_max<A>(vb, here, top_b, at_b);
      here += L;
    }
    total[r] = sum_a, top[r] = top_a, where[r] = at_a;
    total[r + 1] = sum_b, top[r + 1] = top_b, where[r + 1] = at_b;
  }
  transpose(total), transpose(top), transpose(where);
  for (int half = L / 2; half > 2; half /= 2) {
    for (int j = 0; j < half; ++j) total[j] += total[j + half];
  }
  // The largest terms last, in double: far from zero their rounding would exceed the mean's own.
  Wide<A> sums = widen<A>(total[0]) + widen<A>(total[1]);
  if constexpr (L > 2) sums += widen<A>(total[2]) + widen<A>(total[3]);
  total[0] = __builtin_convertvector(sums, Vec<A>);
  for (int j = 1; j < L; ++j) {
    const auto other_wins = (top[j] > top[0]) | ((top[j] == top[0]) & (where[j] < where[0]));
    where[0] = other_wins ? where[j] : where[0];
    top[0] = greater(top[j], top[0]);
  }
  store(sum + r0, total[0]), store(max + r0, top[0]), store_index<A>(at + r0, where[0]);
  const bool nan = reduce_lanes(total[0] != total[0], [](IVec<A> a, IVec<A> b) VF_INLINE { return a | b; });
  if (!nan && whole == x.cols) return;
  for (int64_t r = r0; r < r0 + L; ++r) {
    int64_t index = at[r];
    double total_of_row = sum[r];
    finish_row<T, kScale>(x.row(r), scale, whole, x.cols, &total_of_row, max + r, &index);
    sum[r] = static_cast<A>(total_of_row);
    if (sum[r] != sum[r]) find_nan<T, kScale>(x.row(r), scale, x.cols, max + r, &index);
    at[r] = static_cast<Index<A>>(index);
  }
}

template <class T, bool kMax, bool kScale>
void row_stats(Matrix<const T> x, const Acc<T>* scale, Acc<T>* sum, Acc<T>* max = nullptr,
               Index<Acc<T>>* at = nullptr) {
  constexpr int64_t kShort = 512;
  simd([=]() VF_INLINE {
    int64_t r = 0;
    if constexpr (kMax) {
      constexpr int L = kLanes<Acc<T>>;
      for (; x.cols <= kShort && r + L <= x.rows; r += L)
        short_row_stats<T, kScale>(x, r, scale, sum, max, at);
    }
    for (; r + 4 <= x.rows; r += 4) row_stats_group<T, kMax, kScale, 4>(x, r, scale, sum, max, at);
    for (; r < x.rows; ++r) row_stats_group<T, kMax, kScale, 1>(x, r, scale, sum, max, at);
  });
}

}  // namespace visattn
