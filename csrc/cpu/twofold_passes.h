// The passes of a channel gate and a pixel gate together, y = x * channel * spatial, for pixels [p0, p1) of
// an image. Vectors over channels are padded; those over pixels begin at the image's first pixel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "column_stats.h"
#include "elementwise.h"
#include "image_matrix.h"
#include "matrix.h"
#include "parallel.h"
#include "products.h"
#include "row_stats.h"
#include "simd.h"
#include "simd_lanes.h"
#include "ties.h"
#include "wide_sums.h"

namespace visattn {

// per_channel = sum over the pixels of g x spatial (padded), per_pixel = sum over channels of g x channel.
// spatial and per_pixel begin at p0.
template <class T>
void gate_sums(const Matrix<const T>& x, const Matrix<const T>& g, bool nhwc, const Acc<T>* channel,
               const Acc<T>* spatial, Acc<T>* per_channel, Acc<T>* per_pixel) {
  if (nhwc) return products<T, true, true>(x, g, spatial, channel, per_pixel, per_channel);
  Buffer<Acc<T>> columns(x.cols);
  products<T, true, true>(x, g, channel, spatial, per_channel, columns.get());
  std::copy_n(columns.get(), x.cols, per_pixel);
}

// The values of the maxima of [begin, end) that several elements equal, and each element's share of the
// gradient, padded. The entries of other maxima are NaN, which equals nothing.
template <class A>
struct Shares {
  Buffer<A> value, share;
  bool any = false;

  Shares(const Maxima<A>& maxima, int64_t begin, int64_t end)
      : value(maxima.value ? end - begin : 0), share(maxima.value ? end - begin : 0) {
    for (int64_t i = begin; maxima.value && i < end; ++i) {
      const bool equals = maxima.at[i] < 0;
      any |= equals;
      value[i - begin] = equals ? maxima.value[i] : std::numeric_limits<A>::quiet_NaN();
      share[i - begin] = equals ? maxima.share(i) : A(0);
    }
  }
};

// out[c] (padded) = sum over the pixels of x (dmean + share where x channel equals value). Pixels are columns
// or rows.
template <class T, bool kPixelColumns>
void shared_sums(Matrix<const T> x, const Acc<T>* channel, const Acc<T>* dmean, const Acc<T>* value,
                 const Acc<T>* share, Acc<T>* out) {
  using A = Acc<T>;
  ColumnTotals<A> totals(kPixelColumns ? 0 : x.rows, x.cols);
  double* const total[] = {totals.of(0)};
  simd([=]() VF_INLINE {
    for (int64_t c = 0; !kPixelColumns && c < x.cols; c += kLanes<A>) store(out + c, set1<A>(0));
    const auto add_row = [&](int64_t r) VF_INLINE {
      const T* row = x.row(r);
      RowTotal<A> of_row;
      for_vectors<A>(x.cols, [&](int64_t c, auto lanes) VF_INLINE {
        const auto of_pixel = [&](const A* p)
                                  VF_INLINE { return kPixelColumns ? load(p + c) : set1<A>(p[r]); };
        const Vec<A> v = load(row + c, lanes),
                     u = v * (kPixelColumns ? set1<A>(channel[r]) : load(channel + c));
        const Vec<A> d = v * (of_pixel(dmean) + (u == of_pixel(value) ? of_pixel(share) : set1<A>(0)));
        if constexpr (kPixelColumns) {
          of_row.add(d);
        } else {
          store(out + c, load(out + c) + d);
        }
      });
      if constexpr (kPixelColumns) out[r] = of_row.sum();
    };
    A* const sums[] = {out};
    add_in_chunks(x.rows, x.cols, sums, total, [&](int64_t r, int64_t end) VF_INLINE {
      for (; r < end; ++r) add_row(r);
    });
  });
}

// out[c] (padded) = sum over the pixels of x (dmean[p] + dmax[p] where x channel is the pixel's maximum).
template <class T>
void map_sums(const Matrix<const T>& image, bool nhwc, int64_t p0, int64_t p1, const Acc<T>* channel,
              const Acc<T>* dmean, Maxima<Acc<T>> maxima, Acc<T>* out) {
  using A = Acc<T>;
  const auto x = pixels_of(image, nhwc, p0, p1);
  Shares<A> equals(maxima, p0, p1);
  if (equals.any && nhwc) {
    shared_sums<T, false>(x, channel, dmean + p0, equals.value.get(), equals.share.get(), out);
  } else if (equals.any) {
    shared_sums<T, true>(x, channel, dmean + p0, equals.value.get(), equals.share.get(), out);
  } else if (nhwc) {
    column_stats<T, false, true>(x, dmean + p0, out);
  } else {
    row_stats<T, false, true>(x, dmean + p0, out);
  }
  const int64_t channels = nhwc ? x.cols : x.rows;
  Buffer<double> at_maxima(channels);
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t c = maxima.at[p];
    if (c >= 0) at_maxima[c] += static_cast<A>(*element(image, nhwc, c, p)) * maxima.grad[p];
  }
  for (int64_t c = 0; c < channels; ++c) out[c] += static_cast<A>(at_maxima[c]);
}

// dx as in InputGrad, without the unique maxima. All members are padded, with a value for each channel or
// each pixel.
template <class A>
struct SharedGrad {
  const A *channel, *spatial, *dmean_c, *dmean_hw, *value_c, *share_c, *value_hw, *share_hw;

  template <class T, bool kPixelColumns>
  void run(Matrix<const T> x, Matrix<const T> g, T* out) const {
    const SharedGrad k = *this;
    simd([=]() VF_INLINE {
      for (int64_t r = 0; r < x.rows; ++r) {
        const T *px = x.row(r), *pg = g.row(r);
        T* po = out + r * g.ld;
        for_vectors<A>(x.cols, [&](int64_t c, auto lanes) VF_INLINE {
          const auto of_pixel = [&](const A* p)
                                    VF_INLINE { return kPixelColumns ? load(p + c) : set1<A>(p[r]); };
          const auto of_channel = [&](const A* p)
                                      VF_INLINE { return kPixelColumns ? set1<A>(p[r]) : load(p + c); };
          const Vec<A> v = load(px + c, lanes), gate = of_channel(k.channel), u = v * gate, none = set1<A>(0);
          Vec<A> d = load(pg + c, lanes) * of_pixel(k.spatial) + of_pixel(k.dmean_c);
          d += u == of_pixel(k.value_c) ? of_pixel(k.share_c) : none;
          d = d * gate + of_channel(k.dmean_hw);
          d += v == of_channel(k.value_hw) ? of_channel(k.share_hw) : none;
          store(po + c, d, lanes);
        });
      }
    });
  }
};

// dx = (g spatial + dmean_c + dmax at the maxima over channels) channel + dmean_hw + dmax at the maxima over
// pixels.
template <class T>
struct InputGrad {
  using A = Acc<T>;
  const A *channel, *spatial, *dmean_c, *dmean_hw;
  Maxima<A> over_c, over_hw;

  // Writes the dense terms and the shares, then computes the elements at unique maxima again.
  void run(const Matrix<const T>& x, const Matrix<const T>& g, bool nhwc, int64_t p0, int64_t p1,
           T* dx) const {
    const int64_t channels = nhwc ? g.cols : g.rows;
    dense(x, g, nhwc, p0, p1, channels, dx);
    const Matrix<T> out{dx, g.ld, g.rows, g.cols};
    const auto anew = [&](int64_t c, int64_t p) {
      const auto value = [&] { return static_cast<A>(*element(x, nhwc, c, p)); };
      A d = static_cast<A>(*element(g, nhwc, c, p)) * spatial[p] + dmean_c[p];
      if (over_c.hits(p, c, [&] { return value() * channel[c]; })) d += over_c.share(p);
      d = d * channel[c] + dmean_hw[c];
      if (over_hw.hits(c, p, value)) d += over_hw.share(c);
      *element(out, nhwc, c, p) = static_cast<T>(d);
    };
    for (int64_t p = p0; p < p1; ++p) {
      if (over_c.at[p] >= 0) anew(over_c.at[p], p);
    }
    for (int64_t c = 0; c < channels; ++c) {
      if (over_hw.at[c] >= p0 && over_hw.at[c] < p1) anew(c, over_hw.at[c]);
    }
  }

 private:
  void dense(const Matrix<const T>& x, const Matrix<const T>& g, bool nhwc, int64_t p0, int64_t p1,
             int64_t channels, T* dx) const {
    const auto xs = pixels_of(x, nhwc, p0, p1), gs = pixels_of(g, nhwc, p0, p1);
    Shares<A> along_c(over_c, p0, p1), along_hw(over_hw, 0, channels);
    if (along_c.any || along_hw.any) {
      const SharedGrad<A> grad{channel,
                               spatial + p0,
                               dmean_c + p0,
                               dmean_hw,
                               along_c.value.get(),
                               along_c.share.get(),
                               along_hw.value.get(),
                               along_hw.share.get()};
      if (nhwc) return grad.template run<T, false>(xs, gs, dx + p0 * g.ld);
      return grad.template run<T, true>(xs, gs, dx + p0);
    }
    const Affine<A> pixel{spatial + p0, dmean_c + p0}, of_channel{channel, dmean_hw};
    if (nhwc) return affine_twice<T, false>(gs, pixel, of_channel, dx + p0 * g.ld);
    affine_twice<T, true>(gs, of_channel, pixel, dx + p0);
  }
};

}  // namespace visattn
