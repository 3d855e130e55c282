// A row-major matrix. A feature map is one in either layout (its rows are channels or pixels), so that all
// loops over big tensors are a few reductions and maps over matrices.
#pragma once

#include <cstdint>

#include "simd.h"
#include "simd_lanes.h"

namespace visattn {

template <class T>
struct Matrix {
  T* p;
  int64_t ld, rows, cols;
  VF_INLINE T* row(int64_t r) const { return p + r * ld; }
};

// Keeps the greater of two maxima and its index, lane by lane: the first of equal ones, ignoring NaN. It
// compares with the new maximum, so that GCC makes a max instruction, and the next element depends on that
// alone.
template <class A>
VF_INLINE inline void keep_max(Vec<A> value, IVec<A> index, Vec<A>& max, IVec<A>& at) {
  const Vec<A> next = greater(value, max);
  at = next > max ? index : at;
  max = next;
}

// Sums add up chunks of this many vectors, so that rounding errors grow with the root of a row's length.
constexpr int64_t kChunk = 32;

}  // namespace visattn
