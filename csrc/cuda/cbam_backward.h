// CBAM backward, resident: reads x and grad and writes dx, and with an activation also grad * act', which is
// dresidual. With the gates s_c of a channel and s_p of a pixel, and g = grad * act':
//   dq[p] = s_p (1 - s_p) sum_c g x s_c             its transposed convolution gives the maps' gradients
//   du = g s_p + dmean[p] + [argmax_c[p] == c] dmax[p]
//   dz[c] = s_c (1 - s_c) sum_p du x                the perceptron turns it into the pooled values' gradients
//   dx = du s_c + dpooled_mean[c] + [argmax_hw[c] == p] dpooled_max[c]
// One pass over g and x sums both ways; du is never stored.
#pragma once

#include <cstdint>

#include "../common/activations.h"
#include "../common/geometry.h"
#include "batch_sums.h"
#include "cbam_conv.h"
#include "cbam_image.h"
#include "channel_scale.h"
#include "gate_math.h"
#include "portable.h"
#include "reduce.h"
#include "team.h"
#include "tiles.h"
#include "walk.h"

namespace visattn::cuda {

// Pass 1: dq of the block's pixels, in f.map_part, and g's contribution to each channel: in f.direct in nchw;
// in f.sums in nhwc, from the block's pixels alone. upstream(offset, x, gates [S]) is g.
template <bool kNhwc, int kAccess, class T, class Exec, class X, class Upstream>
VF_DEVICE void sum_both_ways(const CbamImage<kNhwc, kAccess, T, Exec>& im, X x, const Upstream& upstream) {
  constexpr int S = kSumPack<kAccess, T>;
  cross_sums<S, true, true>(
      im.ex, im.rows, im.g.cols, im.f.partial,
      [&](int column) {
        Lanes<float, S> gates = {};
        if (column >= 0) im.column_gates(column, gates.v);
        return gates;
      },
      [&](int row, int column, const Lanes<float, S>& gates, float& along, float (&down)[S]) {
        const int offset = row * im.g.cols + column;
        const float gate = im.row_gate(row);
        const Pack<T, S> pack = get_pack<S>(x, offset);
        float xs[S], gs[S];
        to_floats(upstream(offset, pack, gate, gates.v), gs);
        to_floats(pack, xs);
        VF_UNROLL
        for (int j = 0; j < S; ++j) {
          const float product = gs[j] * xs[j];
          along += product * gates.v[j];
          down[j] += product * gate;
        }
      },
      [&](int row, float sum) {
        if constexpr (kNhwc) {
          put(im.f.map_part, row, gate_grad(sum, im.row_gate(row), kSigmoid));
        } else {
          put(im.f.direct, row, sum);
        }
      },
      [&](int column, float sum) { put(im.f.sums, column, sum); });
  if constexpr (!kNhwc) {
    im.ex.sync_team();
#pragma unroll 1
    for (int i = im.ex.thread(); i < im.pixels.end - im.pixels.begin; i += im.ex.threads()) {
      const float sum = over_team(im.ex, im.f.sums, im.pixels.begin + i);
      put(im.f.map_part, i, gate_grad(sum, get(im.f.spatial, i), kSigmoid));
    }
  }
}

// Pass 2: the maps' contribution to each channel, and with it dz of the block's channels, in f.mean.
template <bool kNhwc, int kAccess, class T, class Exec, class X>
VF_DEVICE void sum_through_maps(const CbamImage<kNhwc, kAccess, T, Exec>& im, X x) {
  constexpr int S = kSumPack<kAccess, T>;
  const auto keep = [&](int c, float dgate) {
    const float dz = gate_grad(dgate, get(im.f.gate, c), kSigmoid);
    put(im.f.mean, c, dz);
    put(im.a.dz, im.n * im.g.C + c, dz);
  };
  struct Pixels {
    float mean[S], both[S];  // `both` where the pixel's maximum is
    int at[S];
  };
  cross_sums<S, !kNhwc, kNhwc>(
      im.ex, im.rows, im.g.cols, im.f.partial,
      [&](int column) {
        Pixels p = {};
        if constexpr (!kNhwc) {
          if (column < 0) return p;
          Sides<S> sides;
          im.column_gradients(column, sides);
          VF_UNROLL
          for (int j = 0; j < S; ++j)
            p.mean[j] = sides.mean[j], p.both[j] = sides.mean[j] + sides.peak[j], p.at[j] = sides.at[j];
        }
        return p;
      },
      [&](int row, int column, const Pixels& pixels, float& along, float (&down)[S]) {
        float xs[S];
        to_floats(get_pack<S>(x, row * im.g.cols + column), xs);
        if constexpr (kNhwc) {
          const Sides<1> own = im.row_sides(row);
          const float both = own.mean[0] + own.peak[0];
          VF_UNROLL
          for (int j = 0; j < S; ++j) down[j] += xs[j] * (own.at[0] - column == j ? both : own.mean[0]);
        } else {
          VF_UNROLL
          for (int j = 0; j < S; ++j)
            along += xs[j] * (pixels.at[j] == im.row0 + row ? pixels.both[j] : pixels.mean[j]);
        }
      },
      [&](int row, float sum) { keep(im.row0 + row, get(im.f.direct, row) + sum); },
      [&](int c, float sum) { put(im.f.sums, c, get(im.f.sums, c) + sum); });
  if constexpr (kNhwc) {
    im.ex.sync_team();
#pragma unroll 1
    for (int c = im.channels.begin + im.ex.thread(); c < im.channels.end; c += im.ex.threads()) {
      keep(c, over_team(im.ex, im.f.sums, c));
    }
  }
}

// Pass 3: dx.
template <bool kNhwc, int kAccess, class T, class Exec>
VF_DEVICE void write_input_grad(const CbamImage<kNhwc, kAccess, T, Exec>& im,
                                typename Exec::Memory::template Global<const T> upstream) {
  constexpr int S = kSumPack<kAccess, T>;
  const auto dx = im.a.dx + im.at;
  for_columns<S, 2>(
      im.ex, im.rows, im.g.cols,
      [&](int, int column) {
        Sides<S> sides;
        im.column_gates(column, sides.gate);
        im.column_gradients(column, sides);
        return sides;
      },
      [&](const Sides<S>& sides, int row, int offset) {
        const Sides<1> own = im.row_sides(row);
        const int line = im.row0 + row, hit = own.at[0] - offset + row * im.g.cols;
        float v[S];
        to_floats(get_pack<S>(upstream, offset), v);
        if constexpr (kNhwc) {  // the pixel's own maximum, then those of the channels
          VF_UNROLL
          for (int j = 0; j < S; ++j) {
            const float du = v[j] * own.gate[0] + (hit == j ? own.mean[0] + own.peak[0] : own.mean[0]);
            v[j] = du * sides.gate[j] + sides.mean[j];
            if (sides.at[j] == line) v[j] += sides.peak[j];
          }
        } else {
          VF_UNROLL
          for (int j = 0; j < S; ++j) {
            float du = v[j] * sides.gate[j] + sides.mean[j];
            if (sides.at[j] == line) du += sides.peak[j];
            v[j] = du * own.gate[0] + own.mean[0];
          }
          if (hit >= 0 && hit < S) {  // one pack of a channel
            VF_UNROLL
            for (int j = 0; j < S; ++j) v[j] += j == hit ? own.peak[0] : 0.0f;
          }
        }
        put_map<true>(dx, offset, of_floats<T>(v));
      },
      [](int, int, const Sides<S>&) {});
}

template <bool kNhwc, int kAccess, class T, class Exec>
VF_DEVICE void cbam_backward(Exec& ex, const CbamBackward<typename Exec::Memory, T>& a) {
  constexpr int V = kPack<kAccess, T>, S = kSumPack<kAccess, T>;
  using Global = typename Exec::Memory::template Global<const T>;
  const Geometry& g = a.geometry;
  const CbamFloats<Exec> f(ex, g, a.scratch);
  Slabs<Exec, T> xs(ex, a.x, g, g.stride_n), grads(ex, a.grad, g, int64_t{g.C} * g.P, 1);
  load_taps(ex, g, f, a.wconv);
  int turn = 0;
  for (int64_t n = ex.team(); n < g.N; n += ex.teams(), ++turn) {
    const CbamImage<kNhwc, kAccess, T, Exec> image(ex, a, f, n, xs.count(), xs.first());
    image.load();
    const auto x = xs.acquire(turn);
    const Global given = grads.find(turn);
    // g replaces grad in the slab if grad is held, else it is read from dresidual.
    const bool act = a.activation != kNone;
    Global upstream = given;
    if (act && !grads.held()) upstream = a.dresidual + image.at;
    typename Exec::template Shared<T> held = {};
    if constexpr (Exec::kResident) {
      if (grads.held()) held = grads.slab(turn);
    }
    const auto apply = [&](int i, auto& gated) {
      constexpr int W = sizeof(gated) / sizeof(float);
      const auto through = through_activation<W, T>(a, get_pack<W>(given, i), gated, image.at + i);
      if (grads.held()) put_pack(held, i, through);
      put_map<false>(a.dresidual, image.at + i, through);
      return through;
    };
    ex.sync_block();
    // Sums over single elements follow a pass of wide stores.
    if constexpr (S != V) {
      if (act) {
#pragma unroll 1
        for (int i = ex.thread() * V; i < xs.count(); i += ex.threads() * V) {
          float gated[V];
          to_floats(get_pack<V>(x, i), gated);
          for_elements<V, kNhwc, kAccess>(i, image.row0, g.cols, [&](int j, int c, int p) {
            gated[j] *= get(f.gate, c) * (kNhwc ? image.row_gate(p) : get(a.spatial_gate, n * g.P + p));
          });
          apply(i, gated);
        }
        ex.sync_block();
      }
    }
    if (S == V && act) {
      sum_both_ways(image, x, [&](int i, const Pack<T, S>& pack, float row_gate, const float (&gates)[S]) {
        float gated[S];
        to_floats(pack, gated);
        VF_UNROLL
        for (int j = 0; j < S; ++j) gated[j] *= gates[j] * row_gate;
        return apply(i, gated);
      });
    } else {
      sum_both_ways(image, x, [&](int i, const Pack<T, S>&, float, const float (&)[S]) {
        return get_pack<S>(upstream, i);
      });
    }
    image.convolution();
    sum_through_maps(image, x);
    xs.release(turn);
    image.perceptron();
    write_input_grad(image, upstream);
    grads.release(turn);
  }
  if (a.sums.any()) sums_of_grid(ex, a.sums);
}

}  // namespace visattn::cuda
