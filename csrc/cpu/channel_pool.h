// Reductions from an image to its channels: partial sums, mean, maximum and argmax over pixels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/tensor.h"
#include "column_stats.h"
#include "image_matrix.h"
#include "matrix.h"
#include "parallel.h"
#include "row_stats.h"
#include "simd.h"
#include "ties.h"

namespace visattn {

// One value for each channel and part (nhwc) or for each channel (nchw), and their sums over the parts, in
// order and in double.
template <class A>
class ChannelPartials {
 public:
  ChannelPartials(int64_t channels, int64_t parts)
      : C_(channels), stride_((channels + 7) / 8 * 8), parts_(parts), values_(stride_ * parts) {}
  A* part(int64_t i) { return values_.get() + i * stride_; }

  void sum(A* out) {
    if (parts_ == 1) return void(std::copy_n(part(0), C_, out));
    constexpr int64_t kSums = 64;
    for (int64_t c0 = 0; c0 < C_; c0 += kSums) {
      const int64_t count = std::min(C_ - c0, kSums);
      double sums[kSums] = {};
      for (int64_t i = 0; i < parts_; ++i) {
        const A* p = part(i) + c0;
        for (int64_t c = 0; c < count; ++c) sums[c] += p[c];
      }
      for (int64_t c = 0; c < count; ++c) out[c0 + c] = static_cast<A>(sums[c]);
    }
  }

 private:
  int64_t C_, stride_, parts_;
  Buffer<A> values_;
};

// The mean of every channel of an image, and with kMax its maximum and the pixel of that; with kEven it
// counts ties.
template <class T, bool kMax, bool kEven = false>
class ChannelPool {
  using A = Acc<T>;

 public:
  ChannelPool(const Shape& s, bool nhwc)
      : s_(s),
        nhwc_(nhwc),
        parts_(row_parts<T>(s, nhwc)),
        sum_(s.C, nhwc ? parts_.count : 1),
        max_(kMax ? s.C : 0, nhwc ? parts_.count : 1),
        at_(kMax ? s.C : 0, nhwc ? parts_.count : 1),
        count_(kEven ? s.C : 0, nhwc ? parts_.count : 1) {}

  void run(const Matrix<const T>& x, const Workers& workers, A* mean, A* max = nullptr,
           int32_t* at = nullptr) {
    workers.each(parts_.count, [&](int64_t begin, int64_t end) {
      if (!nhwc_) {
        const int64_t c0 = parts_.begin(begin), c1 = parts_.end(end - 1);
        row_stats<T, kMax, false>(rows_of(x, c0, c1), nullptr, sum_.part(0) + c0, max_.part(0) + c0,
                                  at_.part(0) + c0);
        if constexpr (kEven) {
          count_in_rows<T, false>(rows_of(x, c0, c1), nullptr, max_.part(0) + c0, count_.part(0) + c0);
        }
        return;
      }
      for (int64_t i = begin; i < end; ++i) {
        const auto part = rows_of(x, parts_.begin(i), parts_.end(i));
        column_stats<T, kMax, false>(part, nullptr, sum_.part(i), max_.part(i), at_.part(i));
        if constexpr (kEven) count_in_columns<T, false>(part, nullptr, max_.part(i), count_.part(i));
      }
    });
    sum_.sum(mean);
    for (int64_t c = 0; c < s_.C; ++c) mean[c] /= static_cast<A>(s_.P);
    if constexpr (kMax) merge(max, at);
  }

 private:
  // Merges the parts in order, so that the first of equal maxima, or the first NaN, stays.
  void merge(A* max, int32_t* at) {
    A* best = max_.part(0);
    Index<A>* where = at_.part(0);
    for (int64_t i = 1; nhwc_ && i < parts_.count; ++i) {
      const A* other = max_.part(i);
      const Index<A>*index = at_.part(i), *others = kEven ? count_.part(i) : nullptr;
      Index<A>* count = count_.part(0);
      const int64_t first = parts_.begin(i), channels = s_.C;
      simd([=]() VF_INLINE {
        for (int64_t c = 0; c < channels; c += kLanes<A>) {
          const Vec<A> a = load(best + c), b = load(other + c);
          const IVec<A> wins = (b > a) | ((b != b) & (a == a));
          if constexpr (kEven) {
            const IVec<A> so_far = load_index<A>(count + c), more = load_index<A>(others + c);
            store_index<A>(count + c, wins ? more : (a == b ? so_far + more : so_far));
          }
          store(best + c, wins ? b : a);
          store_index<A>(where + c,
                         wins ? load_index<A>(index + c) + set1_index<A>(first) : load_index<A>(where + c));
        }
      });
    }
    std::copy_n(best, s_.C, max);
    for (int64_t c = 0; c < s_.C; ++c) {
      at[c] = kEven ? index_or_ties(where[c], count_.part(0)[c]) : static_cast<int32_t>(where[c]);
    }
  }

  Shape s_;
  bool nhwc_;
  Split parts_;
  ChannelPartials<A> sum_, max_;
  ChannelPartials<Index<A>> at_, count_;
};

}  // namespace visattn
