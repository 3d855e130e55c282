// CBAM forward, resident: channel attention, then spatial attention on u = x * channel gate, which is never
// stored.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/activations.h"
#include "../common/geometry.h"
#include "../common/scratch.h"
#include "cbam_conv.h"
#include "channel_gate.h"
#include "channel_scale.h"
#include "column_stats.h"
#include "gate_math.h"
#include "portable.h"
#include "reduce.h"
#include "row_stats.h"
#include "stats.h"
#include "team.h"
#include "walk.h"

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

// Calls visit(offset, gates [V]) for each pack of the block's slab. A gate is the product of a channel's, in
// f.gate, and a pixel's: in f.spatial in nhwc, in `spatial` of every block in nchw.
template <bool kNhwc, int kAccess, int V, class Exec, class Visit>
VF_DEVICE void for_gated(Exec& ex, const Geometry& g, const CbamFloats<Exec>& f, int rows,
                         typename Exec::Exchange spatial, const Visit& visit) {
  const int row0 = ex.rank() * g.slab;
  const auto pixel_gate = [&](int p) {
    return kNhwc ? get(f.spatial, p) : get(ex.peer(spatial, p / g.pixels), p % g.pixels);
  };
  if constexpr (kAccess == kRagged) {
#pragma unroll 1
    for (int i = ex.thread() * V; i < rows * g.cols; i += ex.threads() * V) {
      float gates[V];
      for_elements<V, kNhwc, kAccess>(
          i, row0, g.cols, [&](int j, int c, int p) { gates[j] = get(f.gate, c) * pixel_gate(p); });
      visit(i, gates);
    }
  } else {
    struct Gates {
      float v[V];
    };
    for_columns<V, 2>(
        ex, rows, g.cols,
        [&](int, int column) {
          Gates own;
          if constexpr (kNhwc) {
            get_floats(f.gate, column, own.v);
          } else {
            VF_UNROLL
            for (int j = 0; j < V; ++j) own.v[j] = pixel_gate(column + j);
          }
          return own;
        },
        [&](const Gates& own, int row, int offset) {
          const float gate = kNhwc ? get(f.spatial, row) : get(f.gate, row0 + row);
          float gates[V];
          VF_UNROLL
          for (int j = 0; j < V; ++j) gates[j] = own.v[j] * gate;
          visit(offset, gates);
        },
        [](int, int, const Gates&) {});
  }
}

// The pooled values of the block's channels, in f.mean and f.maximum -> f.gate, as excite_forward leaves it.
// keep_hidden(branch, r, value) and keep_gate(c, value) receive the block's part.
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

// f.map_part of every block -> the pixels' gates: the block's own, in f.spatial, in nhwc; all, in
// f.spatial_part of every block, in nchw.
template <bool kNhwc, class Exec, class W, class Keep>
VF_DEVICE void spatial_attention(Exec& ex, const Geometry& g, const CbamFloats<Exec>& f, const W& bias,
                                 const Keep& keep) {
  const Part part(ex.rank(), g.pixels, g.P);
  const Halo halo(part, g);
  const float start = bias.p ? get(bias, 0) : 0.0f;
  ex.sync_team();
  gather_halo(ex, g, halo, 2, f.map_part, f.halo);
  for_maps(
      ex, part,
      [&](int p, int map) {
        return convolve<1>(g, halo, f.halo + map * halo.span(), f.taps + map * g.window * g.window, p);
      },
      [&](int p, int map, float value) {
        const float gate = sigmoid(start + ex.template warp_sum<2>(value));
        if (p < 0 || map) return;
        keep(p, gate);
        if constexpr (kNhwc) {
          put(f.spatial, p - part.begin, gate);
        } else {
          put(f.spatial_part, p - part.begin, gate);
        }
      });
  if constexpr (kNhwc) {
    ex.sync_block();
  } else {
    ex.sync_team();
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
  load_taps(ex, g, f, a.wconv);
  int turn = 0;
  for (int64_t n = ex.team(); n < g.N; n += ex.teams(), ++turn) {
    const auto slab = slabs.acquire(turn);
    const auto plain = [&](int offset, float (&v)[S]) { to_floats(get_pack<S>(slab, offset), v); };
    const auto pooled = [&](int c, const Stat& s) {
      const float mean = s.sum / static_cast<float>(g.P);
      put(f.mean, c, mean);
      put(f.maximum, c, s.peak.value);
      put(a.pooled, 2 * n * g.C + c, mean);
      put(a.pooled, (2 * n + 1) * g.C + c, s.peak.value);
      put(a.argmax_hw, n * g.C + c, s.peak.at);
    };
    if constexpr (kNhwc) {
      column_stats<S>(
          ex, rows, g.cols, row0, channels, f.partial, PlainStats<Exec>{ex, f.sums, g.cols},
          [&](int, int offset, float (&v)[S]) { plain(offset, v); }, pooled);
    } else {
      row_stats<S>(ex, rows, g.cols, f.partial, plain, [&](int r, const Stat& s) { pooled(row0 + r, s); });
    }
    channel_attention<kNhwc>(
        ex, g, f, a.weights,
        [&](int branch, int r, float v) { put(a.hidden, (2 * n + branch) * g.R + r, v); },
        [&](int c, float v) { put(a.channel_gate, n * g.C + c, v); });
    const auto mapped = [&](int p, const Stat& s) {
      const float mean = s.sum / static_cast<float>(g.C);
      put(f.map_part, p - pixels.begin, mean);
      put(f.map_part, g.pixels + p - pixels.begin, s.peak.value);
      put(a.maps, 2 * n * g.P + p, mean);
      put(a.maps, (2 * n + 1) * g.P + p, s.peak.value);
      put(a.argmax_c, n * g.P + p, s.peak.at);
    };
    if constexpr (kNhwc) {
      const auto of_row = [&](int r, const Stat& s) { mapped(row0 + r, s); };
      if (kept_of(g.cols, S) == 1) {
        scaled_row_stats<S, 1>(ex, rows, g.cols, f.partial, f.gate, plain, of_row);
      } else {
        scaled_row_stats<S, kKept>(ex, rows, g.cols, f.partial, f.gate, plain, of_row);
      }
    } else {
      const auto gated = [&](int row, int offset, float (&v)[S]) {
        const float gate = get(f.gate, row0 + row);
        plain(offset, v);
        VF_UNROLL
        for (int j = 0; j < S; ++j) v[j] *= gate;
      };
      if constexpr (sizeof(T) == 2) {
        using Slab = std::remove_const_t<decltype(slab)>;
        const GatedStats<Exec, Slab> stats{ex,   f.pixel_stats, f.gate_part, g.cols,
                                           row0, g.slab,        g.rows,      slab};
        column_stats<S>(ex, rows, g.cols, row0, pixels, f.partial, stats, gated, mapped);
      } else {
        const PlainStats<Exec> stats{ex, f.pixel_stats, g.cols};
        column_stats<S>(ex, rows, g.cols, row0, pixels, f.partial, stats, gated, mapped);
      }
    }
    spatial_attention<kNhwc>(ex, g, f, a.bias, [&](int p, float v) { put(a.spatial_gate, n * g.P + p, v); });
    const int64_t at = n * g.C * g.P + slabs.first();
    decided(a.activation == kNone && !a.residual, [&](auto plain_result) {
      constexpr bool kPlain = decltype(plain_result)::value;
      for_gated<kNhwc, kAccess, V>(ex, g, f, rows, f.spatial_part, [&](int i, const float (&gates)[V]) {
        float v[V];
        to_floats(get_pack<V>(slab, i), v);
        VF_UNROLL
        for (int j = 0; j < V; ++j) v[j] *= gates[j];
        put_result<kPlain>(a, at + i, v);
      });
    });
    slabs.release(turn);
  }
}

}  // namespace visattn::cuda
