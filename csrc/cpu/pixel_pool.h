// Reductions from an image to its pixels: mean, maximum and argmax over channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../common/tensor.h"
#include "column_stats.h"
#include "image_matrix.h"
#include "matrix.h"
#include "parallel.h"
#include "row_stats.h"
#include "simd.h"
#include "ties.h"

namespace visattn {

// An image in blocks of whole image rows, about 512 KB each, so that the next pass finds them in cache.
template <class T>
struct PixelBlocks : Split {
  int64_t W;

  explicit PixelBlocks(const Shape& s) : Split(s.H, rows_per_block(s)), W(s.W) {}
  int64_t first_pixel(int64_t i) const { return begin(i) * W; }
  int64_t last_pixel(int64_t i) const { return end(i) * W; }
  // Blocks that a k x k window reaches beyond its own.
  int64_t reach(int64_t k) const { return std::min(count, (k / 2 + size - 1) / size); }

 private:
  static int64_t rows_per_block(const Shape& s) {
    const int64_t unit = 8 / std::gcd(s.W, int64_t{8});  // image rows that make up whole vectors
    const int64_t most =
        std::max<int64_t>(1, (int64_t{1} << 19) / static_cast<int64_t>(sizeof(T) * s.C * s.W));
    const int64_t blocks = ((s.H + most - 1) / most + 3) / 4 * 4;  // two or four threads share them evenly
    return ((s.H + blocks - 1) / blocks + unit - 1) / unit * unit;
  }
};

// Mean, maximum and argmax over channels of x (with kScale of x * scale, where scale [C] is padded) for the
// pixels of a block; with kEven `at` counts ties.
template <class T, bool kScale, bool kEven = false>
void pixel_stats(const Matrix<const T>& x, bool nhwc, const Acc<T>* scale, Acc<T>* mean, Acc<T>* max,
                 int32_t* at) {
  using A = Acc<T>;
  const int64_t pixels = nhwc ? x.rows : x.cols, channels = nhwc ? x.cols : x.rows;
  Buffer<A> sum(pixels), top(pixels);
  Buffer<Index<A>> where(pixels);
  if (nhwc) {
    row_stats<T, true, kScale>(x, scale, sum.get(), top.get(), where.get());
  } else {
    column_stats<T, true, kScale>(x, scale, sum.get(), top.get(), where.get());
  }
  Buffer<Index<A>> count(kEven ? pixels : 0);
  if constexpr (kEven) {
    if (nhwc) {
      count_in_rows<T, kScale>(x, scale, top.get(), count.get());
    } else {
      count_in_columns<T, kScale>(x, scale, top.get(), count.get());
    }
  }
  for (int64_t p = 0; p < pixels; ++p) {
    mean[p] = sum[p] / static_cast<A>(channels);
    max[p] = top[p];
    at[p] = kEven ? index_or_ties(where[p], count[p]) : static_cast<int32_t>(where[p]);
  }
}

}  // namespace visattn
