// Mean and second moment, sum (x - mean)^2, of rows and of columns, and how those of parts are combined.
#pragma once

#include <cstdint>
#include <type_traits>

#include "column_stats.h"
#include "matrix.h"
#include "parallel.h"
#include "simd.h"
#include "simd_lanes.h"
#include "wide_sums.h"

namespace visattn {

template <class A>
struct Moments {
  A mean, second;
};

// Reads a row twice while it is in cache: deviations are from the row's own mean, so that nothing cancels.
// The sum is in double, so that the mean of equal values is exactly their value; a batch norm magnifies any
// difference.
template <class T>
Moments<Acc<T>> row_moments(const T* row, int64_t cols) {
  using A = Acc<T>;
  Moments<A> out{};
  simd([&out, row, cols]() VF_INLINE {
    constexpr int L = kLanes<A>;
    const int64_t whole = cols - cols % (2 * L);
    Wide<A> total = {}, other = {};
    for (int64_t c = 0; c < whole; c += 2 * L) {
      total += widen<A>(load(row + c));
      other += widen<A>(load(row + c + L));
    }
    total += other;
    double sum = sum_wide<A>(total), second = 0;
    for (int64_t c = whole; c < cols; ++c) sum += static_cast<A>(row[c]);
    const A mean = static_cast<A>(sum / static_cast<double>(cols));
    for (int64_t c0 = 0; c0 < whole; c0 += kChunk * L) {
      const int64_t end = c0 + kChunk * L < whole ? c0 + kChunk * L : whole;
      Vec<A> part[2] = {};
      for (int64_t c = c0; c < end; c += 2 * L) {
        for (int i = 0; i < 2; ++i) {
          const Vec<A> d = load(row + c + i * L) - mean;
          part[i] += d * d;
        }
      }
      second += sum_lanes<A>(part[0] + part[1]);
    }
    for (int64_t c = whole; c < cols; ++c) {
      const A d = static_cast<A>(row[c]) - mean;
      second += d * d;
    }
    out = {mean, static_cast<A>(second)};
  });
  return out;
}

// Overwrites mean and second, which are padded.
template <class T>
void column_moments(Matrix<const T> x, Acc<T>* mean, Acc<T>* second) {
  using A = Acc<T>;
  column_stats<T, false, false>(x, nullptr, mean);
  Buffer<A> rest(x.cols);
  A* shift = rest.get();
  ColumnTotals<A> totals(x.rows, x.cols, 2);
  double* const total[] = {totals.of(0), totals.of(1)};
  simd([=]() VF_INLINE {
    for (int64_t c = 0; c < x.cols; c += kLanes<A>) {
      store(mean + c, load(mean + c) / static_cast<A>(x.rows));
      store(second + c, set1<A>(0));
    }
    const auto group = [&](int64_t r0, auto count) VF_INLINE {
      constexpr int R = decltype(count)::value;
      const T* row[R];
      for (int r = 0; r < R; ++r) row[r] = x.row(r0 + r);
      for_vectors<A>(x.cols, [&](int64_t c, auto lanes) VF_INLINE {
        const Vec<A> m = load(mean + c);
        Vec<A> part = set1<A>(0), apart = set1<A>(0);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec<A> d = load(row[r] + c, lanes) - m;
          apart += d, part += d * d;
        }
        store(second + c, load(second + c) + part);
        store(shift + c, load(shift + c) + apart);
      });
    };
    A* const sums[] = {second, shift};
    add_in_chunks(x.rows, x.cols, sums, total, [&](int64_t r, int64_t end) VF_INLINE {
      for (; r + 8 <= end; r += 8) group(r, std::integral_constant<int, 8>{});
      for (; r < end; ++r) group(r, std::integral_constant<int, 1>{});
    });
    for (int64_t c = 0; c < x.cols; c += kLanes<A>) {
      Vec<A> d = load(shift + c) / static_cast<A>(x.rows);
      d = d == d ? d : Vec<A>{};
      store(mean + c, load(mean + c) + d);
      store(second + c, load(second + c) - d * d * static_cast<A>(x.rows));
    }
  });
}

// Combines the moments of all parts, in order. of(i) are those of part i, count(i) is its number of values.
template <class A, class Of, class Count>
Moments<A> combine_moments(int64_t parts, const Of& of, const Count& count) {
  double values = 0, mean = 0, second = 0;
  for (int64_t i = 0; i < parts; ++i) mean += static_cast<double>(of(i).mean) * count(i), values += count(i);
  mean /= values;
  for (int64_t i = 0; i < parts; ++i) {
    const double d = of(i).mean - mean;
    second += of(i).second + count(i) * d * d;
  }
  return {static_cast<A>(mean), static_cast<A>(second)};
}

}  // namespace visattn
