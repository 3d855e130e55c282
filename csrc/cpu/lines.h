// Lines [N, C, L], L = H + W: values of the rows, then of the columns. Dense along L for nchw, along C for
// nhwc.
#pragma once

#include "tensor.h"

namespace visattn {

inline Tensor empty_lines(const Shape& s, bool nhwc, ScalarType dtype) {
  const int64_t L = s.H + s.W, sizes[] = {s.N, s.C, L}, strides[] = {s.C * L, nhwc ? 1 : L, nhwc ? s.C : 1};
  return empty_strided(3, sizes, strides, dtype);
}

// Lines that came from outside, dense as they are wanted.
inline Tensor dense_lines(const Tensor& t, bool nhwc) {
  if (!nhwc) return t.is_contiguous() ? t : torch::stable::contiguous(t);
  const Tensor rows = torch::stable::transpose(t, 1, 2);
  return rows.is_contiguous() ? rows : torch::stable::contiguous(rows);
}

}  // namespace visattn
