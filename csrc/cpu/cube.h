// An image as a cube [A, B, D] whose last axis is dense: [C, H, W] in nchw, [H, W, C] in nhwc.
//
// Each axis is pooled to a face of the other two: D to [A, B], B to [A, D], A to [B, D]. The faces [F] of an
// image follow each other in a fixed order: C and W, H and C, H and W. A face has the cube's order of axes.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "../common/tensor.h"
#include "image_matrix.h"
#include "matrix.h"

namespace visattn {

constexpr int64_t kPlanes = 8;  // planes [B, D] that are added to the face [B, D] at a time

// An image of x, whose planes and rows may lie apart, or of a dense map.
template <class T>
struct Cube {
  T* p;
  int64_t A, B, D, stride_a, stride_b;

  Matrix<T> plane(int64_t a) const { return {p + a * stride_a, stride_b, B, D}; }
  // All planes as a matrix with a row for each plane, from row b of the plane on: the whole plane if its rows
  // are adjacent, else that one row.
  bool flat() const { return stride_b == D; }
  int64_t pieces() const { return flat() ? 1 : B; }
  Matrix<T> piece(int64_t b) const { return {p + b * stride_b, stride_a, A, flat() ? B * D : D}; }
};

template <class T>
Cube<const T> cube_of(const T* image, const Shape& s, bool nhwc, int64_t ld) {
  if (nhwc) return {image, s.H, s.W, s.C, s.W * ld, ld};
  return {image, s.C, s.H, s.W, ld, s.W};
}

// Where the faces of an image begin; -1 for a face that is left out.
struct Faces {
  int64_t ab, ad, bd, size;
  int64_t count() const { return 1 + (ab >= 0) + (bd >= 0); }
};

inline Faces faces_of(const Shape& s, bool nhwc, bool spatial) {
  const int64_t hc = s.C * s.W, hw = hc + s.H * s.C, end = hw + (spatial ? s.P : 0);
  if (nhwc) return {spatial ? hw : -1, hc, 0, end};
  return {hc, 0, spatial ? hw : -1, end};
}

// The faces of gates [N, F].
inline Faces faces_of(const Shape& s, bool nhwc, const Tensor& gates) {
  const Faces all = faces_of(s, nhwc, true), two = faces_of(s, nhwc, false);
  const int64_t size = gates.size(1);
  return size == all.size ? all : two;
}

// Planes in at most four parts, whose sums over the planes are added in order.
inline Split plane_parts(int64_t planes) {
  return Split(planes, ((planes + 3) / 4 + kPlanes - 1) / kPlanes * kPlanes);
}

// Planes in pieces of about 64 KB, without common sums.
template <class T>
Split plane_pieces(const Cube<const T>& q) {
  return Split(q.A, (int64_t{1} << 16) / static_cast<int64_t>(sizeof(T) * q.B * q.D));
}

}  // namespace visattn
