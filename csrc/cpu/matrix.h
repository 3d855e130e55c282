// A row-major matrix. A feature map is one in either layout (rows are channels or pixels), so the few reductions
// and maps over matrices are all the loops over big tensors.
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

}  // namespace visattn
