// Long sums. Vectors add up a chunk of values in A, and the chunks' sums are added in double, so that the
// rounding error of a sum does not grow with its length. The double sums cost nothing: one addition a chunk.
#pragma once

#include <cstdint>
#include <cstring>

#include "matrix.h"
#include "parallel.h"
#include "simd.h"

namespace visattn {

constexpr int64_t kRows = 64;  // rows whose columns are added up in A

template <class A>
VF_INLINE inline Wide<A> widen(Vec<A> v) {
  return __builtin_convertvector(v, Wide<A>);
}

template <class A>
VF_INLINE inline double sum_wide(Wide<A> v) {
  double sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += v[i];
  return sum;
}

template <class A>
VF_INLINE inline Wide<A> load_wide(const double* p) {
  Wide<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class A>
VF_INLINE inline void store_wide(double* p, Wide<A> v) {
  std::memcpy(p, &v, sizeof(v));
}

// The sum of a row that is read vector by vector.
template <class A>
class RowTotal {
 public:
  VF_INLINE void add(Vec<A> v) {
    part_ += v;
    if (++count_ % kChunk == 0) total_ += widen<A>(part_), part_ = set1<A>(0);
  }
  VF_INLINE A sum() const { return static_cast<A>(sum_wide<A>(total_ + widen<A>(part_))); }

 private:
  Vec<A> part_ = {};
  Wide<A> total_ = {};
  int64_t count_ = 0;
};

// total += part, part = 0, for whole vectors of `count` columns.
template <class A>
VF_INLINE inline void flush(A* part, double* total, int64_t count) {
  for (int64_t c = 0; c < count; c += kLanes<A>) {
    store_wide<A>(total + c, load_wide<A>(total + c) + widen<A>(load(part + c)));
    store(part + c, set1<A>(0));
  }
}

// out = total, rounded, for whole vectors of `count` columns.
template <class A>
VF_INLINE inline void round_to(A* out, const double* total, int64_t count) {
  for (int64_t c = 0; c < count; c += kLanes<A>)
    store(out + c, __builtin_convertvector(load_wide<A>(total + c), Vec<A>));
}

// Sums over many rows, `count` arrays of `cols` columns. Few rows need no totals.
template <class A>
class ColumnTotals {
 public:
  ColumnTotals(int64_t rows, int64_t cols, int64_t count = 1)
      : stride_((cols + 15) / 16 * 16), wide_(rows > kRows ? count * stride_ : 0) {}

  // Null if the rows are few.
  double* of(int64_t i) { return wide_.get() ? wide_.get() + i * stride_ : nullptr; }

 private:
  int64_t stride_;
  Buffer<double> wide_;
};

// Sums over `planes` planes of `size` values that come a few planes at a time, a divisor of kRows.
template <class A>
class PlaneTotals {
 public:
  PlaneTotals(int64_t planes, int64_t size) : size_(size), totals_(planes, size) {}

  // Moves the sums away once `done` planes fill a chunk; after the last planes, `sum` receives the total.
  void move(A* sum, int64_t done, bool last) {
    double* total = totals_.of(0);
    if (!total || (!last && done % kRows != 0)) return;
    const int64_t size = size_;
    simd([=]() VF_INLINE {
      for (int64_t i = 0; done <= kRows && i < size; i += kLanes<A>) store_wide<A>(total + i, Wide<A>{});
      flush(sum, total, size);
      if (last) round_to(sum, total, size);
    });
  }

 private:
  int64_t size_;
  ColumnTotals<A> totals_;
};

// Calls add(begin, end) for chunks of the rows. It adds them to the arrays `sums`, padded, which begin at
// zero. totals[i] are the ColumnTotals of sums[i].
template <class A, int K, class Add>
VF_INLINE inline void add_in_chunks(int64_t rows, int64_t cols, A* const (&sums)[K],
                                    double* const (&totals)[K], const Add& add) {
  const int64_t step = totals[0] ? kRows : rows;
  for (int64_t r = 0; r < rows; r += step) {
    add(r, r + step < rows ? r + step : rows);
    for (int i = 0; totals[0] && i < K; ++i) flush(sums[i], totals[i], cols);
  }
  for (int i = 0; totals[0] && i < K; ++i) round_to(sums[i], totals[i], cols);
}

}  // namespace visattn
