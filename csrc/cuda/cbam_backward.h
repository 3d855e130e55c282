// CBAM backward, resident: reads x and grad and writes dx (with an activation also grad * act', which is
// dresidual). With s_c and s_p the gates of a channel and of a pixel, and g = grad * act':
//   dq[p] = s_p (1 - s_p) sum_c g x s_c             whose transposed convolution gives the maps' gradients
//   du = g s_p + dmean[p] + [argmax_c[p] == c] dmax[p]
//   dz[c] = s_c (1 - s_c) sum_p du x                which the MLP takes to those of the pooled values
//   dx = du s_c + dpooled_mean[c] + [argmax_hw[c] == p] dpooled_max[c]
// g and x meet once, in one pass that sums both ways; du is never stored.
#pragma once

#include "cbam_image.h"

namespace visattn::cuda {

// Pass 1: f.map_part, dq of the block's pixels. What g gives each channel is left in f.direct in nchw, and
// in f.sums in nhwc, of the block's pixels alone. upstream(offset, x) is g.
template <bool kNhwc, int kAccess, class T, class Exec, class X, class Upstream>
VF_DEVICE void sum_both_ways(const CbamImage<kNhwc, kAccess, T, Exec>& im, X x, const Upstream& upstream) {
  constexpr int S = kSumPack<kAccess, T>;
  cross_sums<S, true, true>(
      im.ex, im.rows, im.g.cols, im.f.partial,
      [&](int column) {
        Lanes<float, S> gates = {};
        VF_UNROLL
        for (int j = 0; j < S && column >= 0; ++j) {
          gates.v[j] = kNhwc ? get(im.f.gate, column + j) : im.pixel_gate(column + j);
        }
        return gates;
      },
      [&](int row, int column, const Lanes<float, S>& gates, float& along, float (&down)[S]) {
        const int offset = row * im.g.cols + column;
        const float gate = kNhwc ? get(im.f.spatial, row) : get(im.f.gate, im.row0 + row);
        const Pack<T, S> xs = get_pack<S>(x, offset);
        const Pack<T, S> gs = upstream(offset, xs, gate, gates.v);
        VF_UNROLL
        for (int j = 0; j < S; ++j) {
          const float product = static_cast<float>(gs.v[j]) * static_cast<float>(xs.v[j]);
          along += product * gates.v[j];
          down[j] += product * gate;
        }
      },
      [&](int row, float sum) {
        if constexpr (kNhwc) {
          put(im.f.map_part, row, gate_grad(sum, get(im.f.spatial, row), kSigmoid));
        } else {
          put(im.f.direct, row, sum);
        }
      },
      [&](int column, float sum) { put(im.f.sums, column, sum); });
  if constexpr (!kNhwc) {
    im.ex.sync_team();
#pragma unroll 1
    for (int p = im.pixels.begin + im.ex.thread(); p < im.pixels.end; p += im.ex.threads()) {
      put(im.f.map_part, p - im.pixels.begin,
          gate_grad(over_team(im.ex, im.f.sums, p), im.pixel_gate(p), kSigmoid));
    }
  }
}

// Pass 2: what the maps give each channel, and with it f.mean, dz of the block's channels.
template <bool kNhwc, int kAccess, class T, class Exec, class X>
VF_DEVICE void sum_through_maps(const CbamImage<kNhwc, kAccess, T, Exec>& im, X x) {
  constexpr int S = kSumPack<kAccess, T>;
  const auto keep = [&](int c, float dgate) {
    const float dz = gate_grad(dgate, get(im.f.gate, c), kSigmoid);
    put(im.f.mean, c, dz);
    put(im.a.dz, im.n * im.g.C + c, dz);
  };
  cross_sums<S, !kNhwc, kNhwc>(
      im.ex, im.rows, im.g.cols, im.f.partial,
      [&](int column) {
        Lanes<Side, S> grads = {};
        if constexpr (!kNhwc) {
          VF_UNROLL
          for (int j = 0; j < S && column >= 0; ++j) grads.v[j] = im.pixel(column + j);
        }
        return grads;
      },
      [&](int row, int column, const Lanes<Side, S>& grads, float& along, float (&down)[S]) {
        const Pack<T, S> xs = get_pack<S>(x, row * im.g.cols + column);
        const Side own = kNhwc ? im.pixel(im.row0 + row) : Side{};
        VF_UNROLL
        for (int j = 0; j < S; ++j) {
          const Side& pixel = kNhwc ? own : grads.v[j];
          const float du = pixel.mean + (pixel.at == im.channel_of(row, column + j) ? pixel.peak : 0.0f);
          (kNhwc ? down[j] : along) += static_cast<float>(xs.v[j]) * du;
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
  for_tiles<S, 1>(
      im.ex, tiling_of(im.g.cols, S, im.ex.threads()), im.rows, im.g.cols,
      [&](int column) {
        Lanes<Side, S> sides = {};
        VF_UNROLL
        for (int j = 0; j < S && column >= 0; ++j) {
          sides.v[j] = kNhwc ? im.channel(column + j) : im.pixel(column + j);
        }
        return sides;
      },
      [&](int row, const int (&columns)[1], int, const Lanes<Side, S>(&all)[1]) {
        const int column = columns[0];
        if (column < 0) return;
        const Lanes<Side, S>& sides = all[0];
        const int offset = row * im.g.cols + column;
        const Side own = kNhwc ? im.pixel(im.row0 + row) : im.channel(im.row0 + row);
        const Pack<T, S> gs = get_pack<S>(upstream, offset);
        Pack<T, S> dx;
        VF_UNROLL
        for (int j = 0; j < S; ++j) {
          const Side &p = kNhwc ? own : sides.v[j], &c = kNhwc ? sides.v[j] : own;
          const float v = input_grad(static_cast<float>(gs.v[j]), p, c, im.pixel_of(row, column + j),
                                     im.channel_of(row, column + j));
          dx.v[j] = static_cast<T>(v);
        }
        put_map<true>(im.a.dx, im.at + offset, dx);
      },
      [](int, const int (&)[1], const Lanes<Side, S>(&)[1]) {});
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
    // g comes to be where grad is held, or else in dresidual.
    const bool act = a.activation != kNone;
    Global upstream = given;
    if (act && !grads.held()) upstream = a.dresidual + image.at;
    const auto apply = [&](int i, auto& gated) {
      constexpr int W = sizeof(gated) / sizeof(float);
      const auto through = through_activation<W, T>(a, get_pack<W>(given, i), gated, image.at + i);
      if (grads.held()) put_pack(grads.slab(turn), i, through);
      put_map<false>(a.dresidual, image.at + i, through);
      return through;
    };
    ex.sync_block();
    // Sums that see single elements come after a pass of wide stores.
    if (S != V && act) {
#pragma unroll 1
      for (int i = ex.thread() * V; i < xs.count(); i += ex.threads() * V) {
        const Pack<T, V> pack = get_pack<V>(x, i);
        float gated[V];
        for_elements<V, kNhwc, kAccess>(i, image.row0, g.cols, [&](int j, int c, int p) {
          const float gate = image.pixel_gate(kNhwc ? image.row0 + p : p);
          gated[j] = static_cast<float>(pack.v[j]) * get(f.gate, c) * gate;
        });
        apply(i, gated);
      }
      ex.sync_block();
    }
    sum_both_ways(image, x, [&](int i, const Pack<T, S>& pack, float row_gate, const float (&gates)[S]) {
      if constexpr (S == V) {
        if (act) {
          float gated[S];
          VF_UNROLL
          for (int j = 0; j < S; ++j) {
            gated[j] =
                static_cast<float>(pack.v[j]) * (kNhwc ? gates[j] : row_gate) * (kNhwc ? row_gate : gates[j]);
          }
          return apply(i, gated);
        }
      }
      return get_pack<S>(upstream, i);
    });
    image.convolution();
    sum_through_maps(image, x);
    image.perceptron();
    write_input_grad(image, upstream);
    grads.release(turn);
    xs.release(turn);
  }
  if (a.sums.any()) sums_of_grid(ex, a.sums);
}

}  // namespace visattn::cuda
