// Equal maxima: their number, and the elements that equal them. A rule that shares a gradient evenly keeps
// the index of a unique maximum, or minus the number of equal ones; the rule "first" keeps the first index.
#pragma once

#include <cstdint>

#include "matrix.h"
#include "simd.h"
#include "simd_lanes.h"

namespace visattn {

// count[r] = the number of elements x[r, c] * scale[c] (scale may be null) that equal max[r]. The product has
// the same bits as in row_stats. NaN equals nothing.
template <class T, bool kScale>
void count_in_rows(Matrix<const T> x, const Acc<T>* scale, const Acc<T>* max, Index<Acc<T>>* count) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    const int64_t whole = x.cols - x.cols % kLanes<A>;
    for (int64_t r = 0; r < x.rows; ++r) {
      const T* row = x.row(r);
      const Vec<A> top = set1<A>(max[r]);
      IVec<A> found{};
      for (int64_t c = 0; c < whole; c += kLanes<A>) {
        Vec<A> v = load(row + c);
        if constexpr (kScale) v = v * load(scale + c);
        found -= v == top;
      }
      Index<A> total = reduce_lanes(found, [](IVec<A> a, IVec<A> b) VF_INLINE { return a + b; });
      for (int64_t c = whole; c < x.cols; ++c) {
        total += static_cast<A>(row[c]) * (kScale ? scale[c] : A(1)) == max[r];
      }
      count[r] = total;
    }
  });
}

template <class T, bool kScale, int R>
VF_INLINE inline void count_group(const Matrix<const T>& x, int64_t r0, const Acc<T>* scale,
                                  const Acc<T>* max, Index<Acc<T>>* count) {
  using A = Acc<T>;
  for_vectors<A>(x.cols, [&](int64_t c, auto lanes) VF_INLINE {
    const Vec<A> top = load(max + c);
    IVec<A> found = load_index<A>(count + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec<A> v = load(x.row(r0 + r) + c, lanes);
      if constexpr (kScale) v = v * set1<A>(scale[r0 + r]);
      found -= v == top;
    }
    store_index<A>(count + c, found);
  });
}

// count[c] = the number of elements x[r, c] * scale[r] that equal max[c]. max and count are padded.
template <class T, bool kScale>
void count_in_columns(Matrix<const T> x, const Acc<T>* scale, const Acc<T>* max, Index<Acc<T>>* count) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    for (int64_t c = 0; c < x.cols; c += kLanes<A>) store_index<A>(count + c, IVec<A>{});
    int64_t r = 0;
    for (; r + 8 <= x.rows; r += 8) count_group<T, kScale, 8>(x, r, scale, max, count);
    for (; r < x.rows; ++r) count_group<T, kScale, 1>(x, r, scale, max, count);
  });
}

template <class I>
int32_t index_or_ties(I index, I count) {
  return static_cast<int32_t>(count > 1 ? -count : index);
}

// The maxima over channels of an image's pixels, or over pixels of its channels, and their gradients.
template <class A>
struct Maxima {
  const int32_t* at;
  const A *value, *grad;  // values are read where at < 0

  // The gradient of each element that equals maximum i.
  A share(int64_t i) const { return at[i] < 0 ? grad[i] / static_cast<A>(-at[i]) : grad[i]; }

  // True if the element at `index`, whose value is value_of(), is the maximum i or equals it.
  template <class F>
  bool hits(int64_t i, int64_t index, const F& value_of) const {
    return at[i] < 0 ? value_of() == value[i] : at[i] == index;
  }
};

}  // namespace visattn
