// The passes of a gate per channel and a gate per pixel together, y = x * channel * spatial, for pixels [p0,
// p1) of an image. Vectors over channels are padded; those over pixels begin at the image's first.
#pragma once

#include "image.h"

namespace visattn {

// per_channel = sum over the pixels of g x spatial (padded), per_pixel = sum over channels of g x channel.
// All but the channel's begin at p0.
template <class T>
void gate_sums(const Matrix<const T>& x, const Matrix<const T>& g, bool nhwc, const Acc<T>* channel,
               const Acc<T>* spatial, Acc<T>* per_channel, Acc<T>* per_pixel) {
  if (nhwc) return products<T, true, true>(x, g, spatial, channel, per_pixel, per_channel);
  Buffer<Acc<T>> columns(x.cols);
  products<T, true, true>(x, g, channel, spatial, per_channel, columns.get());
  std::copy_n(columns.get(), x.cols, per_pixel);
}

// out[c] (padded) = sum over the pixels of x (dmean[p] + dmax[p] where x channel is the pixel's maximum).
template <class T>
void map_sums(const Matrix<const T>& image, bool nhwc, int64_t p0, int64_t p1, const Acc<T>* channel,
              const Acc<T>* dmean, Maxima<Acc<T>> maxima, Acc<T>* out) {
  using A = Acc<T>;
  const auto x = pixels_of(image, nhwc, p0, p1);
  if (nhwc) {
    column_stats<T, false, true>(x, dmean + p0, out);
  } else {
    row_stats<T, false, true>(x, dmean + p0, out);
  }
  for (int64_t p = p0; p < p1; ++p) {
    const auto value = [&](int64_t c) { return static_cast<A>(*element(image, nhwc, c, p)); };
    const A share = maxima.share(p);
    maxima.each(
        p, 0, nhwc ? image.cols : image.rows, [&](int64_t c) { return value(c) * channel[c]; },
        [&](int64_t c) { out[c] += value(c) * share; });
  }
}

// dx = (g spatial + dmean_c + dmax at the maxima over channels) channel + dmean_hw + dmax at those over
// pixels.
template <class T>
struct InputGrad {
  using A = Acc<T>;
  const A *channel, *spatial, *dmean_c, *dmean_hw;
  Maxima<A> over_c, over_hw;

  // The dense terms first; then the elements that a maximum came from are computed anew. Of x these are read
  // alone.
  void run(const Matrix<const T>& x, const Matrix<const T>& g, bool nhwc, int64_t p0, int64_t p1,
           T* dx) const {
    const Affine<A> pixel{spatial + p0, dmean_c + p0}, of_channel{channel, dmean_hw};
    const auto gs = pixels_of(g, nhwc, p0, p1);
    const Matrix<T> out{dx, g.ld, g.rows, g.cols};
    if (nhwc) {
      affine_twice<T, false>(gs, pixel, of_channel, dx + p0 * g.ld);
    } else {
      affine_twice<T, true>(gs, of_channel, pixel, dx + p0);
    }
    const auto value = [&](int64_t c, int64_t p) { return static_cast<A>(*element(x, nhwc, c, p)); };
    const auto anew = [&](int64_t c, int64_t p) {
      A d = static_cast<A>(*element(g, nhwc, c, p)) * spatial[p] + dmean_c[p];
      if (over_c.hits(p, c, [&] { return value(c, p) * channel[c]; })) d += over_c.share(p);
      d = d * channel[c] + dmean_hw[c];
      if (over_hw.hits(c, p, [&] { return value(c, p); })) d += over_hw.share(c);
      *element(out, nhwc, c, p) = static_cast<T>(d);
    };
    const int64_t channels = nhwc ? g.cols : g.rows;
    for (int64_t p = p0; p < p1; ++p) {
      over_c.each(
          p, 0, channels, [&](int64_t c) { return value(c, p) * channel[c]; },
          [&](int64_t c) { anew(c, p); });
    }
    for (int64_t c = 0; c < channels; ++c) {
      over_hw.each(c, p0, p1, [&](int64_t p) { return value(c, p); }, [&](int64_t p) { anew(c, p); });
    }
  }
};

}  // namespace visattn
