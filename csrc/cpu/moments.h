// Mean and second moment, sum (x - mean)^2, of rows and of columns; and how those of parts are combined.
#pragma once

#include "matrix.h"

namespace visattn {

template <class A>
struct Moments {
  A mean, second;
};

// A row is read twice while it is in cache: the deviations are from its own mean, so nothing cancels. What
// their sum leaves corrects the mean, which of equal values is then their value: a batch norm magnifies the
// rest. (Of an infinite mean nothing but NaN is left.)
template <class T>
Moments<Acc<T>> row_moments(const T* row, int64_t cols) {
  using A = Acc<T>;
  Moments<A> out{};
  simd([&out, row, cols]() VF_INLINE {
    constexpr int L = kLanes<A>;
    const int64_t whole = cols - cols % (4 * L);
    const auto sum = [&](auto term) VF_INLINE {
      Vec<A> total = set1<A>(0);
      for (int64_t c0 = 0; c0 < whole; c0 += kChunk * L) {
        const int64_t end = c0 + kChunk * L < whole ? c0 + kChunk * L : whole;
        Vec<A> part[4] = {};
        for (int64_t c = c0; c < end; c += 4 * L) {
          for (int i = 0; i < 4; ++i) part[i] += term(load(row + c + i * L));
        }
        total += (part[0] + part[1]) + (part[2] + part[3]);
      }
      A result = sum_lanes<A>(total);
      for (int64_t c = whole; c < cols; ++c) result += term(static_cast<A>(row[c]));
      return result;
    };
    const A mean = sum([](auto v) VF_INLINE { return v; }) / static_cast<A>(cols);
    const A rest = sum([mean](auto v) VF_INLINE { return v - mean; }) / static_cast<A>(cols);
    out.mean = rest == rest ? mean + rest : mean;
    out.second = sum([center = out.mean](auto v) VF_INLINE { return (v - center) * (v - center); });
  });
  return out;
}

// mean and second are padded, and overwritten.
template <class T>
void column_moments(Matrix<const T> x, Acc<T>* mean, Acc<T>* second) {
  using A = Acc<T>;
  column_stats<T, false, false>(x, nullptr, mean);
  Buffer<A> rest(x.cols);
  A* shift = rest.get();
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
    int64_t r = 0;
    for (; r + 8 <= x.rows; r += 8) group(r, std::integral_constant<int, 8>{});
    for (; r < x.rows; ++r) group(r, std::integral_constant<int, 1>{});
    for (int64_t c = 0; c < x.cols; c += kLanes<A>) {
      Vec<A> d = load(shift + c) / static_cast<A>(x.rows);
      d = d == d ? d : Vec<A>{};
      store(mean + c, load(mean + c) + d);
      store(second + c, load(second + c) - d * d * static_cast<A>(x.rows));
    }
  });
}

// The moments of all parts, in order; of(i) are those of part i, count(i) its number of values.
template <class A, class Of, class Count>
Moments<A> combine_moments(int64_t parts, const Of& of, const Count& count) {
  A values = 0;
  Moments<A> out{};
  const A first = std::isfinite(of(0).mean) ? of(0).mean : A(0);
  for (int64_t i = 0; i < parts; ++i) {
    out.mean += (of(i).mean - first) * static_cast<A>(count(i)), values += count(i);
  }
  out.mean = first + out.mean / values;
  for (int64_t i = 0; i < parts; ++i) {
    const A d = of(i).mean - out.mean;
    out.second += of(i).second + static_cast<A>(count(i)) * d * d;
  }
  return out;
}

}  // namespace visattn
