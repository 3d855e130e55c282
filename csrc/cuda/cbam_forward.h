// CBAM forward, resident: channel attention, then spatial attention on u = x * channel gate, which is never
// stored.
#pragma once

#include "cbam_conv.h"
#include "channel_scale.h"
#include "stats.h"

namespace visattn::cuda {

template <class Memory, class T>
struct CbamForward {
  using Element = T;
  template <class U>
  using Global = typename Memory::template Global<U>;
  Geometry geometry;
  Scratch scratch;
  GateWeights<Memory> weights;  // without biases
  Weight<Memory> wconv, bias;   // [2, window, window], [1] or null
  int activation;
  Global<const T> x, residual;  // residual may be null
  Global<T> y;
  Global<float> pooled, hidden, channel_gate, maps,
      spatial_gate;                 // [N, 2, C], [N, 2, R], [N, C], [N, 2, P], [N, P]
  Global<int> argmax_hw, argmax_c;  // [N, C], [N, P]
};

// The pooled values of the block's channels, in f.mean and f.maximum -> f.gate, as excite_forward leaves it.
// keep_hidden(branch, r, value) and keep_gate(c, value) see the block's part.
template <bool kNhwc, class Exec, class Weights, class KeepHidden, class KeepGate>
VF_DEVICE void channel_attention(Exec& ex, const Geometry& g, const CbamFloats<Exec>& f, const Weights& w,
                                 const KeepHidden& keep_hidden, const KeepGate& keep_gate) {
  const Part part(ex.rank(), g.channels, g.C), units(ex.rank(), g.hidden, g.R);
  ex.sync_block();
  product(ex, w.w1, {0, g.R}, part, g.C, f.mean, [&](int r, float sum) { put(f.hidden_part, r, sum); });
  product(ex, w.w1, {0, g.R}, part, g.C, f.maximum,
          [&](int r, float sum) { put(f.hidden_part, g.R + r, sum); });
  excite_forward<kNhwc>(
      ex, g, f, w,
      [&](int r) {
        float total = 0;
        VF_UNROLL
        for (int branch = 0; branch < 2; ++branch) {
          const float hidden = activate(over_team(ex, f.hidden_part, branch * g.R + r), kRelu);
          if (units.has(r)) keep_hidden(branch, r, hidden);
          total += hidden;
        }
        return total;
      },
      keep_gate);
}

// f.map_part of every block -> f.spatial: the gates of the block's own pixels in nhwc, else of all.
template <bool kNhwc, class Exec, class W, class Keep>
VF_DEVICE void spatial_forward(Exec& ex, const Geometry& g, const CbamFloats<Exec>& f, const W& wconv,
                               const W& bias, const Keep& keep) {
  const Part part(ex.rank(), g.pixels, g.P);
  const Halo halo(part, g);
  const float start = bias.p ? get(bias, 0) : 0.0f;
  ex.sync_team();
  gather_halo(ex, g, halo, 2, f.map_part, f.halo);
  for (int p = part.begin + ex.thread(); p < part.end; p += ex.threads()) {
    const float mean = convolve<1>(g, halo, f.halo, wconv, 0, p, start);
    const float gate = sigmoid(convolve<1>(g, halo, f.halo + halo.span, wconv, 1, p, mean));
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
  Slabs<Exec, T> slabs(ex, a.x, g, g.stride_n);
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
      put(f.mean, c, mean);
      put(f.maximum, c, s.peak.value);
      put(a.pooled, 2 * n * g.C + c, mean);
      put(a.pooled, (2 * n + 1) * g.C + c, s.peak.value);
      put(a.argmax_hw, n * g.C + c, s.peak.at);
    };
    if constexpr (kNhwc) {
      column_stats<S>(ex, rows, g.cols, row0, channels, f.partial, f.sums, plain, pooled);
    } else {
      row_stats<S>(ex, rows, g.cols, f.partial, plain, [&](int r, const Stat& s) { pooled(row0 + r, s); });
    }
    channel_attention<kNhwc>(
        ex, g, f, a.weights,
        [&](int branch, int r, float v) { put(a.hidden, (2 * n + branch) * g.R + r, v); },
        [&](int c, float v) { put(a.channel_gate, n * g.C + c, v); });
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
    spatial_forward<kNhwc>(ex, g, f, a.wconv, a.bias,
                           [&](int p, float v) { put(a.spatial_gate, n * g.P + p, v); });
    const int64_t at = n * g.C * g.P + slabs.first();
#pragma unroll 1
    for (int i = ex.thread() * V; i < slabs.count(); i += ex.threads() * V) {
      const Pack<T, V> x = get_pack<V>(slab, i);
      Pack<T, V> more = {};
      if (a.residual) more = get_pack<V>(a.residual, at + i);
      Pack<T, V> y;
      for_elements<V, kNhwc, kAccess>(i, row0, g.cols, [&](int j, int c, int pixel) {
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
