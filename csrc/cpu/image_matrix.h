// One image as a matrix in either layout: its parts, its elements, and gates as factors of its rows and
// columns.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/tensor.h"
#include "elementwise.h"
#include "matrix.h"

namespace visattn {

// [0, total) in pieces of `size`. It depends on the shape alone, so that sums do not depend on the number of
// threads.
struct Split {
  int64_t total, size, count;

  Split(int64_t total_, int64_t size_) : total(total_), size(std::clamp<int64_t>(size_, 1, total_)) {
    count = (total + size - 1) / size;
  }
  int64_t begin(int64_t i) const { return i * size; }
  int64_t end(int64_t i) const { return std::min(total, (i + 1) * size); }
};

template <class T>
Matrix<T> matrix(T* image, const Shape& s, bool nhwc, int64_t ld) {
  return nhwc ? Matrix<T>{image, ld, s.P, s.C} : Matrix<T>{image, ld, s.C, s.P};
}

template <class T>
Matrix<T> rows_of(const Matrix<T>& m, int64_t begin, int64_t end) {
  return {m.row(begin), m.ld, end - begin, m.cols};
}

// Pixels [begin, end) of an image: columns in nchw, rows in nhwc.
template <class T>
Matrix<T> pixels_of(const Matrix<T>& m, bool nhwc, int64_t begin, int64_t end) {
  if (nhwc) return rows_of(m, begin, end);
  return {m.p + begin, m.ld, m.rows, end - begin};
}

template <class T>
T* element(const Matrix<T>& m, bool nhwc, int64_t channel, int64_t pixel) {
  return nhwc ? m.row(pixel) + channel : m.row(channel) + pixel;
}

// Rows (channels in nchw, pixels in nhwc) in parts of about 64 KB.
template <class T>
Split row_parts(const Shape& s, bool nhwc) {
  const int64_t rows = nhwc ? s.P : s.C, cols = nhwc ? s.C : s.P;
  const int64_t size = (int64_t{1} << 16) / static_cast<int64_t>(sizeof(T) * cols);
  return Split(rows, std::max<int64_t>(8, size / 8 * 8));
}

// The channel gate as a factor of the matrix: of its rows in nchw, of its columns in nhwc, where `gate` is
// padded.
template <class A>
Gate<A> channel_factor(bool nhwc, const A* gate, int64_t row0 = 0) {
  return nhwc ? Gate<A>{nullptr, gate} : Gate<A>{gate + row0, nullptr};
}

// Channel gate and spatial gate as factors of the matrix of a block that begins at pixel p0.
template <class A>
Gate<A> both_factors(bool nhwc, const A* channel, const A* spatial, int64_t p0, bool sum = false) {
  return nhwc ? Gate<A>{spatial + p0, channel, sum} : Gate<A>{channel, spatial + p0, sum};
}

}  // namespace visattn
