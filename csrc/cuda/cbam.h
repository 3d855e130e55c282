// CBAM forward, resident: channel attention, then spatial attention on u = x * channel gate, which is never
// stored.
#pragma once

#include "channel_scale.h"
#include "stats.h"

namespace visattn::cuda {

template <class Memory, class T>
struct CbamForward {
  template <class U>
  using Global = typename Memory::template Global<U>;
  Geometry geometry;
  Scratch scratch;
  GateWeights<Memory> weights;  // without biases
  Weight<Memory> wconv;         // [2, window, window]
  int activation;
  Global<const T> x, residual;  // residual may be null
  Global<T> y;
  Global<float> pooled, hidden, channel_gate, maps,
      spatial_gate;                 // [N, 2, C], [N, 2, R], [N, C], [N, 2, P], [N, P]
  Global<int> argmax_hw, argmax_c;  // [N, C], [N, P]
};

template <class Exec>
struct CbamFloats : Floats<Exec> {
  typename Floats<Exec>::Shared maximum, halo, spatial;
  typename Floats<Exec>::Exchange max_part, map_part, spatial_part, pixel_stats;

  VF_DEVICE CbamFloats(Exec& ex, const Geometry& g, const Scratch& s)
      : Floats<Exec>(ex, g, s, 0),
        maximum(this->partial + s.maximum),
        halo(this->partial + s.halo),
        spatial(this->partial + s.spatial),
        max_part(this->sums + s.max_part),
        map_part(this->sums + s.map_part),
        spatial_part(this->sums + s.spatial_part),
        pixel_stats(this->sums + s.pixel_stats) {}
};

// Both branches' hidden units of the block's part, from the pooled values in f.mean and f.maximum.
template <class Exec, class W, class Keep>
VF_DEVICE void hidden_of_two(Exec& ex, const Geometry& g, const CbamFloats<Exec>& f, const W& w1,
                             const Keep& keep) {
  const Part units(ex.rank(), g.hidden, g.R);
  product(ex, w1, units.begin, units.end, g.C, f.mean, [&](int r, float sum) {
    keep(0, r, activate(sum, kRelu));
    put(f.hidden_part, r - units.begin, activate(sum, kRelu));
  });
  product(ex, w1, units.begin, units.end, g.C, f.maximum, [&](int r, float sum) {
    keep(1, r, activate(sum, kRelu));
    put(f.hidden_part, r - units.begin, get(f.hidden_part, r - units.begin) + activate(sum, kRelu));
  });
}

// The rows of both maps that the windows around the block's pixels reach: f.halo [2, span], from pixel
// `first` on.
struct Halo {
  int first, span;
  VF_DEVICE Halo(const Part& part, const Geometry& g) {
    const int half = g.window / 2, rows = g.P / g.W;
    const int top = part.begin / g.W - half, bottom = (part.end - 1) / g.W + half + 1;
    first = (top < 0 ? 0 : top) * g.W;
    span = part.end > part.begin ? (bottom > rows ? rows : bottom) * g.W - first : 0;
  }
};

template <class Exec, class W>
VF_DEVICE float convolve(const Geometry& g, const CbamFloats<Exec>& f, const Halo& halo, const W& wconv,
                         int pixel) {
  const int half = g.window / 2, y = pixel / g.W, x = pixel % g.W, rows = g.P / g.W;
  float total = 0;
#pragma unroll 1
  for (int m = 0; m < 2; ++m) {
#pragma unroll 1
    for (int i = 0; i < g.window; ++i) {
      const int row = y + i - half;
      if (row < 0 || row >= rows) continue;
      for (int j = 0; j < g.window; ++j) {
        const int column = x + j - half;
        if (column < 0 || column >= g.W) continue;
        total += get(wconv, (m * g.window + i) * g.window + j) *
                 get(f.halo, m * halo.span + row * g.W + column - halo.first);
      }
    }
  }
  return total;
}

// f.map_part of every block -> f.spatial: the gates of the block's own pixels in nhwc, else of all.
template <bool kNhwc, class Exec, class W, class Keep>
VF_DEVICE void spatial_forward(Exec& ex, const Geometry& g, const CbamFloats<Exec>& f, const W& wconv,
                               const Keep& keep) {
  const Part part(ex.rank(), g.pixels, g.P);
  const Halo halo(part, g);
  ex.sync_team();
  for (int i = ex.thread(); i < 2 * halo.span; i += ex.threads()) {
    const int pixel = halo.first + i % halo.span, map = i / halo.span;
    put(f.halo, i, get(ex.peer(f.map_part, pixel / g.pixels), map * g.pixels + pixel % g.pixels));
  }
  ex.sync_block();
  for (int p = part.begin + ex.thread(); p < part.end; p += ex.threads()) {
    const float gate = sigmoid(convolve(g, f, halo, wconv, p));
    keep(p, gate);
    if constexpr (kNhwc) {
      put(f.spatial, p - part.begin, gate);
    } else {
      put(f.spatial_part, p - part.begin, gate);
    }
  }
  if constexpr (kNhwc) {
    ex.sync_block();
  } else {
    ex.sync_team();
    gather(ex, f.spatial_part, g.pixels, g.P, f.spatial);
  }
}

template <bool kNhwc, int kAccess, class T, class Exec>
VF_DEVICE void cbam_forward(Exec& ex, const CbamForward<typename Exec::Memory, T>& a) {
  constexpr int V = kPack<kAccess, T>, S = kSumPack<kAccess, T>;
  const Geometry& g = a.geometry;
  Slabs<Exec, T> slabs(ex, a.x, g);
  const CbamFloats<Exec> f(ex, g, a.scratch);
  const Part channels(ex.rank(), g.channels, g.C), pixels(ex.rank(), g.pixels, g.P);
  const int row0 = ex.rank() * g.slab, rows = slabs.count() / g.cols;
  int turn = 0;
  for (int64_t n = ex.team(); n < g.N; n += ex.teams(), ++turn) {
    const auto slab = slabs.acquire(turn);
    const auto plain = [&](int offset, float (&v)[S]) {
      const Pack<T, S> x = get_pack<S>(slab, offset);
      VF_UNROLL
      for (int j = 0; j < S; ++j) v[j] = static_cast<float>(x.v[j]);
    };
    const auto pooled = [&](int c, const Stat& s) {
      const float mean = s.sum / static_cast<float>(g.P);
      put(f.mean_part, c - channels.begin, mean);
      put(f.max_part, c - channels.begin, s.peak.value);
      put(a.pooled, 2 * n * g.C + c, mean);
      put(a.pooled, (2 * n + 1) * g.C + c, s.peak.value);
      put(a.argmax_hw, n * g.C + c, s.peak.at);
    };
    if constexpr (kNhwc) {
      column_stats<S>(ex, rows, g.cols, row0, channels, f.partial, f.sums, plain, pooled);
    } else {
      row_stats<S>(ex, rows, g.cols, f.partial, plain, [&](int r, const Stat& s) { pooled(row0 + r, s); });
    }
    ex.sync_team();
    gather(ex, f.mean_part, g.channels, g.C, f.mean);
    gather(ex, f.max_part, g.channels, g.C, f.maximum);
    hidden_of_two(ex, g, f, a.weights.w1,
                  [&](int branch, int r, float v) { put(a.hidden, (2 * n + branch) * g.R + r, v); });
    excite_forward<kNhwc>(ex, g, f, a.weights, [&](int c, float v) { put(a.channel_gate, n * g.C + c, v); });
    const auto gated = [&](int offset, float (&v)[S]) {
      plain(offset, v);
      for_channels<S, kNhwc, S == 1 ? kNarrow : kAccess>(offset, row0, g.cols,
                                                         [&](int j, int c) { v[j] *= get(f.gate, c); });
    };
    const auto mapped = [&](int p, const Stat& s) {
      const float mean = s.sum / static_cast<float>(g.C);
      put(f.map_part, p - pixels.begin, mean);
      put(f.map_part, g.pixels + p - pixels.begin, s.peak.value);
      put(a.maps, 2 * n * g.P + p, mean);
      put(a.maps, (2 * n + 1) * g.P + p, s.peak.value);
      put(a.argmax_c, n * g.P + p, s.peak.at);
    };
    if constexpr (kNhwc) {
      row_stats<S>(ex, rows, g.cols, f.partial, gated, [&](int r, const Stat& s) { mapped(row0 + r, s); });
    } else {
      column_stats<S>(ex, rows, g.cols, row0, pixels, f.partial, f.pixel_stats, gated, mapped);
    }
    spatial_forward<kNhwc>(ex, g, f, a.wconv, [&](int p, float v) { put(a.spatial_gate, n * g.P + p, v); });
    const int64_t at = n * g.C * g.P + slabs.first();
#pragma unroll 1
    for (int i = ex.thread() * V; i < slabs.count(); i += ex.threads() * V) {
      const Pack<T, V> x = get_pack<V>(slab, i);
      Pack<T, V> more = {};
      if (a.residual) more = get_pack<V>(a.residual, at + i);
      Pack<T, V> y;
      const int line = i / g.cols;
      for_channels<V, kNhwc, kAccess>(i, row0, g.cols, [&](int j, int c) {
        const int pixel = !kNhwc ? i + j - (c - row0) * g.cols : kAccess == kRagged ? (i + j) / g.cols : line;
        float v = static_cast<float>(x.v[j]) * get(f.gate, c) * get(f.spatial, pixel);
        if (a.residual) v += static_cast<float>(more.v[j]);
        y.v[j] = static_cast<T>(activate(v, a.activation));
      });
      put_map<true>(a.y, at + i, y);
    }
    slabs.release(turn);
  }
}

}  // namespace visattn::cuda
