// The convolution of CBAM's maps and its gradients. Each block owns some pixels, and gathers from its team
// what the windows around them reach.
#pragma once

#include <cstdint>

#include "../common/geometry.h"
#include "../common/scratch.h"
#include "channel_gate.h"
#include "portable.h"

namespace visattn::cuda {

template <class Exec>
struct CbamFloats : Floats<Exec> {
  typename Floats<Exec>::Shared maximum, halo, taps, spatial, direct, at_channel, lines;
  typename Floats<Exec>::Exchange max_part, map_part, spatial_part, pixel_stats, grad_part, conv_part;

  VF_DEVICE CbamFloats(Exec& ex, const Geometry& g, const Scratch& s)
      : Floats<Exec>(ex, g, s, 0),
        maximum(this->own + s.maximum),
        halo(this->own + s.halo),
        taps(this->own + s.taps),
        spatial(this->own + s.spatial),
        direct(this->own + s.direct),
        at_channel(this->own + s.at_channel),
        lines(this->own + s.lines),
        max_part(this->exchange + s.max_part),
        map_part(this->exchange + s.map_part),
        spatial_part(this->exchange + s.spatial_part),
        pixel_stats(this->exchange + s.pixel_stats),
        grad_part(this->exchange + s.grad_part),
        conv_part(this->exchange + s.conv_part) {}
};

// The part of a map within reach of the windows around the block's pixels, with zeros outside the map: `rows`
// rows of `pitch` values; the first value is (top, -window / 2).
struct Halo {
  int top, rows, pitch;
  VF_DEVICE Halo(const Part& part, const Geometry& g) {
    const int half = g.window / 2;
    top = part.begin / g.W - half;
    rows = part.end > part.begin ? (part.end - 1) / g.W + half + 1 - top : 0;
    pitch = g.W + 2 * half;
  }
  VF_DEVICE int span() const { return rows * pitch; }
  // The index of a pixel.
  VF_DEVICE int place(const Geometry& g, int pixel) const {
    return (pixel / g.W - top) * pitch + pixel % g.W + g.window / 2;
  }
};

// out [maps, halo] = value(map, pixel), a warp for each row.
template <class Exec, class Out, class Value>
VF_DEVICE void fill_halo(Exec& ex, const Geometry& g, const Halo& halo, int maps, Out out,
                         const Value& value) {
  const int half = g.window / 2, high = g.P / g.W;
#pragma unroll 1
  for (int r = ex.thread() / kWarp; r < maps * halo.rows; r += ex.threads() / kWarp) {
    const int map = r / halo.rows, y = r % halo.rows + halo.top;
#pragma unroll 2
    for (int i = ex.thread() % kWarp; i < halo.pitch; i += kWarp) {
      const int x = i - half;
      const bool inside = y >= 0 && y < high && x >= 0 && x < g.W;
      put(out, r * halo.pitch + i, inside ? value(map, y * g.W + x) : 0.0f);
    }
  }
}

// Fills the halo of `maps` maps. Every block holds its part of the maps, one map after the other.
template <class Exec, class Out>
VF_DEVICE void gather_halo(Exec& ex, const Geometry& g, const Halo& halo, int maps,
                           typename Exec::Exchange part, Out out) {
  fill_halo(ex, g, halo, maps, out, [&](int map, int pixel) {
    return get(ex.peer(part, pixel / g.pixels), map * g.pixels + pixel % g.pixels);
  });
  ex.sync_block();
}

// Loads the convolution's weights, in float32, into f.taps [2, window, window].
template <class Exec, class W>
VF_DEVICE void load_taps(Exec& ex, const Geometry& g, const CbamFloats<Exec>& f, const W& wconv) {
#pragma unroll 1
  for (int i = ex.thread(); i < 2 * g.window * g.window; i += ex.threads()) put(f.taps, i, get(wconv, i));
  ex.sync_block();
}

// The sum over a window that begins at `values`; with kDirection -1 of the transposed convolution. kWindow:
// the window's size if it is a constant, else 0.
template <int kDirection, int kWindow, class Values, class Taps>
VF_DEVICE float convolve_window(int size, int pitch, Values values, Taps taps) {
  const int window = kWindow ? kWindow : size, last = window * window - 1;
  float total = 0;
#pragma unroll(kWindow ? kWindow : 1)
  for (int i = 0; i < window; ++i) {
#pragma unroll(kWindow ? kWindow : 4)
    for (int j = 0; j < window; ++j) {
      const int tap = i * window + j;
      total += get(taps, kDirection > 0 ? tap : last - tap) * get(values, i * pitch + j);
    }
  }
  return total;
}

template <int kDirection, class Values, class Taps>
VF_DEVICE float convolve(const Geometry& g, const Halo& halo, Values values, Taps taps, int pixel) {
  const int first = (pixel / g.W - halo.top - g.window / 2) * halo.pitch + pixel % g.W;
  return g.window == 7 ? convolve_window<kDirection, 7>(7, halo.pitch, values + first, taps)
                       : convolve_window<kDirection, 0>(g.window, halo.pitch, values + first, taps);
}

// Calls finish(pixel, map, value(pixel, map)) for both maps of each of the block's pixels, by lanes 2 i and 2
// i + 1. pixel is -1 in lanes without one.
template <class Exec, class Value, class Finish>
VF_DEVICE void for_maps(Exec& ex, const Part& part, const Value& value, const Finish& finish) {
#pragma unroll 1
  for (int i = ex.thread() / kWarp * kWarp; i < 2 * (part.end - part.begin); i += ex.threads()) {
    const int pixel = part.begin + (i + ex.thread() % kWarp) / 2, map = ex.thread() % 2;
    const bool has = pixel < part.end;
    finish(has ? pixel : -1, map, has ? value(pixel, map) : 0.0f);
  }
}

// Calls keep(e, sum over the block's pixels of dq[p] maps[map, p + shift]) for each element e = (map, shift)
// of the weight, and with the sum of dq for the last e, by one lane. A warp computes a row of a map's window.
// dq is the halo's; maps [2, P].
template <class Exec, class Values, class Maps, class Keep>
VF_DEVICE void conv_weight_grads(Exec& ex, const Geometry& g, const Part& part, const Halo& halo, Values dq,
                                 Maps maps, const Keep& keep) {
  constexpr int kTaps = 8;  // of a row at a time
  const int window = g.window, half = window / 2, high = g.P / g.W, lane = ex.thread() % kWarp;
#pragma unroll 1
  for (int unit = ex.thread() / kWarp; unit <= 2 * window; unit += ex.threads() / kWarp) {
    const int map = unit / window, dy = unit % window - half;
    const bool itself = unit == 2 * window;
#pragma unroll 1
    for (int left = 0; left < (itself ? 1 : window); left += kTaps) {
      float total[kTaps] = {};
#pragma unroll 4
      for (int p = part.begin + lane; p < part.end; p += kWarp) {
        const int y = p / g.W + dy, x = p % g.W + left - half;
        const float d = get(dq, halo.place(g, p));
        const bool inside = !itself && y >= 0 && y < high;
        VF_UNROLL
        for (int j = 0; j < kTaps; ++j) {
          const bool has = inside && left + j < window && x + j >= 0 && x + j < g.W;
          const float value = has ? get(maps, int64_t{map} * g.P + y * g.W + x + j) : 0.0f;
          total[j] += d * (itself && j == 0 ? 1.0f : value);
        }
      }
      VF_UNROLL
      for (int j = 0; j < kTaps; ++j) {
        const float sum = ex.warp_sum(total[j]);
        if (lane == 0 && left + j < (itself ? 1 : window)) keep(unit * window + left + j, sum);
      }
    }
  }
}

}  // namespace visattn::cuda
