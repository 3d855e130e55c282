// Reductions and maps over row-major matrices. A feature map is such a matrix in either layout (rows are
// channels or pixels), so these few functions are all the loops over big tensors that there are.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace visattn {

template <class T>
struct Matrix {
  T* p;
  int64_t ld, rows, cols;
  VF_INLINE T* row(int64_t r) const { return p + r * ld; }
};

// Keeps the greater of two maxima and its index, lane by lane, the first of equals, NaN aside. The second
// comparison is against the new maximum, so that the first can become a max instruction and nothing else
// stands in the way of the next element.
template <class A>
VF_INLINE inline void keep_max(Vec<A> value, IVec<A> index, Vec<A>& max, IVec<A>& at) {
  const Vec<A> next = greater(value, max);
  at = next > max ? index : at;
  max = next;
}

// Elements are summed in chunks of this many vectors, so that rounding grows with the root of a row's length.
constexpr int64_t kChunk = 32;

// ---- per row: sum_c x[r, c] * scale[c] (scale may be null), and its maximum
// ------------------------------------

constexpr int kBlock = 4;  // vectors of a row between two looks at its maximum

// Index of the first element of kBlock vectors, from column c on, that equals `max`.
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

// Sums a row's columns from `begin` on, and keeps the maximum and its index, NaN aside.
template <class T, bool kScale>
VF_INLINE inline void finish_row(const T* row, const Acc<T>* scale, int64_t begin, int64_t cols, Acc<T>* sum,
                                 Acc<T>* max, int64_t* index) {
  for (int64_t c = begin; c < cols; ++c) {
    const Acc<T> v = static_cast<Acc<T>>(row[c]) * (kScale ? scale[c] : Acc<T>(1));
    *sum += v;
    if (v > *max) *max = v, *index = c;
  }
}

// The first NaN of a row, if there is one, is its maximum.
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
  Vec<A> total[R], top[R];
  IVec<A> where[R];
  for (int r = 0; r < R; ++r) {
    row[r] = x.row(r0 + r);
    total[r] = set1<A>(0);
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
    for (int r = 0; r < R; ++r) total[r] += part[r];
  }
  int64_t done = whole;
  if constexpr (!kMax) {
    for (; done + L <= x.cols; done += L) {
      for (int r = 0; r < R; ++r) {
        Vec<A> v = load(row[r] + done);
        if constexpr (kScale) v = v * load(scale + done);
        total[r] += v;
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    A s = sum_lanes<A>(total[r]), m = lowest;
    int64_t index = 0;
    if (kMax && whole) {
      max_lanes<A>(top[r], where[r], &m, &index);
      index = find_in_block<T, kScale>(row[r], scale, index, m);
    }
    finish_row<T, kScale>(row[r], scale, done, x.cols, &s, &m, &index);
    sum[r0 + r] = s;
    if constexpr (kMax) {
      if (s != s) find_nan<T, kScale>(row[r], scale, x.cols, &m, &index);  // or both infinities
      max[r0 + r] = m, at[r0 + r] = static_cast<Index<A>>(index);
    }
  }
}

// Short rows, as many as a vector has lanes: what their lanes hold is transposed, and reduced for all rows at
// once.
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
  for (int j = 1; j < L; ++j) {
    total[0] += total[j];
    const auto other_wins = (top[j] > top[0]) | ((top[j] == top[0]) & (where[j] < where[0]));
    where[0] = other_wins ? where[j] : where[0];
    top[0] = greater(top[j], top[0]);
  }
  store(sum + r0, total[0]), store(max + r0, top[0]), store_index<A>(at + r0, where[0]);
  const bool nan = reduce_lanes(total[0] != total[0], [](IVec<A> a, IVec<A> b) VF_INLINE { return a | b; });
  if (!nan && whole == x.cols) return;
  for (int64_t r = r0; r < r0 + L; ++r) {
    int64_t index = at[r];
    finish_row<T, kScale>(x.row(r), scale, whole, x.cols, sum + r, max + r, &index);
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

// ---- per column: sum_r x[r, c] * scale[r], and its maximum
// ------------------------------------------------------

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

// sum, max and at are whole vectors long (Buffer pads them) and are overwritten.
template <class T, bool kMax, bool kScale>
void column_stats(Matrix<const T> x, const Acc<T>* scale, Acc<T>* sum, Acc<T>* max = nullptr,
                  Index<Acc<T>>* at = nullptr) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    for (int64_t c = 0; c < x.cols; c += kLanes<A>) {
      store(sum + c, set1<A>(0));
      if constexpr (kMax) {
        store(max + c, set1<A>(-std::numeric_limits<A>::infinity()));
        store_index<A>(at + c, IVec<A>{});
      }
    }
    int64_t r = 0;
    for (; r + 8 <= x.rows; r += 8) column_stats_group<T, kMax, kScale, 8>(x, r, scale, sum, max, at);
    for (; r < x.rows; ++r) column_stats_group<T, kMax, kScale, 1>(x, r, scale, sum, max, at);
    if constexpr (kMax) {
      for (int64_t c = 0; c < x.cols; ++c) {
        if (sum[c] == sum[c]) continue;
        for (r = 0; r < x.rows; ++r) {
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

// ---- products of two matrices: per row sum_c a b v[c], per column sum_r a b u[r]
// --------------------------------

template <class T, bool kRow, bool kColumn, int R>
VF_INLINE inline void products_group(const Matrix<const T>& a, const Matrix<const T>& b, int64_t r0,
                                     const Acc<T>* u, const Acc<T>* v, Acc<T>* per_row, Acc<T>* per_column) {
  using A = Acc<T>;
  const T *pa[R], *pb[R];
  Vec<A> weight[R], total[R];
  for (int r = 0; r < R; ++r) {
    pa[r] = a.row(r0 + r);
    pb[r] = b.row(r0 + r);
    weight[r] = set1<A>(u ? u[r0 + r] : A(1));
    total[r] = set1<A>(0);
  }
  // What is left of a short row costs less one by one than as a vector that is filled and emptied.
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
    for (int r = 0; r < R; ++r) total[r] += part[r];
  }
  if constexpr (kRow) {
    for (int r = 0; r < R; ++r) {
      A sum = sum_lanes<A>(total[r]);
      for (int64_t c = cols; c < a.cols; ++c) sum += static_cast<A>(pa[r][c]) * static_cast<A>(pb[r][c]);
      per_row[r0 + r] = sum;
    }
  }
}

// Both sums want both weights, null for ones; one sum alone is unweighted. per_column is padded and
// overwritten; it sums rows in chunks, as rows sum columns.
template <class T, bool kRow, bool kColumn>
void products(Matrix<const T> a, Matrix<const T> b, const Acc<T>* u, const Acc<T>* v, Acc<T>* per_row,
              Acc<T>* per_column) {
  using A = Acc<T>;
  constexpr int64_t kRows = 64;
  Buffer<A> chunk(kColumn && a.rows > kRows ? a.cols : 0);
  A* part = a.rows > kRows ? chunk.get() : per_column;
  simd([=]() VF_INLINE {
    if constexpr (kColumn) {
      for (int64_t c = 0; c < a.cols; c += kLanes<A>) store(per_column + c, set1<A>(0));
    }
    for (int64_t r = 0; r < a.rows;) {
      const int64_t end = r + kRows < a.rows ? r + kRows : a.rows;
      for (; r + 4 <= end; r += 4) products_group<T, kRow, kColumn, 4>(a, b, r, u, v, per_row, part);
      for (; r < end; ++r) products_group<T, kRow, kColumn, 1>(a, b, r, u, v, per_row, part);
      if (!kColumn || part == per_column) continue;
      for (int64_t c = 0; c < a.cols; c += kLanes<A>) {
        store(per_column + c, load(per_column + c) + load(part + c));
        store(part + c, set1<A>(0));
      }
    }
  });
}

}  // namespace visattn
