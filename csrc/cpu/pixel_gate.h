// A gate for each channel, from its mean, together with a gate for each pixel, from its own channels (scSE,
// LocalAttention): y = act(x * (channel + spatial) + residual), or with their product. A module supplies the
// mathematics of both gates.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../common/activations.h"
#include "channel_pool.h"
#include "column_stats.h"
#include "elementwise.h"
#include "image_matrix.h"
#include "matrix.h"
#include "mlp.h"
#include "parallel.h"
#include "products.h"
#include "row_stats.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {

// Pixels in blocks of about 256 KB of x, so that x and its gradient stay in cache together. A block has whole
// vectors of pixels, and at most 1024, so that rounding errors grow with the root of the number of pixels.
template <class T>
Split pixel_blocks(const Shape& s) {
  constexpr int64_t kUnit = 16, kMost = 1024;
  const int64_t fit = (int64_t{1} << 18) / static_cast<int64_t>(sizeof(T) * s.C);
  const int64_t most = std::clamp(fit, kUnit, kMost);
  const int64_t blocks = ((s.P + most - 1) / most + 3) / 4 * 4;  // two or four threads share them evenly
  return Split(s.P, ((s.P + blocks - 1) / blocks + kUnit - 1) / kUnit * kUnit);
}

// The sums over the pixels of a block, one for each channel (padded); with kWeight each pixel is weighted by
// `weight` (padded).
template <class T, bool kWeight>
void channel_sums(const Matrix<const T>& x, bool nhwc, const Acc<T>* weight, Acc<T>* out) {
  if (nhwc) {
    column_stats<T, false, kWeight>(x, weight, out);
  } else {
    row_stats<T, false, kWeight>(x, weight, out);
  }
}

// gate_of(n, mean [C], gate [C]) computes the channel gate of image n. pixel.logits(block, nhwc, n, p0, out)
// computes the logits of the spatial gate for a block's pixels; out is padded. mean and channel are [N, C],
// spatial is [N, P].
template <class T, bool kSum, class GateOf, class Pixel>
Tensor pixel_gate_fwd(const FeatureMap& x, const Shape& s, const std::optional<Tensor>& residual,
                      int64_t activation, Acc<T>* mean, Acc<T>* channel, Acc<T>* spatial,
                      const GateOf& gate_of, const Pixel& pixel) {
  using A = Acc<T>;
  const bool nhwc = x.nhwc;
  const auto res = optional_map(residual, s, nhwc);
  const int64_t image = s.C * s.P, dense_ld = nhwc ? s.C : s.P;
  const Split blocks = pixel_blocks<T>(s);
  Tensor y = empty_map(s, nhwc, x.tensor.scalar_type());
  for_images(s.N, image, [&](int64_t begin, int64_t end, const Workers& workers) {
    ChannelPartials<A> sums(s.C, blocks.count);
    Buffer<A> gate_c(s.C), gate_s(s.P);
    for (int64_t n = begin; n < end; ++n) {
      const auto in = matrix(x.image<T>(n), s, nhwc, x.ld);
      const T* pr = image_or_null<T>(res, n);
      workers.each(blocks.count, [&](int64_t b, int64_t e) {
        for (; b < e; ++b) {
          const int64_t p0 = blocks.begin(b), count = blocks.end(b) - p0;
          const auto xs = pixels_of(in, nhwc, p0, p0 + count);
          channel_sums<T, false>(xs, nhwc, nullptr, sums.part(b));
          pixel.logits(xs, nhwc, n, p0, &gate_s[p0]);
          sigmoid_in_place(&gate_s[p0], count);
          std::copy_n(&gate_s[p0], count, spatial + n * s.P + p0);
        }
      });
      A* mu = mean + n * s.C;
      sums.sum(mu);
      for (int64_t c = 0; c < s.C; ++c) mu[c] /= static_cast<A>(s.P);
      gate_of(n, mu, channel + n * s.C);
      std::copy_n(channel + n * s.C, s.C, gate_c.get());
      workers.each(blocks.count, [&](int64_t b, int64_t e) {
        for (; b < e; ++b) {
          const int64_t p0 = blocks.begin(b), skip = nhwc ? p0 * s.C : p0;
          apply_gate<T>(pixels_of(in, nhwc, p0, blocks.end(b)),
                        both_factors(nhwc, gate_c.get(), gate_s.get(), p0, kSum), pr ? pr + skip : nullptr,
                        data<T>(y) + n * image + skip, dense_ld, activation);
        }
      });
    }
  });
  return y;
}

// The upstream gradient of a block's spatial gate.
template <class A>
struct PixelGrad {
  bool nhwc;
  int64_t n, p0;
  const A* dz;  // the gradient of its logits; padded
};

//  - dmean_of(n, dgate [C], dmean [C]) turns the channel gate's gradient into the gradient of the channel
//    means.
//  - pixel.weight_grad(block of x, PixelGrad, out) writes a block's share of the spatial weights' gradients to
//    `out`.
//  - pixel.input_grad(block of g, PixelGrad, channel gate, spatial gate, dmean / P, dx) writes the block's
//    dx.
//
// dweights is [N, size].
template <class T, bool kSum, class DmeanOf, class Pixel>
MapGrads pixel_gate_bwd(const Tensor& grad, const FeatureMap& x, const Shape& s,
                        const std::optional<Tensor>& residual, const Acc<T>* channel, const Acc<T>* spatial,
                        int64_t activation, const DmeanOf& dmean_of, const Pixel& pixel, int64_t size,
                        Acc<T>* dweights) {
  using A = Acc<T>;
  const auto dtype = x.tensor.scalar_type();
  const bool nhwc = x.nhwc, act = activation != kNone;
  const FeatureMap g = dense_map(grad, s, nhwc);
  const auto res = act ? optional_map(residual, s, nhwc) : std::nullopt;
  MapGrads out{empty_map(s, nhwc, dtype), empty_residual_grad(s, nhwc, dtype, act)};
  const int64_t image = s.C * s.P;
  const Split blocks = pixel_blocks<T>(s);
  for_images(s.N, image, [&](int64_t begin, int64_t end, const Workers& workers) {
    ChannelPartials<A> dots(s.C, blocks.count);
    Buffer<A> gate_c(s.C), gate_s(s.P), dz(s.P), dgate(s.C), dmean(s.C);
    for (int64_t n = begin; n < end; ++n) {
      const auto in = matrix(x.image<T>(n), s, nhwc, x.ld);
      std::copy_n(channel + n * s.C, s.C, gate_c.get());
      std::copy_n(spatial + n * s.P, s.P, gate_s.get());
      const T* pr = image_or_null<T>(res, n);
      T* kept = act ? data<T>(out.dresidual) + n * image : nullptr;
      const auto upstream = matrix<const T>(act ? kept : g.image<T>(n), s, nhwc, g.ld);
      // A lone thread needs the memory of one share: it adds each to the totals at once.
      ChannelPartials<A> shares(size, workers.alone() ? 1 : blocks.count);
      Buffer<double> totals(workers.alone() ? size : 0);
      workers.each(blocks.count, [&](int64_t b, int64_t e) {
        for (; b < e; ++b) {
          const int64_t p0 = blocks.begin(b), p1 = blocks.end(b), skip = nhwc ? p0 * s.C : p0;
          const auto xs = pixels_of(in, nhwc, p0, p1), gs = pixels_of(upstream, nhwc, p0, p1);
          if (act) {
            gate_grad<T>(xs, both_factors(nhwc, gate_c.get(), gate_s.get(), p0, kSum), g.image<T>(n) + skip,
                         pr ? pr + skip : nullptr, kept + skip, g.ld, activation);
          }
          const A *of_channel = kSum ? nullptr : gate_c.get(), *of_pixel = kSum ? nullptr : &gate_s[p0];
          if (nhwc) {
            products<T, true, true>(xs, gs, of_pixel, of_channel, &dz[p0], dots.part(b));
          } else {
            products<T, true, true>(xs, gs, of_channel, of_pixel, dots.part(b), &dz[p0]);
          }
          for (int64_t p = p0; p < p1; ++p) dz[p] *= gate_s[p] * (1 - gate_s[p]);
          A* share = shares.part(workers.alone() ? 0 : b);
          pixel.weight_grad(xs, PixelGrad<A>{nhwc, n, p0, &dz[p0]}, share);
          for (int64_t i = 0; workers.alone() && i < size; ++i) totals[i] += share[i];
        }
      });
      if (!workers.alone()) shares.sum(dweights + n * size);
      for (int64_t i = 0; workers.alone() && i < size; ++i) {
        dweights[n * size + i] = static_cast<A>(totals[i]);
      }
      dots.sum(dgate.get());
      dmean_of(n, dgate.get(), dmean.get());
      for (int64_t c = 0; c < s.C; ++c) dmean[c] /= static_cast<A>(s.P);
      workers.each(blocks.count, [&](int64_t b, int64_t e) {
        for (; b < e; ++b) {
          const int64_t p0 = blocks.begin(b);
          pixel.input_grad(pixels_of(upstream, nhwc, p0, blocks.end(b)), PixelGrad<A>{nhwc, n, p0, &dz[p0]},
                           gate_c.get(), &gate_s[p0], dmean.get(),
                           data<T>(out.dx) + n * image + (nhwc ? p0 * s.C : p0));
        }
      });
    }
  });
  return out;
}

}  // namespace visattn
