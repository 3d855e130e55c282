// Operations across the lanes of vectors: transpose, zip, rotate, and reductions of one vector to a scalar.
#pragma once

#include <cstdint>
#include <limits>

#include "simd.h"

namespace visattn {

// Picks lanes of a and b by constant indices; the indices of b follow those of a.
#ifdef __clang__
#define VF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VF_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a == a){__VA_ARGS__})
#endif

// Transposes in place.
template <class V>
VF_INLINE inline void transpose(V (&v)[8]) {
  V t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = VF_SHUFFLE(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = VF_SHUFFLE(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = VF_SHUFFLE(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      u[i + 2 * j + 1] = VF_SHUFFLE(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = VF_SHUFFLE(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = VF_SHUFFLE(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

template <class V>
VF_INLINE inline void transpose(V (&v)[4]) {
  V t[4];
  for (int i = 0; i < 4; i += 2) {
    t[i] = VF_SHUFFLE(v[i], v[i + 1], 0, 4, 2, 6);
    t[i + 1] = VF_SHUFFLE(v[i], v[i + 1], 1, 5, 3, 7);
  }
  for (int i = 0; i < 2; ++i) {
    v[i] = VF_SHUFFLE(t[i], t[i + 2], 0, 1, 4, 5);
    v[i + 2] = VF_SHUFFLE(t[i], t[i + 2], 2, 3, 6, 7);
  }
}

template <class V>
VF_INLINE inline void transpose(V (&v)[2]) {
  const V first = VF_SHUFFLE(v[0], v[1], 0, 2);
  v[1] = VF_SHUFFLE(v[0], v[1], 1, 3);
  v[0] = first;
}

// Splits two vectors, taken as one run of elements, into the elements at even and at odd positions.
template <class V>
VF_INLINE inline void unzip(V low, V high, V& even, V& odd) {
  constexpr int lanes = sizeof(V) / sizeof(low[0]);
  if constexpr (lanes == 8) {
    even = VF_SHUFFLE(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
    odd = VF_SHUFFLE(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
  } else if constexpr (lanes == 4) {
    even = VF_SHUFFLE(low, high, 0, 2, 4, 6);
    odd = VF_SHUFFLE(low, high, 1, 3, 5, 7);
  } else {
    even = VF_SHUFFLE(low, high, 0, 2);
    odd = VF_SHUFFLE(low, high, 1, 3);
  }
}

// The inverse of unzip.
template <class V>
VF_INLINE inline void zip(V even, V odd, V& low, V& high) {
  constexpr int lanes = sizeof(V) / sizeof(even[0]);
  if constexpr (lanes == 8) {
    low = VF_SHUFFLE(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
    high = VF_SHUFFLE(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (lanes == 4) {
    low = VF_SHUFFLE(even, odd, 0, 4, 1, 5);
    high = VF_SHUFFLE(even, odd, 2, 6, 3, 7);
  } else {
    low = VF_SHUFFLE(even, odd, 0, 2);
    high = VF_SHUFFLE(even, odd, 1, 3);
  }
}

// Rotates the lanes by `step`. After steps of half, a quarter, ... of the vector each lane has met every
// other.
template <int step, class V>
VF_INLINE inline V rotate(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  constexpr auto at = [](int j) { return (j + step) % lanes; };
  if constexpr (lanes == 8) {
    return VF_SHUFFLE(v, v, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
  } else if constexpr (lanes == 4) {
    return VF_SHUFFLE(v, v, at(0), at(1), at(2), at(3));
  } else {
    return VF_SHUFFLE(v, v, at(0), at(1));
  }
}

template <class V, class F>
VF_INLINE inline auto reduce_lanes(V v, const F& f) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  if constexpr (lanes == 8) v = f(v, rotate<4>(v));
  if constexpr (lanes >= 4) v = f(v, rotate<2>(v));
  v = f(v, rotate<1>(v));
  return v[0];
}

template <class V>
VF_INLINE inline V greater(V a, V b) {
  return a > b ? a : b;
}

template <class A>
VF_INLINE inline A sum_lanes(Vec<A> v) {
  return reduce_lanes(v, [](Vec<A> a, Vec<A> b) VF_INLINE { return a + b; });
}

// The greatest lane, and the smallest index among the lanes that hold it. Ignores NaN.
template <class A>
VF_INLINE inline void max_lanes(Vec<A> v, IVec<A> at, A* max, int64_t* index) {
  *max = reduce_lanes(v, [](Vec<A> a, Vec<A> b) VF_INLINE { return greater(a, b); });
  const IVec<A> none = set1_index<A>(std::numeric_limits<int32_t>::max());
  const IVec<A> mine = (v == set1<A>(*max)) ? at : none;
  *index = reduce_lanes(mine, [](IVec<A> a, IVec<A> b) VF_INLINE { return a < b ? a : b; });
}

}  // namespace visattn
