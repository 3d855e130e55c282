// One image in either layout, cut into parts; reductions to channels.
#pragma once

#include <algorithm>

#include "elementwise.h"
#include "tensor.h"
#include "ties.h"

namespace visattn {

// [0, total) in pieces of `size`. Depends on the shape alone, so that sums do not depend on the threads.
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

// Pixels [begin, end) of an image: columns of nchw, rows of nhwc.
template <class T>
Matrix<T> pixels_of(const Matrix<T>& m, bool nhwc, int64_t begin, int64_t end) {
  if (nhwc) return rows_of(m, begin, end);
  return {m.p + begin, m.ld, m.rows, end - begin};
}

template <class T>
T* element(const Matrix<T>& m, bool nhwc, int64_t channel, int64_t pixel) {
  return nhwc ? m.row(pixel) + channel : m.row(channel) + pixel;
}

// Rows (channels of nchw, pixels of nhwc) in parts of about 64 KB.
template <class T>
Split row_parts(const Shape& s, bool nhwc) {
  const int64_t rows = nhwc ? s.P : s.C, cols = nhwc ? s.C : s.P;
  const int64_t size = (int64_t{1} << 16) / static_cast<int64_t>(sizeof(T) * cols);
  return Split(rows, std::max<int64_t>(8, size / 8 * 8));
}

// One value per channel and part (nhwc) or per channel (nchw), and the fixed order in which parts are
// combined.
template <class A>
class ChannelPartials {
 public:
  ChannelPartials(int64_t channels, int64_t parts)
      : C_(channels), stride_((channels + 7) / 8 * 8), parts_(parts), values_(stride_ * parts) {}
  A* part(int64_t i) { return values_.get() + i * stride_; }

  void sum(A* out) {
    std::copy_n(part(0), C_, out);
    for (int64_t i = 1; i < parts_; ++i) {
      const A* p = part(i);
      for (int64_t c = 0; c < C_; ++c) out[c] += p[c];
    }
  }

 private:
  int64_t C_, stride_, parts_;
  Buffer<A> values_;
};

// Mean, and with kMax the maximum and its pixel, of every channel of an image; with kEven ties are counted.
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

  void run(const Matrix<const T>& x, const Team& team, A* mean, A* max = nullptr, int32_t* at = nullptr) {
    team.each(parts_.count, [&](int64_t begin, int64_t end) {
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
  // Parts in order, so that the first of equal maxima, or the first NaN, stays.
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

// The channel gate as a factor of the matrix: per row in nchw, per column (in a padded copy) in nhwc.
template <class A>
Gate<A> channel_gate(bool nhwc, const A* gate, int64_t row0 = 0) {
  return nhwc ? Gate<A>{nullptr, gate} : Gate<A>{gate + row0, nullptr};
}

// Channel and spatial gate of a block that begins at pixel p0, as the factors of its matrix.
template <class A>
Gate<A> both_gates(bool nhwc, const A* channel, const A* spatial, int64_t p0, bool sum = false) {
  return nhwc ? Gate<A>{spatial + p0, channel, sum} : Gate<A>{channel, spatial + p0, sum};
}

}  // namespace visattn
