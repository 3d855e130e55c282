// How lines lie in memory. Lines [N, C, L], L = H + W, hold a value for each row, then for each column, of a
// channel. They are dense along L in nchw, along C in nhwc.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "../common/tensor.h"
#include "simd.h"

namespace visattn {

inline Tensor empty_lines(const Shape& s, bool nhwc, ScalarType dtype) {
  const int64_t L = s.H + s.W, sizes[] = {s.N, s.C, L}, strides[] = {s.C * L, nhwc ? 1 : L, nhwc ? s.C : 1};
  return empty_strided(3, sizes, strides, dtype);
}

// Lines from outside, dense in the layout.
inline Tensor dense_lines(const Tensor& t, bool nhwc) {
  return as_contiguous(nhwc ? torch::stable::transpose(t, 1, 2) : t);
}

// One image's lines.
template <class A>
struct Lines {
  A* p;
  int64_t H, W, C;
  bool nhwc;

  VF_INLINE A* row(int64_t c, int64_t h) const { return nhwc ? p + h * C + c : p + c * (H + W) + h; }
  VF_INLINE A* column(int64_t c, int64_t w) const { return row(c, H + w); }
};

template <class A>
Lines<A> lines_of(const Tensor& t, const Shape& s, bool nhwc, int64_t n) {
  return {data<A>(t) + n * s.C * (s.H + s.W), s.H, s.W, s.C, nhwc};
}

}  // namespace visattn
