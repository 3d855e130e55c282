// Reductions of a cube to its faces: maximum, argmax and mean over each axis.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "column_stats.h"
#include "cube.h"
#include "matrix.h"
#include "parallel.h"
#include "row_stats.h"
#include "simd.h"
#include "wide_sums.h"

namespace visattn {

// The sums and maxima of one part over its planes, [B, D]; rows that lie apart are padded to whole vectors.
template <class A>
struct Pooled {
  int64_t pitch, size;
  Buffer<A> sum, max;
  Buffer<Index<A>> at;
  PlaneTotals<A> totals;

  Pooled(int64_t planes, int64_t B, int64_t D, bool flat)
      : pitch(flat ? D : whole_vectors<A>(D)),
        size(B * pitch),
        sum(size),
        max(size),
        at(size),
        totals(planes, size) {}
};

// Adds planes [a0, a1) to the part, which has planes [begin, end).
template <class T>
void pool_planes(const Cube<const T>& q, int64_t begin, int64_t end, int64_t a0, int64_t a1,
                 Pooled<Acc<T>>& out) {
  using A = Acc<T>;
  A *sum = out.sum.get(), *max = out.max.get();
  Index<A>* at = out.at.get();
  const int64_t size = out.size, pitch = out.pitch;
  simd([=]() VF_INLINE {
    for (int64_t i = 0; a0 == begin && i < size; i += kLanes<A>) {
      store(sum + i, set1<A>(0));
      store(max + i, set1<A>(-std::numeric_limits<A>::infinity()));
      store_index<A>(at + i, IVec<A>{});
    }
    for (int64_t b = 0; b < q.pieces(); ++b) {
      const int64_t i = b * pitch;
      int64_t a = a0;
      for (; a + kPlanes <= a1; a += kPlanes) {
        column_stats_group<T, true, false, kPlanes>(q.piece(b), a, nullptr, sum + i, max + i, at + i);
      }
      for (; a < a1; ++a) {
        column_stats_group<T, true, false, 1>(q.piece(b), a, nullptr, sum + i, max + i, at + i);
      }
    }
  });
  out.totals.move(sum, a1 - begin, a1 == end);
}

// into += from. Parts are merged in order, so that the first of equal maxima stays.
template <class A>
void merge(Pooled<A>& into, const Pooled<A>& from) {
  A *sum = into.sum.get(), *max = into.max.get();
  Index<A>* at = into.at.get();
  const A *more = from.sum.get(), *other = from.max.get();
  const Index<A>* others = from.at.get();
  const int64_t size = into.size;
  simd([=]() VF_INLINE {
    for (int64_t i = 0; i < size; i += kLanes<A>) {
      const Vec<A> a = load(max + i), b = load(other + i);
      store(sum + i, load(sum + i) + load(more + i));
      store_index<A>(at + i, b > a ? load_index<A>(others + i) : load_index<A>(at + i));
      store(max + i, b > a ? b : a);
    }
  });
}

// The results of one image: maxima, means and the maxima's indices, [F] each.
template <class A>
struct PooledFaces {
  A *max, *mean;
  int32_t* at;

  void put(int64_t to, int64_t count, const A* sum, const A* top, const Index<A>* where, int64_t by) const {
    for (int64_t i = 0; i < count; ++i) {
      max[to + i] = top[i];
      mean[to + i] = sum[i] / static_cast<A>(by);
      at[to + i] = static_cast<int32_t>(where[i]);
    }
  }
};

// Faces [A, B] and [A, D] of planes [a0, a1), whose elements stay in cache for face [B, D].
template <class T>
void pool_inside(const Cube<const T>& q, const Faces& f, int64_t a0, int64_t a1,
                 const PooledFaces<Acc<T>>& out) {
  using A = Acc<T>;
  const int64_t rows = (a1 - a0) * q.B, most = std::max(rows, q.D);
  Buffer<A> sum(most), max(most);
  Buffer<Index<A>> at(most);
  if (f.ab >= 0) {
    const bool together = q.stride_a == q.B * q.stride_b;  // rows of all planes, one matrix
    for (int64_t a = a0; a < a1; a += together ? a1 - a0 : 1) {
      const int64_t count = together ? rows : q.B, r = (a - a0) * q.B;
      row_stats<T, true, false>(Matrix<const T>{q.p + a * q.stride_a, q.stride_b, count, q.D}, nullptr,
                                &sum[r], &max[r], &at[r]);
    }
    out.put(f.ab + a0 * q.B, rows, sum.get(), max.get(), at.get(), q.D);
  }
  for (int64_t a = a0; a < a1; ++a) {
    column_stats<T, true, false>(q.plane(a), nullptr, sum.get(), max.get(), at.get());
    out.put(f.ad + a * q.D, q.D, sum.get(), max.get(), at.get(), q.B);
  }
}

// Face [B, D], from all parts. The first NaN, if any, is the maximum.
template <class T>
void pool_across(const Cube<const T>& q, const Faces& f, Pooled<Acc<T>>& all,
                 const PooledFaces<Acc<T>>& out) {
  using A = Acc<T>;
  for (int64_t b = 0; b < q.B; ++b) {
    A *sum = &all.sum[b * all.pitch], *max = &all.max[b * all.pitch];
    Index<A>* at = &all.at[b * all.pitch];
    for (int64_t d = 0; d < q.D; ++d) {
      for (int64_t a = 0; sum[d] != sum[d] && a < q.A; ++a) {
        const A v = static_cast<A>(q.plane(a).row(b)[d]);
        if (v == v) continue;
        max[d] = v, at[d] = static_cast<Index<A>>(a);
        break;
      }
    }
    out.put(f.bd + b * q.D, q.D, sum, max, at, q.A);
  }
}

}  // namespace visattn
