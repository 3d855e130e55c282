// The convolution of CBAM's maps and its gradients: each block has some pixels, and takes from its team what
// the windows around them reach.
#pragma once

#include "channel_gate.h"

namespace visattn::cuda {

template <class Exec>
struct CbamFloats : Floats<Exec> {
  typename Floats<Exec>::Shared maximum, halo, spatial, direct, at_channel, at_pixel, map_grad;
  typename Floats<Exec>::Exchange max_part, map_part, spatial_part, pixel_stats, grad_part, conv_part;

  VF_DEVICE CbamFloats(Exec& ex, const Geometry& g, const Scratch& s)
      : Floats<Exec>(ex, g, s, 0),
        maximum(this->partial + s.maximum),
        halo(this->partial + s.halo),
        spatial(this->partial + s.spatial),
        direct(this->partial + s.direct),
        at_channel(this->partial + s.at_channel),
        at_pixel(this->partial + s.at_pixel),
        map_grad(this->partial + s.map_grad),
        max_part(this->sums + s.max_part),
        map_part(this->sums + s.map_part),
        spatial_part(this->sums + s.spatial_part),
        pixel_stats(this->sums + s.pixel_stats),
        grad_part(this->sums + s.grad_part),
        conv_part(this->sums + s.conv_part) {}
};

// The rows of a map that the windows around the block's pixels reach: `span` pixels from `first` on.
struct Halo {
  int first, span;
  VF_DEVICE Halo(const Part& part, const Geometry& g) {
    const int half = g.window / 2, rows = g.P / g.W;
    const int top = part.begin / g.W - half, bottom = (part.end - 1) / g.W + half + 1;
    first = (top < 0 ? 0 : top) * g.W;
    span = part.end > part.begin ? (bottom > rows ? rows : bottom) * g.W - first : 0;
  }
};

// Of `maps` maps, which every block has its part of, one after the other: out [maps, span].
template <class Exec, class Out>
VF_DEVICE void gather_halo(Exec& ex, const Geometry& g, const Halo& halo, int maps,
                           typename Exec::Exchange part, Out out) {
#pragma unroll 1
  for (int i = ex.thread(); i < maps * halo.span; i += ex.threads()) {
    const int pixel = halo.first + i % halo.span, map = i / halo.span;
    put(out, i, get(ex.peer(part, pixel / g.pixels), map * g.pixels + pixel % g.pixels));
  }
  ex.sync_block();
}

// total + the window of wconv's map `map` around a pixel of `values`; kDirection -1: of the gradient.
template <int kDirection, class Values, class W>
VF_DEVICE float convolve(const Geometry& g, const Halo& halo, Values values, const W& wconv, int map,
                         int pixel, float total) {
  const int half = g.window / 2, y = pixel / g.W, x = pixel % g.W, rows = g.P / g.W;
#pragma unroll 1
  for (int i = 0; i < g.window; ++i) {
    const int row = y + kDirection * (i - half);
    if (row < 0 || row >= rows) continue;
#pragma unroll 1
    for (int j = 0; j < g.window; ++j) {
      const int column = x + kDirection * (j - half);
      if (column < 0 || column >= g.W) continue;
      total += get(wconv, (map * g.window + i) * g.window + j) * get(values, row * g.W + column - halo.first);
    }
  }
  return total;
}

// keep(e, sum over the block's pixels of dq[p] maps[map, p + shift]) for each element e = (map, shift) of the
// weight, and of dq itself for the last one, by one lane. dq: the halo's; maps [2, P].
template <class Exec, class Values, class Maps, class Keep>
VF_DEVICE void conv_weight_grads(Exec& ex, const Geometry& g, const Part& part, const Halo& halo, Values dq,
                                 Maps maps, const Keep& keep) {
  const int taps = g.window * g.window, half = g.window / 2, rows = g.P / g.W, lane = ex.thread() % kWarp;
#pragma unroll 1
  for (int e = ex.thread() / kWarp; e <= 2 * taps; e += ex.threads() / kWarp) {
    const int dy = e % taps / g.window - half, dx = e % taps % g.window - half;
    float total = 0;
    for (int p = part.begin + lane; p < part.end; p += kWarp) {
      const int row = p / g.W + dy, column = p % g.W + dx;
      const float d = get(dq, p - halo.first);
      if (e == 2 * taps) {
        total += d;
      } else if (row >= 0 && row < rows && column >= 0 && column < g.W) {
        total += d * get(maps, int64_t{e / taps} * g.P + row * g.W + column);
      }
    }
    const float sum = ex.warp_sum(total);
    if (lane == 0) keep(e, sum);
  }
}

}  // namespace visattn::cuda
